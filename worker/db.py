"""PostgreSQL connections: settings that the worker's and the API's sessions share, and the worker's connection."""

from __future__ import annotations

from time import monotonic
from typing import Any, Final, TypeVar

import psycopg
from psycopg.abc import PQGen

from worker.config import Settings

_T = TypeVar("_T")

#: Connection parameters: a peer that has gone silent counts as dead after 15 to 20 seconds.
KEEPALIVES: Final[dict[str, Any]] = {
    "tcp_user_timeout": 15_000,  # milliseconds
    "keepalives_idle": 5,  # seconds
    "keepalives_interval": 5,  # seconds
    "keepalives_count": 3,
}

#: SET after connecting, not `options`: poolers refuse start-up parameters they do not know.
#: Every statement looks rows up by key. Without statistics, or with a plan made while a table was empty, the planner
#: may prefer to read the table whole; these settings forbid it.
SESSION: Final = """
    SET timezone = 'UTC';
    SET client_connection_check_interval = '2s';
    SET enable_seqscan = off;
    SET enable_hashjoin = off;
    SET enable_mergejoin = off
"""


class _Connection(psycopg.Connection[Any]):
    """A connection that finds a silent peer behind a live kernel, such as a frozen pooler, by a time limit."""

    answer_within: float | None = None  # seconds

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        """Raises OperationalError, and closes the connection, when an answer takes longer than `answer_within`."""
        started = monotonic()
        try:
            return super().wait(gen, interval, self.answer_within if timeout is None else timeout)
        except psycopg.OperationalError:
            if timeout is None and self.answer_within is not None and monotonic() - started >= self.answer_within:
                self.pgconn.finish()  # it may be in the middle of anything
                raise psycopg.OperationalError(
                    f"no answer from PostgreSQL within {self.answer_within:g} s: the connection is taken for dead"
                ) from None
            raise


def connect(
    url: str, settings: Settings, *, name: str = "tokentrail worker", answer_within: float | None = None
) -> psycopg.Connection:
    """A connection for the ledger's batches.

    It gives up on locks, statements and silent peers in bounded time, so that another session that is frozen cannot
    hold it up for hours; and the server ends this session if this process freezes while it holds locks. A peer
    whose kernel acknowledges but that does not answer is given up after `answer_within` seconds.
    """
    connection = _Connection.connect(url, autocommit=True, application_name=name, connect_timeout=5, **KEEPALIVES)
    connection.answer_within = answer_within
    try:
        connection.execute(
            f"""
            {SESSION};
            SET lock_timeout = '{settings.lock_timeout * 1000:.0f}ms';
            SET statement_timeout = '{settings.statement_timeout * 1000:.0f}ms';
            SET idle_in_transaction_session_timeout = '{settings.idle_in_transaction_timeout * 1000:.0f}ms';
            SET tcp_user_timeout = '{KEEPALIVES["tcp_user_timeout"]}ms'
            """.encode()
        )
    except BaseException:
        connection.close()
        raise
    return connection
