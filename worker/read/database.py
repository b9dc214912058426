"""The API's pool of connections: it survives outages, and every read ends in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final, Self, TypeVar

import structlog
from psycopg import AsyncConnection, InterfaceError, OperationalError
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from .connection import OPTIONS, READ_TIMEOUT, SESSION, schema_errors

log = structlog.get_logger(__name__)

T = TypeVar("T")

MAX_CONNECTIONS: Final = 10  # a page takes one for about a millisecond
CONNECTION_TIMEOUT: Final = 2.0  # seconds that a request waits for a connection
RECONNECT_SECONDS: Final = 2.0  # after which the pool replaces a lost connection; a request tries at once


class DatabaseUnavailable(Exception):
    """PostgreSQL is unreachable or does not answer. The request is not at fault: try again later."""


class Database:
    """The API's connection pool. While PostgreSQL is unreachable, reading fails and the pool keeps trying."""

    def __init__(self, url: str) -> None:
        self._pool = AsyncConnectionPool(
            url,
            connection_class=_Connection,
            min_size=1,
            max_size=MAX_CONNECTIONS,
            open=False,
            configure=_configure,
            check=self._check,
            reconnect_timeout=RECONNECT_SECONDS,
            kwargs={**OPTIONS, "application_name": "tokentrail api"},
        )
        self._available = True

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open the pool, which never fails, and close it at the end."""
        await self._pool.open(wait=False)
        try:
            yield
        finally:
            await self._pool.close()

    async def read(self, read: Callable[[AsyncConnection], Awaitable[T]], seconds: float = READ_TIMEOUT) -> T:
        """Return what `read` returns for a connection of the pool.

        Raises DatabaseUnavailable after CONNECTION_TIMEOUT + `seconds` seconds at most, SchemaError where a table is
        missing.
        """
        try:
            async with self._pool.connection(CONNECTION_TIMEOUT) as connection:
                with _disconnect_after(seconds, connection), schema_errors():
                    result = await read(connection)
        except (OperationalError, InterfaceError) as error:
            if self._available:  # one line per outage, not per request
                reason = _Connection.last_error if isinstance(error, PoolTimeout) else ""
                log.warning(
                    "database not available, answering 503 until it is",
                    reason=reason or str(error),
                    kind=type(error).__name__,
                )
            self._available = False
            raise DatabaseUnavailable(
                "The database is unreachable or does not answer: try again in a few seconds."
            ) from error
        if not self._available:
            log.info("database available again")
        self._available = True
        return result

    async def _check(self, connection: AsyncConnection) -> None:
        """Before a request gets a connection: when the server has restarted, discard all of them.

        They mostly died together. The pool would check one after the other, and wait ever longer in between.
        """
        try:
            with _disconnect_after(1, connection):
                await connection.execute("")
        except (OperationalError, InterfaceError):
            await self._pool.drain()
            raise


class _Connection(AsyncConnection[Any]):
    """A connection of the pool. It keeps the last error of connecting, for the pool's own error does not name it."""

    last_error = ""

    @classmethod
    async def connect(cls, conninfo: str = "", **options: Any) -> Self:
        try:
            connection = await super().connect(conninfo, **options)
        except Exception as error:
            cls.last_error = str(error)
            raise
        cls.last_error = ""
        return connection


async def _configure(connection: AsyncConnection) -> None:
    # SET after connecting, not `options`: poolers refuse start-up parameters that they do not know.
    with _disconnect_after(READ_TIMEOUT, connection):
        await connection.execute(SESSION)


@contextlib.contextmanager
def _disconnect_after(seconds: float, connection: AsyncConnection) -> Iterator[None]:
    """End whatever still waits on this connection after so many seconds, by losing the connection.

    A cancelled task would ask the server to cancel the statement, and wait for it: a frozen server answers neither.
    """
    timer = asyncio.get_running_loop().call_later(seconds, _disconnect, connection)
    try:
        yield
    finally:
        timer.cancel()


def _disconnect(connection: AsyncConnection) -> None:
    if not connection.closed:
        with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)
