"""The ledger's connection to PostgreSQL: opened when needed, replaced after errors, its outages reported."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import psycopg
import structlog

from worker.config import Settings
from worker.db import connect

from .apply import apply_batch
from .dead_letters import NewDeadLetter
from .deliveries import Delivery
from .errors import LOCK_NOT_AVAILABLE, Interrupted
from .outcomes import Outcome

log = structlog.get_logger(__name__)

FIRST_PAUSE_SECONDS: Final = 0.05  # before the second attempt; doubles, with jitter
MAX_PAUSE_SECONDS: Final = 5.0

#: How much longer than statement_timeout to wait for an answer: the server's own error must have time to arrive.
ANSWER_MARGIN_SECONDS: Final = 5.0

#: Errors after which the session is still usable: serialization failure or deadlock (class 40), and lock timeout.
#: After any other error a new session is opened, for the old one may be the reason: a primary that has become a
#: read-only standby keeps its sessions.
SESSION_STILL_USABLE: Final = ("40", LOCK_NOT_AVAILABLE)


class Session:
    """One database connection, and whether PostgreSQL is available.

    `stop` interrupts waiting. `degraded` is called with a sentence when PostgreSQL becomes unavailable and with None
    when it is available again.
    """

    def __init__(
        self, settings: Settings, *, stripe: int, stop: threading.Event, degraded: Callable[[str | None], None]
    ) -> None:
        self._settings = settings
        self._stripe = stripe
        self._stop = stop
        self._degraded = degraded
        self._connection: psycopg.Connection[Any] | None = None
        self._transactions = 0  # of this connection
        self._trouble: str | None = None

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def connection(self) -> psycopg.Connection[Any]:
        """The open connection, or a new one. Raises psycopg.Error if there is none to be had."""
        if self._connection is None or self._connection.closed:
            limit = self._settings.statement_timeout + ANSWER_MARGIN_SECONDS
            self._connection = connect(self._settings.database(), self._settings, answer_within=limit)
            self._transactions = 0
        return self._connection

    def close(self) -> None:
        """Close the connection; `connection` opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def wait_for_connection(self) -> None:
        """Return when there is an open connection, however long it takes. Raises Interrupted."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                self.connection()
            except psycopg.Error as error:
                pause = self.wait(error, pause)
            else:
                return

    def attempt(self, deliveries: Sequence[Delivery], letters: Sequence[NewDeadLetter]) -> list[Outcome]:
        """Apply a batch in one transaction, once. Raises whatever goes wrong."""
        connection = self.connection()
        self._transactions += 1
        if self._transactions & (self._transactions - 1) == 0:
            # Before transaction 1, 2, 4, 8 …: PostgreSQL keeps the foreign keys' plans for the session, and a plan from
            # when the tables were empty reads all records of the user for each new one.
            connection.execute("DISCARD PLANS")
        return apply_batch(connection, deliveries, stripe=self._stripe, letters=letters)

    def wait(self, error: psycopg.Error, pause: float) -> float:
        """Report a transient error, wait about `pause` seconds, and return the next pause. Raises Interrupted."""
        trouble = self.report(error)
        if self._stop.wait(random.uniform(pause / 2, pause)):  # noqa: S311 - jitter
            raise Interrupted(f"stopped while waiting: {trouble}")
        return min(pause * 2, MAX_PAUSE_SECONDS)

    def report(self, error: psycopg.Error) -> str:
        """Report a transient error, once, however often it recurs. Closes the connection unless it is still usable."""
        if error.sqlstate is None or not error.sqlstate.startswith(SESSION_STILL_USABLE):
            self.close()
        trouble = first_line(error)
        if self._trouble is None:
            log.warning("database not available, keeping messages and trying again", reason=trouble)
        if self._trouble != trouble:
            self._trouble = trouble
            self._degraded(trouble)
        return trouble

    def report_available(self) -> None:
        """Report that PostgreSQL is available again, if it was not."""
        if self._trouble is not None:
            log.info("database available again", was=self._trouble)
            self._trouble = None
            self._degraded(None)


def first_line(error: Exception) -> str:
    """The first line of an error, with its SQLSTATE or its type."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, psycopg.Error):
        return f"{text} [{error.sqlstate}]" if error.sqlstate else text
    return f"{type(error).__name__}: {text}"
