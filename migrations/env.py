"""Where Alembic meets our database: one migrator at a time, each revision re-runnable."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Final

import psycopg
from alembic import context
from sqlalchemy import create_engine, pool

from schema.tables import Base
from worker.config import settings
from worker.schema_version import refuse_old_server

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationInfo

#: Any number that is ours; every migrator takes this advisory lock.
MIGRATION_LOCK: Final = 0x746F6B656E


def run_offline() -> None:
    """Print the SQL for review. psql can run it too; what then meets a lock timeout is run again by hand."""
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},  # else every % is printed twice
        target_metadata=Base.metadata,
        literal_binds=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    url = context.config.attributes.get("url") or settings().database()
    engine = create_engine("postgresql+psycopg://", creator=lambda: _connect(url), poolclass=pool.NullPool)
    with engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            transaction_per_migration=True,
            on_version_apply=_note,
        )
        with context.begin_transaction():
            context.run_migrations()


def _connect(url: str) -> psycopg.Connection:
    """The migrator's one connection, which holds the migrators' lock until its server process ends.

    The lock belongs to the session that does the work: were it another's, a killed migrator would free it while
    the server still builds its index, and the next migrator would meet that half-way.
    """
    connection = psycopg.connect(url, autocommit=True, application_name="tokentrail migrate", connect_timeout=5)
    try:
        refuse_old_server(connection)
        # The server ends a statement whose migrator was killed, rather than finish an index nobody waits for.
        connection.execute("SET client_connection_check_interval = '1s'")
        _wait_for_our_turn(connection)
        connection.autocommit = False
    except BaseException:  # Ctrl-C while we wait for our turn too: else the session, and with it the lock, lives on
        connection.close()
        raise
    return connection


def _wait_for_our_turn(connection: psycopg.Connection) -> None:
    """Take the migrators' lock.

    Polled outside a transaction: whoever *waits* in pg_advisory_lock() holds a snapshot, and CREATE INDEX
    CONCURRENTLY of the one before waits for that snapshot: a deadlock, seen after a second.
    """
    told = False
    while connection.execute("SELECT pg_try_advisory_lock(%s)", [MIGRATION_LOCK]).fetchone() != (True,):
        if not told:
            # Not a log: a person waits.
            print("another migration is running; waiting for it to end", file=sys.stderr, flush=True)  # noqa: T201
            told = True
        time.sleep(0.2)


def _note(ctx: Any, step: MigrationInfo, heads: Any, run_args: Any) -> None:  # noqa: ARG001 - Alembic's signature
    """Remember for the caller what was really done: another migrator may have been first."""
    context.config.attributes.setdefault("moved", []).extend(step.up_revision_ids)


if context.is_offline_mode():
    run_offline()
else:
    run_online()
