"""PostgreSQL: connections as the worker needs them."""

from __future__ import annotations

from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

from worker.config import Settings

_T = TypeVar("_T")


class _Connection(psycopg.Connection[Any]):
    """A connection that can tell a dead peer behind a live one, such as a pooler that froze: by a clock of our own.

    And that Ctrl-C leaves usable or closed, wherever it comes.
    """

    answer_within: float | None = None

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        """Raises OperationalError, and closes the connection, when an answer takes longer than `answer_within`."""
        began = monotonic()
        try:
            return super().wait(gen, interval, self.answer_within if timeout is None else timeout)
        except psycopg.OperationalError:
            if timeout is None and self.answer_within is not None and monotonic() - began >= self.answer_within:
                self.pgconn.finish()  # it may be in the middle of anything
                raise psycopg.OperationalError(
                    f"no answer from PostgreSQL within {self.answer_within:g} s: the connection is taken for dead"
                ) from None
            raise
        except KeyboardInterrupt:
            # psycopg cancels the statement and reads that it was; not where Ctrl-C met, and so ended, `gen` itself.
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.pgconn.finish()
            raise


def connect(
    url: str, settings: Settings, *, name: str = "tokentrail worker", answer_within: float | None = None
) -> psycopg.Connection:
    """A connection for the ledger's batches.

    It gives up on locks, statements and silent peers in bounded time, so that a frozen holder of locks cannot
    hold them for hours, and the server ends *our* session when it is we who freeze while holding them. A peer
    whose kernel lives and acknowledges, and that says nothing, is given up after `answer_within` seconds.
    """
    connection = _Connection.connect(
        url,
        autocommit=True,
        application_name=name,
        connect_timeout=5,
        tcp_user_timeout=15_000,  # ms; a peer that has gone silent counts as dead after this
        keepalives_idle=5,
        keepalives_interval=5,
        keepalives_count=3,
    )
    connection.answer_within = answer_within
    try:
        _prepare(connection, settings)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: psycopg.Connection, settings: Settings) -> None:
    # SET after connecting, not `options`: poolers refuse start-up parameters they do not know.
    connection.execute(
        f"""
        SET timezone = 'UTC';
        SET lock_timeout = '{settings.lock_timeout * 1000:.0f}ms';
        SET statement_timeout = '{settings.statement_timeout * 1000:.0f}ms';
        SET idle_in_transaction_session_timeout = '{settings.idle_in_transaction_timeout * 1000:.0f}ms';
        SET client_connection_check_interval = '2s';
        SET tcp_user_timeout = '15s';
        -- Every statement of the ledger looks rows up by key. Without statistics, or with a plan made while a
        -- table was empty, the planner may prefer to read it whole; then it must not.
        SET enable_seqscan = off;
        SET enable_hashjoin = off;
        SET enable_mergejoin = off
        """.encode()
    )
