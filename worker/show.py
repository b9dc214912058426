"""What a person sees in the terminal: amounts, a history and the supply as tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from schema.canonical import plain_number

if TYPE_CHECKING:
    from datetime import datetime
    from decimal import Decimal

    from schema.answers import TransactionHistory
    from worker.read.supply import Supply

#: Columns of a table that goes to a file or a pipe, which has no width of its own.
_WIDTH: Final = 132


def console(*, stderr: bool = False) -> Console:
    """Colours and bars on a terminal; plain lines, wide enough for our tables, everywhere else."""
    stream = sys.stderr if stderr else sys.stdout
    on_terminal = stream is not None and stream.isatty()
    return Console(stderr=stderr, width=None if on_terminal else _WIDTH, highlight=False, emoji=False, markup=False)


def tokens(amount: Decimal) -> str:
    """An amount to the last digit, thousands apart: 1234567.000777 → 1,234,567.000777."""
    whole, point, fraction = plain_number(amount).partition(".")
    sign = whole[: whole.startswith("-")]
    digits = whole.removeprefix("-")
    groups = [digits[max(end - 3, 0) : end] for end in range(len(digits), 0, -3)]
    return f"{sign}{','.join(reversed(groups))}{point}{fraction}"


def moment(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M:%S")


def table(title: str, **columns: str) -> Table:
    """A table with these columns: name="left" or "right" says how one is aligned; _ stands for a space."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD)
    for name, side in columns.items():
        made.add_column(name.replace("_", " "), justify="right" if side == "right" else "left", overflow="fold")
    return made


def history_table(user_id: str, history: TransactionHistory) -> Table:
    """One page of an account's records, newest first."""
    about = history.pagination
    made = table(
        f"History of {printable(user_id)}: page {about.page} of {about.total_pages}, {about.total:,} records",
        no="right",
        recorded="left",
        type="left",
        what="left",
        amount="right",
        before="right",
        after="right",
        key="left",
    )
    for record in history.transactions:
        accrual = record.type == "accrual"
        made.add_row(
            str(record.sequence),
            moment(record.created_at),
            Text(record.type, style="green" if accrual else "yellow"),
            printable(record.source if record.type == "accrual" else record.action),
            Text(("+" if accrual else "-") + tokens(record.amount), style="green" if accrual else "yellow"),
            tokens(record.balance_before),
            tokens(record.balance_after),
            printable(record.idempotency_key),
        )
    return made


def supply_table(supply: Supply) -> Table:
    """All tokens there are."""
    made = table("Supply", tokens="left", amount="right")
    made.add_row("issued", tokens(supply.issued))
    made.add_row("burned", tokens(supply.burned))
    made.add_row("circulating", Text(tokens(supply.circulating), style="bold"))
    if supply.legacy:
        made.add_row("from before the trail", tokens(supply.legacy))
    return made


def printable(text: str) -> Text:
    """A producer's text, which shall not steer the terminal."""
    return Text("".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text))
