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

from alembic import op
from sqlalchemy.exc import OperationalError

#: A statement that waits for a strong lock makes everyone behind it wait as long: give up early, try again.
LOCK_TIMEOUT_MS: Final = 50

#: How long a step keeps trying to get its lock between other people's transactions.
PATIENCE_SECONDS: Final = 300

_LOCK_NOT_AVAILABLE: Final = "55P03"


@contextmanager
def steps() -> Iterator[None]:
    """Steps inside are committed one by one."""
    with op.get_context().autocommit_block():
        yield


def briefly(statement: str) -> None:
    """A statement that needs a strong lock for milliseconds: ALTER TABLE, CREATE TRIGGER."""
    op.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_MS}ms'")
    op.execute("SET statement_timeout = '5s'")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            op.execute(statement)
            return
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"no lock within {PATIENCE_SECONDS} s, some transaction holds the table all along "
                    f"(see pg_stat_activity); end it and run the migration again: {statement.strip()[:200]}"
                ) from error
            time.sleep(random.uniform(0.05, 0.25))  # noqa: S311 - jitter


def patiently(statement: str) -> None:
    """A long statement that nobody waits for: VALIDATE CONSTRAINT, CREATE INDEX CONCURRENTLY."""
    op.execute("SET lock_timeout = 0")
    op.execute("SET statement_timeout = 0")
    op.execute(statement)


def add_constraint(table: str, name: str, definition: str) -> None:
    """Add a constraint for new rows at once, then check the old ones while everyone writes on."""
    briefly(
        f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} {definition} NOT VALID"
    )
    patiently(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")


def add_index(table: str, name: str, definition: str, *, unique: bool = False) -> None:
    """Build an index while everyone writes on. What a killed build left behind is invalid, so it is dropped first."""
    patiently(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
    patiently(f"CREATE {'UNIQUE ' if unique else ''}INDEX CONCURRENTLY {name} ON {table} {definition}")
