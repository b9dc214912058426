"""PostgreSQL as the read endpoint uses it: a pool that outlives outages, and answers within a bound or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final, Self, TypeVar

import structlog
from psycopg import AsyncConnection, InterfaceError, OperationalError
from psycopg.errors import UndefinedColumn, UndefinedTable
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from worker.schema_version import SchemaError

log = structlog.get_logger(__name__)

T = TypeVar("T")

#: Connections at most; a page takes one for about a millisecond.
POOL_SIZE: Final = 10

#: Seconds an answer waits for a connection.
CONNECTION_WITHIN: Final = 2.0

#: Seconds its statements may take.
PATIENCE: Final = 5.0

#: Seconds until a connection that was lost is tried again by itself; a request tries at once.
RECONNECT_SECONDS: Final = 2.0

#: Every statement looks rows up by key. Without statistics the planner may prefer to read a table whole; then it
#: must not. Read-only is a second lock on a door that has no handle: this endpoint has no statement that writes.
SESSION: Final = f"""
    SET default_transaction_read_only = on;
    SET timezone = 'UTC';
    SET statement_timeout = '{PATIENCE * 1000:.0f}ms';
    SET client_connection_check_interval = '2s';
    SET enable_seqscan = off;
    SET enable_bitmapscan = off;
    SET enable_hashjoin = off;
    SET enable_mergejoin = off
"""


class DatabaseAway(Exception):
    """The database cannot be reached or does not answer. It is nobody's fault who asks: ask again later."""


class _Connection(AsyncConnection[Any]):
    """One that notes why it could not be had: the pool only says that it has none."""

    refused = ""

    @classmethod
    async def connect(cls, conninfo: str = "", **options: Any) -> Self:
        try:
            connection = await super().connect(conninfo, **options)
        except Exception as error:
            cls.refused = str(error)
            raise
        cls.refused = ""
        return connection


class Database:
    """The pool. Opening it never fails: while the database is away, reading does, and the pool keeps trying."""

    def __init__(self, url: str) -> None:
        self._pool = AsyncConnectionPool(
            url,
            connection_class=_Connection,
            min_size=1,
            max_size=POOL_SIZE,
            open=False,
            configure=_configure,
            check=self._check,
            reconnect_timeout=RECONNECT_SECONDS,
            kwargs={
                "autocommit": True,
                "application_name": "tokentrail api",
                "connect_timeout": int(PATIENCE),
                "tcp_user_timeout": 15_000,  # ms; a peer that has gone silent counts as dead after this
                "keepalives_idle": 5,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                # Plans are made for the table as it is now, not as it was when the connection was young.
                "prepare_threshold": None,
            },
        )
        self._away = False

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        await self._pool.open(wait=False)
        try:
            yield
        finally:
            await self._pool.close()

    async def read(self, ask: Callable[[AsyncConnection], Awaitable[T]], within: float = PATIENCE) -> T:
        """What `ask` reads with a connection.

        Raises DatabaseAway after CONNECTION_WITHIN and `within` seconds at most, SchemaError where a table is missing.
        """
        try:
            async with self._pool.connection(CONNECTION_WITHIN) as connection:
                with _hanging_up_after(within, connection):
                    answer = await ask(connection)
        except (OperationalError, InterfaceError) as error:
            if not self._away:  # once an outage, however many ask meanwhile
                reason = _Connection.refused if isinstance(error, PoolTimeout) else ""
                log.warning(
                    "database not available, answering 503 until it is",
                    reason=reason or str(error),
                    kind=type(error).__name__,
                )
            self._away = True
            raise DatabaseAway(
                "The database cannot be reached or does not answer: try again in a few seconds."
            ) from error
        except (UndefinedTable, UndefinedColumn) as error:
            raise SchemaError(
                "The database is not migrated to what this code knows: run `tokentrail migrate`."
            ) from error
        if self._away:
            log.info("database available again")
        self._away = False
        return answer

    async def _check(self, connection: AsyncConnection) -> None:
        """Connections die while they lie in the pool, when the server restarts: no reader shall be the one to notice.

        All at once, mostly. The pool looks at one after the other, and waits ever longer between two dead ones.
        """
        try:
            with _hanging_up_after(1, connection):
                await connection.execute("")
        except (OperationalError, InterfaceError):
            await self._pool.drain()
            raise


async def _configure(connection: AsyncConnection) -> None:
    # SET after connecting, not `options`: poolers refuse start-up parameters they do not know.
    with _hanging_up_after(PATIENCE, connection):
        await connection.execute(SESSION)


@contextlib.contextmanager
def _hanging_up_after(seconds: float, connection: AsyncConnection) -> Iterator[None]:
    """End what waits for an answer on this connection, as a lost connection, when it takes longer.

    Cancelling instead would ask the server to cancel, and wait for that: a frozen server answers neither.
    """
    timer = asyncio.get_running_loop().call_later(seconds, _hang_up, connection)
    try:
        yield
    finally:
        timer.cancel()


def _hang_up(connection: AsyncConnection) -> None:
    if not connection.closed:
        with socket.socket(fileno=os.dup(connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)
