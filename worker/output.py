"""Output for the terminal: amounts, tables and progress bars."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from schema.canonical import plain_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from decimal import Decimal

    from schema.responses import Receipt, Rejections, TransactionHistory
    from worker.read.supply import Supply

_WIDTH: Final = 132  # columns of output to a file or a pipe, which has no width of its own

_FIELDS: Final = {"field": "left", "value": "left"}
_STYLES: Final = {"applied": "green", "rejected": "yellow", "dead_lettered": "red", "unknown": "dim"}


def console(*, stderr: bool = False) -> Console:
    """A console with colours and bars on a terminal; plain lines, wide enough for our tables, everywhere else."""
    stream = sys.stderr if stderr else sys.stdout
    on_terminal = stream is not None and stream.isatty()
    return Console(stderr=stderr, width=None if on_terminal else _WIDTH, highlight=False, emoji=False, markup=False)


def is_watched(output: Console) -> bool:
    """Whether the console is a terminal. Rich takes a pipe for one where FORCE_COLOR is set, as in many a CI."""
    return output.is_terminal and output.file.isatty()


@contextmanager
def progress(label: str, total: int, output: Console) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere. Call what it yields with the number of further items done."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(*columns, console=output, disable=not is_watched(output), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


class _Report(logging.Handler):
    """Passes each log message to a function."""

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report(" ".join(line.strip() for line in record.getMessage().splitlines() if line[:2] != "--"))


@contextmanager
def migrating(on: Console) -> Iterator[None]:
    """On a terminal, show the statement that a migration is running (migrations/steps.py logs it) and for how long."""
    if not is_watched(on):
        yield
        return
    statement = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    steps = logging.getLogger("migrations.steps")
    with Progress(TimeElapsedColumn(), statement, console=on, transient=True) as bar:
        task = bar.add_task("migrating", total=None)
        handler = _Report(lambda message: bar.reset(task, description=message))
        level, steps.propagate = steps.level, False
        steps.setLevel(logging.INFO)
        steps.addHandler(handler)
        try:
            yield
        finally:
            steps.removeHandler(handler)
            steps.setLevel(level)
            steps.propagate = True


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
    """An empty table. Each column is name="left" or name="right", its alignment; _ stands for a space."""
    rendered = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD)
    for name, side in columns.items():
        rendered.add_column(name.replace("_", " "), justify="right" if side == "right" else "left", overflow="fold")
    return rendered


def history_table(user_id: str, history: TransactionHistory) -> Table:
    """One page of an account's records, newest first."""
    pagination = history.pagination
    rendered = table(
        f"History of {printable(user_id)}: page {pagination.page} of {pagination.total_pages},"
        f" {count(pagination.total, 'record')}",
        no="right",
        **{"recorded (UTC)": "left"},
        type="left",
        what="left",
        amount="right",
        before="right",
        after="right",
        key="left",
    )
    for record in history.transactions:
        accrual = record.type == "accrual"
        rendered.add_row(
            str(record.sequence),
            moment(record.created_at),
            Text(record.type, style="green" if accrual else "yellow"),
            printable(record.source if record.type == "accrual" else record.action),
            Text(("+" if accrual else "-") + tokens(record.amount), style="green" if accrual else "yellow"),
            tokens(record.balance_before),
            tokens(record.balance_after),
            printable(record.idempotency_key),
        )
    return rendered


def rejections_table(user_id: str, page: Rejections) -> Table:
    """One page of an account's rejected events, newest first."""
    pagination = page.pagination
    rendered = table(
        f"Rejections of {printable(user_id)}: page {pagination.page} of {pagination.total_pages},"
        f" {count(pagination.total, 'rejection')}",
        no="right",
        **{"decided (UTC)": "left"},
        type="left",
        what="left",
        amount="right",
        balance="right",
        reason="left",
        key="left",
    )
    for rejection in page.rejections:
        rendered.add_row(
            str(rejection.number),
            moment(rejection.created_at),
            rejection.type,
            printable(rejection.source if rejection.type == "accrual" else rejection.action),
            tokens(rejection.amount),
            tokens(rejection.balance),
            rejection.reason,
            printable(rejection.idempotency_key),
        )
    return rendered


def receipt_table(receipt: Receipt) -> Table:
    """What became of one event."""
    rendered = table(f"Receipt of {printable(receipt.user_id)} for {printable(receipt.idempotency_key)}", **_FIELDS)
    rendered.add_row("status", Text(receipt.status.replace("_", "-"), style=_STYLES[receipt.status]))
    match receipt.status:
        case "applied":
            record = receipt.transaction
            rendered.add_row("record", f"{record.sequence} ({record.type})")
            rendered.add_row("amount", tokens(record.amount))
            rendered.add_row("balance", f"{tokens(record.balance_before)} → {tokens(record.balance_after)}")
            rendered.add_row("recorded (UTC)", moment(record.created_at))
        case "rejected":
            rendered.add_row("reason", receipt.reason)
            rendered.add_row("balance then", tokens(receipt.balance))
            rendered.add_row("rejection", str(receipt.number))
            rendered.add_row("decided (UTC)", moment(receipt.created_at))
        case "dead_lettered":
            rendered.add_row("reason", receipt.reason)
            rendered.add_row("detail", printable(receipt.detail))
            rendered.add_row("dead letter", f"{receipt.dead_letter}, {receipt.state}")
            rendered.add_row("last seen (UTC)", moment(receipt.last_seen_at))
        case "unknown":
            rendered.add_row("detail", receipt.detail)
    return rendered


def supply_table(supply: Supply) -> Table:
    """The supply, its legacy part only where there is one."""
    rendered = table("Supply", tokens="left", amount="right")
    rendered.add_row("issued", tokens(supply.issued))
    rendered.add_row("burned", tokens(supply.burned))
    rendered.add_row("circulating", Text(tokens(supply.circulating), style="bold"))
    if supply.legacy:
        rendered.add_row("legacy", tokens(supply.legacy))
    return rendered


def printable(text: str) -> Text:
    """A producer's text without the control characters that would drive the terminal."""
    return Text("".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text))
