"""The steps a migration of a live database is made of: none of them makes a writer wait to speak of.

Each step is one statement in a transaction of its own, so that it holds one strong lock at most, for
milliseconds; each can be run again after a migration was killed between or inside steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from alembic import context, op
from alembic.util import CommandError
from sqlalchemy.exc import OperationalError, PendingRollbackError

from worker.schema_version import WAITING

#: A statement that waits for a strong lock makes everyone behind it wait as long: give up early, try again.
LOCK_TIMEOUT_MS: Final = 50

#: What a step with a strong lock may take in all. Far more than it needs; a bound all the same.
STATEMENT_TIMEOUT_S: Final = 5

#: How long a step keeps trying to get its lock between other people's transactions.
PATIENCE_S: Final = 300

_LOCK_NOT_AVAILABLE: Final = "55P03"


@contextmanager
def steps() -> Iterator[None]:
    """Steps inside are committed one by one, under the timeouts of `briefly`."""
    failure: BaseException | None = None
    try:
        with op.get_context().autocommit_block():
            _impatient()
            try:
                yield
            except BaseException as error:
                failure = error
                raise
            op.execute("RESET lock_timeout")
            op.execute("RESET statement_timeout")
    except PendingRollbackError:
        # The connection is gone, for Ctrl-C too takes it, and the end of the block trips on that, not on its cause.
        if failure is None:
            raise
        raise failure from None


def briefly(statement: str, *, on: str | None = None) -> None:
    """A statement that needs a strong lock `on` a table for milliseconds: ALTER TABLE, CREATE TRIGGER.

    Raises CommandError when somebody holds the table for longer than PATIENCE_S.
    """
    deadline = time.monotonic() + PATIENCE_S
    _tell(statement)
    while True:
        try:
            op.execute(statement)
            return
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            if time.monotonic() > deadline:
                raise CommandError(
                    f"No lock within {PATIENCE_S} s: some transaction holds the table all along. Find it in "
                    f"pg_stat_activity, end it, and run the migration again; it was at: {statement.strip()[:200]}"
                ) from error
            _tell(f"{WAITING}: {statement}")
            # Long enough for everyone who queued behind the attempt to go through.
            time.sleep(random.uniform(0.05, 0.25))  # noqa: S311 - jitter
            if on is not None:
                _interrupt_autovacuum(on)


def _interrupt_autovacuum(table: str) -> None:
    """Wait for the lock that vacuum holds, which no writer minds.

    An automatic vacuum gives way only to someone who has waited for deadlock_timeout (a second), which an
    impatient step never does: without this it fails on any table whose vacuum takes longer than PATIENCE_S.
    """
    _without_timeouts(f"BEGIN; LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE; COMMIT")


def patiently(statement: str) -> None:
    """A long statement that nobody waits for: VALIDATE CONSTRAINT, CREATE INDEX CONCURRENTLY."""
    _tell(statement)
    _without_timeouts(statement)


def _without_timeouts(statement: str) -> None:
    op.execute("SET lock_timeout = 0")
    op.execute("SET statement_timeout = 0")
    op.execute(statement)
    _impatient()


def add_constraint(table: str, name: str, definition: str) -> None:
    """Add a constraint for new rows at once, then check the old ones while everyone writes on."""
    briefly(
        # A killed migration may have left it there, validated or not.
        "-- squawk-ignore ban-drop-constraint\n"
        f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} {definition} NOT VALID",
        on=table,
    )
    patiently(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")


def add_index(table: str, name: str, definition: str, *, unique: bool = False) -> None:
    """Build an index while everyone writes on. What a killed build left behind is invalid, so it is dropped first."""
    patiently(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
    patiently(f"CREATE {'UNIQUE ' if unique else ''}INDEX CONCURRENTLY {name} ON {table} {definition}")


def _tell(statement: str) -> None:
    """Say to who looks on what is about to run."""
    if tell := context.config.attributes.get("tell"):
        tell(statement)


def _impatient() -> None:
    op.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_MS}ms'")
    op.execute(f"SET statement_timeout = '{STATEMENT_TIMEOUT_S}s'")
