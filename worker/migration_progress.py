"""How far a migration is, on a terminal."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

import psycopg
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from worker.output import is_watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import RenderableType

#: What is said of a statement that somebody else's transaction keeps from running.
WAITING: Final = "waiting for a lock"

#: Seconds that a migration takes before anything is shown of it: most are over by then.
_SOON: Final = 1.0

_BAR: Final = 20  # columns


class Underway(NamedTuple):
    """What a migrator's statement is at."""

    waits: bool  # for a lock
    phase: str | None  # of an index that it builds, in PostgreSQL's words
    done: int
    total: int  # 0 where PostgreSQL does not know


def underway(connection: psycopg.Connection) -> Underway | None:
    """The statement that a migrator of this database is at, if it is at one."""
    row = connection.execute("""
        SELECT wait_event_type IS NOT DISTINCT FROM 'Lock', phase,
            coalesce(CASE WHEN phase LIKE 'waiting%' THEN lockers_done
                WHEN phase LIKE '%scanning%' THEN blocks_done ELSE tuples_done END, 0),
            coalesce(CASE WHEN phase LIKE 'waiting%' THEN lockers_total
                WHEN phase LIKE '%scanning%' THEN blocks_total ELSE tuples_total END, 0)
        FROM pg_stat_activity a LEFT JOIN pg_stat_progress_create_index USING (pid)
        WHERE a.datname = current_database() AND application_name = 'tokentrail migrate' AND state = 'active'
        ORDER BY xact_start LIMIT 1
    """).fetchone()
    return None if row is None else Underway(*row)


@contextmanager
def migrating(url: str, on: Console) -> Iterator[Callable[[str], None]]:
    """A line about the statement that a migration is at, on a terminal and after a second; nothing elsewhere.

    What it yields is told each statement before it runs.
    """
    statement, began = "", monotonic()

    def tell(what: str) -> None:
        nonlocal statement
        statement = " ".join(line.strip() for line in what.splitlines() if not line.startswith("--")).strip()

    if not is_watched(on):
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
