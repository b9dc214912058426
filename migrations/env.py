"""Where Alembic meets our database: one migrator at a time, each revision re-runnable."""

from __future__ import annotations

import sys
import time

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text

from schema.tables import Base
from worker.config import settings

#: Any number that is ours; every migrator takes this advisory lock.
MIGRATION_LOCK = 0x746F6B656E


def run_offline() -> None:
    """Print the SQL for review."""
    context.configure(
        dialect_name="postgresql",
        target_metadata=Base.metadata,
        literal_binds=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    url = context.config.attributes.get("url") or settings().database()
    engine = create_engine(url.replace("://", "+psycopg://", 1).replace("postgres+", "postgresql+"), poolclass=pool.NullPool)
    with engine.connect() as guard, engine.connect() as connection:
        _wait_for_our_turn(guard)
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            transaction_per_migration=True,
            compare_server_default=False,
        )
        with context.begin_transaction():
            context.run_migrations()


def _wait_for_our_turn(connection: Connection) -> None:
    """Hold the migrators' lock until the connection closes.

    Polled outside a transaction: whoever *waits* in pg_advisory_lock() holds a snapshot, and CREATE INDEX
    CONCURRENTLY of the one before waits for that snapshot: a deadlock, seen after a second.
    """
    connection = connection.execution_options(isolation_level="AUTOCOMMIT")
    told = False
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": MIGRATION_LOCK}):
        if not told:
            print("another migration is running; waiting for it to end", file=sys.stderr)  # noqa: T201 - not a log: a person waits
            told = True
        time.sleep(0.2)


if context.is_offline_mode():
    run_offline()
else:
    run_online()
