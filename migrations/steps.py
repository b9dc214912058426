"""The steps that a migration of a live database consists of: none of them makes a writer wait noticeably.

Each step is one statement in a transaction of its own, so that it holds one strong lock at most, for milliseconds.
Each can be run again after a migration was killed between or inside steps.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from alembic import op
from alembic.util import CommandError
from sqlalchemy.exc import OperationalError, PendingRollbackError

#: Every statement that waits for a strong lock makes all later statements on the table wait: give up early, try again.
LOCK_TIMEOUT_MS: Final = 50

#: A bound for statements that hold a strong lock; they need far less.
STATEMENT_TIMEOUT_SECONDS: Final = 5

#: How long `with_short_lock` keeps trying to get its lock between other transactions.
MAX_LOCK_WAIT_SECONDS: Final = 300

_LOCK_NOT_AVAILABLE: Final = "55P03"

log = logging.getLogger(__name__)


@contextmanager
def steps() -> Iterator[None]:
    """Steps inside are committed one by one, under the timeouts of `with_short_lock`."""
    failure: BaseException | None = None
    try:
        with op.get_context().autocommit_block():
            _set_short_timeouts()
            try:
                yield
            except BaseException as error:
                failure = error
                raise
            op.execute("RESET lock_timeout")
            op.execute("RESET statement_timeout")
    except PendingRollbackError:
        # The connection is closed, by Ctrl-C for instance; the end of the block fails for that, and hides the cause.
        if failure is None:
            raise
        raise failure from None


def with_short_lock(statement: str, *, on: str | None = None) -> None:
    """Run a statement that needs a strong lock `on` a table for milliseconds: ALTER TABLE, CREATE TRIGGER.

    Raises CommandError when other transactions hold the table for longer than MAX_LOCK_WAIT_SECONDS.
    """
    deadline = time.monotonic() + MAX_LOCK_WAIT_SECONDS
    log.info("%s", statement)
    waiting = False
    while True:
        try:
            op.execute(statement)
            return
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            if time.monotonic() > deadline:
                raise CommandError(
                    f"No lock within {MAX_LOCK_WAIT_SECONDS} s: another transaction holds the table. Find it in "
                    f"pg_stat_activity, end it, and run the migration again; it was at: {statement.strip()[:200]}"
                ) from error
            if not waiting:
                log.info("waiting for a lock: %s", statement)
                waiting = True
            # Long enough for all statements that queued behind this attempt.
            time.sleep(random.uniform(0.05, 0.25))  # noqa: S311 - jitter
            if on is not None:
                _interrupt_autovacuum(on)


def _interrupt_autovacuum(table: str) -> None:
    """Wait for the lock that VACUUM holds, which blocks no writer.

    An automatic VACUUM gives way only to a statement that has waited for deadlock_timeout (a second), and
    `with_short_lock` waits 50 ms: it would fail on a table whose VACUUM takes longer than MAX_LOCK_WAIT_SECONDS.
    """
    _without_timeouts(f"BEGIN; LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE; COMMIT")


def without_timeouts(statement: str) -> None:
    """Run a long statement that blocks no writer: VALIDATE CONSTRAINT, CREATE INDEX CONCURRENTLY."""
    log.info("%s", statement)
    _without_timeouts(statement)


def _without_timeouts(statement: str) -> None:
    op.execute("SET lock_timeout = 0")
    op.execute("SET statement_timeout = 0")
    op.execute(statement)
    _set_short_timeouts()


def add_constraint(table: str, name: str, definition: str) -> None:
    """Add a constraint for new rows at once, then check the existing rows while writers go on."""
    with_short_lock(
        # A killed migration may have left it there, validated or not.
        "-- squawk-ignore ban-drop-constraint\n"
        f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} {definition} NOT VALID",
        on=table,
    )
    without_timeouts(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")


def add_index(table: str, name: str, definition: str, *, unique: bool = False) -> None:
    """Build an index while writers go on. A killed build leaves an invalid index, so it is dropped first."""
    without_timeouts(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
    without_timeouts(f"CREATE {'UNIQUE ' if unique else ''}INDEX CONCURRENTLY {name} ON {table} {definition}")


def _set_short_timeouts() -> None:
    op.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_MS}ms'")
    op.execute(f"SET statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s'")
