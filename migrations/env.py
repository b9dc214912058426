"""Runs Alembic on our database: one migrator at a time, and each revision can be run again."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Final

import psycopg
from alembic import context
from sqlalchemy import create_engine, pool

from schema.tables import Base
from worker.config import load_settings
from worker.schema_version import refuse_old_server

if TYPE_CHECKING:
    from alembic.runtime.migration import MigrationInfo

#: The advisory lock of migrators, an arbitrary number.
MIGRATION_LOCK: Final = 0x746F6B656E


def run_offline() -> None:
    """Print the SQL for review. psql can run it too; a statement that ends in a lock timeout is run again by hand."""
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
    url = context.config.attributes.get("url") or load_settings().database()
    engine = create_engine("postgresql+psycopg://", creator=lambda: _connect(url), poolclass=pool.NullPool)
    with engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            transaction_per_migration=True,
            on_version_apply=_note_applied,
        )
        with context.begin_transaction():
            context.run_migrations()


def _connect(url: str) -> psycopg.Connection:
    """The migrator's one connection, which holds the migrators' advisory lock until its server process ends.

    The session that does the work holds the lock. With another session a killed migrator would release it while the
    server still builds its index, and the next migrator would meet that index half-built.
    """
    connection = psycopg.connect(url, autocommit=True, application_name="tokentrail migrate", connect_timeout=5)
    try:
        refuse_old_server(connection)
        # If the migrator is killed, the server ends its statement rather than finish the index.
        connection.execute("SET client_connection_check_interval = '1s'")
        _take_migration_lock(connection)
        connection.autocommit = False
    except BaseException:  # Ctrl-C too: otherwise the session, and the lock with it, lives on
        connection.close()
        raise
    return connection


def _take_migration_lock(connection: psycopg.Connection) -> None:
    """Wait for the migrators' advisory lock.

    Polled outside a transaction: a migrator that *waits* in pg_advisory_lock() holds a snapshot, and CREATE INDEX
    CONCURRENTLY of the other migrator waits for that snapshot: a deadlock, found after a second.
    """
    reported = False
    while connection.execute("SELECT pg_try_advisory_lock(%s)", [MIGRATION_LOCK]).fetchone() != (True,):
        if not reported:
            # Printed, not logged: an operator waits.
            print("another migration is running; waiting for it to end", file=sys.stderr, flush=True)  # noqa: T201
            reported = True
        time.sleep(0.2)


def _note_applied(ctx: Any, step: MigrationInfo, heads: Any, run_args: Any) -> None:  # noqa: ARG001 - Alembic's signature
    """Collect the applied revisions for the caller: another migrator may have applied some of them."""
    context.config.attributes.setdefault("applied", []).extend(step.up_revision_ids)


if context.is_offline_mode():
    run_offline()
else:
    run_online()
