"""The ledger as the queue uses it: settles batches, and polls what parked events wait for.

Only what an event itself can cause ends in a dead letter. A database that is unreachable, full, read-only or locked
does not, however long that lasts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

import psycopg
import structlog

from worker.config import Settings

from . import locks, store
from .bisection import Bisection
from .dead_letters import NewDeadLetter
from .deliveries import Delivery
from .outcomes import Outcome
from .session import Session

log = structlog.get_logger(__name__)

#: How long to wait for another session that is inserting the same account before the account counts as locked.
INSERT_LOCK_TIMEOUT_SECONDS: Final = 0.02

#: The lock holder of an account whose insert is not committed.
UNCOMMITTED_INSERT: Final = "uncommitted insert"


class Ledger:
    """One database connection that settles batches, one at a time, for as long as it takes.

    `stop` interrupts waiting. `degraded` is called with a sentence when PostgreSQL becomes unavailable and with None
    when it is available again.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        stripe: int,
        stop: threading.Event | None = None,
        degraded: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self.session = Session(settings, stripe=stripe, stop=stop or threading.Event(), degraded=degraded)
        self._answerable_failed = False
        self._holders: dict[str, str] = {}  # locked account → the transaction that held its lock at the last poll

    def settle(
        self, deliveries: Sequence[Delivery], letters: Sequence[NewDeadLetter] = (), *, leave_locked: bool = False
    ) -> list[Outcome]:
        """The outcome of each delivery, durable; the letters are written.

        Accounts that another session keeps locked do not hold up other accounts' events. Their own events wait for
        the lock or, with `leave_locked`, come back as Locked, to be settled again when `unlocked` names the account.
        Raises Interrupted when stopped while waiting, and SuspiciousBatch when the database refuses more than
        MAX_CULPRITS of the events. All deliveries must then be delivered again: what was decided stays decided,
        and no event has become a dead letter because the database refused it.
        """
        outcomes = Bisection(self.session, self._locked, leave_locked=leave_locked).run(deliveries, letters)
        self.session.report_available()
        return outcomes

    def close(self) -> None:
        """Close the connection; the ledger opens another when it is used again."""
        self.session.close()

    def answerable(self, burns: Sequence[Delivery]) -> list[bool]:
        """Whether each burn has an answer right now: its account holds enough, or another delivery of it was decided.

        Takes no locks and promises nothing. All False while PostgreSQL is unavailable.
        """
        try:
            answers = store.answerable(self.session.connection(), burns)
        except psycopg.Error as error:
            self.session.report(error)
            self._answerable_failed = True
            return [False] * len(burns)
        if self._answerable_failed:  # other trouble, such as a full disk, need not prevent reading
            self._answerable_failed = False
            self.session.report_available()
        return answers

    def unlocked(self, users: Sequence[str]) -> set[str]:
        """The accounts that were locked and can be had now; none while PostgreSQL is unavailable.

        A busy account is always locked, but by one transaction after another: a batch that waits for its lock gets it.
        So an account counts as unlocked, too, when its lock holder has changed.
        """
        try:
            holders = self._lock_holders(users)
        except psycopg.Error as error:
            self.session.report(error)
            return set()
        self.session.report_available()
        self._holders = {
            user_id: holder for user_id, holder in holders.items() if self._holders.get(user_id, holder) == holder
        }
        return set(users) - self._holders.keys()

    def probe(self) -> None:
        """Check whether PostgreSQL is available again, when no batch is left that would find out."""
        try:
            self.session.connection().execute("SELECT")
        except psycopg.Error as error:
            self.session.report(error)
        else:
            self.session.report_available()

    def _locked(self, users: Sequence[str]) -> set[str]:
        """The accounts that another session holds right now; none while PostgreSQL is unavailable."""
        try:
            holders = self._lock_holders(users)
        except psycopg.Error:
            return set()  # the next attempt meets the same error and reports it
        self._holders |= holders
        return set(holders)

    def _lock_holders(self, users: Sequence[str]) -> dict[str, str]:
        """The lock holder of each locked account. Inserts missing accounts first: only a row can be locked."""
        connection = self.session.connection()
        for pid in locks.terminate_frozen_sessions(connection, self._settings.idle_in_transaction_timeout):
            log.warning("ended the session of a worker that froze while it wrote", backend=pid)
        refused = locks.insert_missing_within(connection, users, INSERT_LOCK_TIMEOUT_SECONDS)
        holders = locks.lock_holders(connection, users)
        states = {user_id: holders.get(user_id, UNCOMMITTED_INSERT) for user_id in users if user_id not in refused}
        return {user_id: holder for user_id, holder in states.items() if holder is not None}
