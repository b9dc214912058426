"""Connections for readers, and a single read with one of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, TypeVar

from psycopg import AsyncConnection
from psycopg.errors import UndefinedColumn, UndefinedTable

from worker import db
from worker.schema_version import SchemaError, refuse_old_server

T = TypeVar("T")

READ_TIMEOUT: Final = 5.0  # seconds that the statements of one answer may take

#: Read-only is a second safeguard: no statement of the read side writes.
SESSION: Final = f"""
    {db.SESSION};
    SET default_transaction_read_only = on;
    SET statement_timeout = '{READ_TIMEOUT * 1000:.0f}ms';
    SET enable_bitmapscan = off
"""

OPTIONS: Final[dict[str, Any]] = {
    "autocommit": True,
    "connect_timeout": int(READ_TIMEOUT),
    **db.KEEPALIVES,
    "prepare_threshold": None,  # plan for the table as it is now, not as it was when the connection was opened
}


def read_once(
    url: str,
    read: Callable[[AsyncConnection], Awaitable[T]],
    *,
    application_name: str,
    statement_timeout: float = READ_TIMEOUT,
) -> T:
    """Read with a connection of its own, for a program without an event loop.

    Raises psycopg's errors, and SchemaError where the database is not migrated or too old.
    """

    async def connect_and_read() -> T:
        async with await AsyncConnection.connect(url, **OPTIONS, application_name=application_name) as connection:
            refuse_old_server(connection)
            await connection.execute(f"{SESSION}; SET statement_timeout = {statement_timeout * 1000:.0f}".encode())
            with schema_errors():
                return await read(connection)

    return asyncio.run(connect_and_read())


@contextlib.contextmanager
def schema_errors() -> Iterator[None]:
    """Raise SchemaError where the database has not the tables or columns that this code knows."""
    try:
        yield
    except (UndefinedTable, UndefinedColumn) as error:
        raise SchemaError(
            "The database lacks tables that this code needs: run `tokentrail migrate`, or restore what was dropped."
        ) from error
