"""What a person sees in the terminal: amounts, a history and the supply as tables, and how far something long is."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Final

import psycopg
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from schema.canonical import plain_number
from worker.schema_version import WAITING, Underway, underway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from decimal import Decimal

    from rich.console import RenderableType

    from schema.responses import Receipt, Rejections, TransactionHistory
    from worker.read.supply import Supply

#: Columns of a table that goes to a file or a pipe, which has no width of its own.
_WIDTH: Final = 132

#: Seconds that a migration takes before anything is shown of it: most are over by then.
_SOON: Final = 1.0

_BAR: Final = 20  # columns

_FIELDS: Final = {"field": "left", "value": "left"}
_STYLES: Final = {"applied": "green", "rejected": "yellow", "dead_lettered": "red", "unknown": "dim"}


def console(*, stderr: bool = False) -> Console:
    """Colours and bars on a terminal; plain lines, wide enough for our tables, everywhere else."""
    stream = sys.stderr if stderr else sys.stdout
    on_terminal = stream is not None and stream.isatty()
    return Console(stderr=stderr, width=None if on_terminal else _WIDTH, highlight=False, emoji=False, markup=False)


def _watched(on: Console) -> bool:
    """Whether somebody looks on. Rich takes a pipe for a terminal where FORCE_COLOR is set, as in many a CI."""
    return on.is_terminal and on.file.isatty()


@contextmanager
def progress(what: str, total: int, on: Console) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; what it yields is told how many more are done."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=on, disable=not _watched(on), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def migrating(url: str, on: Console) -> Iterator[Callable[[str], None]]:
    """A line about the statement that a migration is at, on a terminal and after a second; nothing elsewhere.

    What it yields is told each statement before it runs.
    """
    statement, began = "", monotonic()

    def tell(what: str) -> None:
        nonlocal statement
        statement = " ".join(line.strip() for line in what.splitlines() if not line.startswith("--")).strip()

    if not _watched(on):
        yield tell
        return
    with ExitStack() as stack:
        connection = None
        with suppress(psycopg.Error):  # why there is none, the migration says
            connection = stack.enter_context(
                psycopg.connect(url, autocommit=True, connect_timeout=5, application_name="tokentrail progress")
            )

        def line() -> RenderableType:
            taken = monotonic() - began
            if taken < _SOON:
                return Group()
            at = None
            with suppress(psycopg.Error):
                if connection is not None:
                    at = underway(connection)
            return _migration_line(int(taken), statement, at)

        stack.enter_context(Live(get_renderable=line, console=on, transient=True))
        yield tell


def _migration_line(seconds: int, statement: str, at: Underway | None) -> Table:
    """How long, how far and what. PostgreSQL knows how far an index is, and nothing else."""
    bar, said = ProgressBar(total=None, width=_BAR), [statement]
    if at is not None and at.phase is not None:
        bar = ProgressBar(total=at.total or None, completed=at.done, width=_BAR)
        said.insert(0, f"{at.phase} ({at.done:,} of {at.total:,})" if at.total else at.phase)
    elif at is not None and at.waits and not statement.startswith(WAITING):
        said.insert(0, WAITING)
    row = Table.grid(padding=(0, 1))
    text = Text(": ".join(filter(None, said)), no_wrap=True, overflow="ellipsis")
    row.add_row(str(timedelta(seconds=seconds)), bar, text)
    return row


def tokens(amount: Decimal) -> str:
    """An amount to the last digit, thousands apart: 1234567.000777 → 1,234,567.000777."""
    whole, point, fraction = plain_number(amount).partition(".")
    sign = whole[: whole.startswith("-")]
    digits = whole.removeprefix("-")
    groups = [digits[max(end - 3, 0) : end] for end in range(len(digits), 0, -3)]
    return f"{sign}{','.join(reversed(groups))}{point}{fraction}"


def count(number: int, noun: str) -> str:
    """1 event, 2,000 events."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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
        f"History of {printable(user_id)}: page {about.page} of {about.total_pages}, {count(about.total, 'record')}",
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


def rejections_table(user_id: str, found: Rejections) -> Table:
    """One page of what an account was refused for good, newest first."""
    about = found.pagination
    made = table(
        f"Rejections of {printable(user_id)}: page {about.page} of {about.total_pages},"
        f" {count(about.total, 'rejection')}",
        no="right",
        decided="left",
        type="left",
        what="left",
        amount="right",
        held="right",
        reason="left",
        key="left",
    )
    for rejection in found.rejections:
        made.add_row(
            str(rejection.number),
            moment(rejection.created_at),
            rejection.type,
            printable(rejection.source if rejection.type == "accrual" else rejection.action),
            tokens(rejection.amount),
            tokens(rejection.balance),
            rejection.reason,
            printable(rejection.idempotency_key),
        )
    return made


def receipt_table(receipt: Receipt) -> Table:
    """What became of one event."""
    made = table(f"Receipt of {printable(receipt.user_id)} for {printable(receipt.idempotency_key)}", **_FIELDS)
    made.add_row("status", Text(receipt.status.replace("_", "-"), style=_STYLES[receipt.status]))
    match receipt.status:
        case "applied":
            record = receipt.transaction
            made.add_row("record", f"{record.sequence} ({record.type})")
            made.add_row("amount", tokens(record.amount))
            made.add_row("balance", f"{tokens(record.balance_before)} → {tokens(record.balance_after)}")
            made.add_row("recorded", moment(record.created_at))
        case "rejected":
            made.add_row("reason", receipt.reason)
            made.add_row("held then", tokens(receipt.balance))
            made.add_row("rejection", str(receipt.number))
            made.add_row("decided", moment(receipt.created_at))
        case "dead_lettered":
            made.add_row("reason", receipt.reason)
            made.add_row("detail", printable(receipt.detail))
            made.add_row("dead letter", f"{receipt.dead_letter}, {receipt.state}")
            made.add_row("last seen", moment(receipt.last_seen_at))
        case "unknown":
            made.add_row("detail", receipt.detail)
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
