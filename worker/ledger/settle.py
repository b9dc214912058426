"""A batch until it is decided: "not now" is waited out, an event's own fault is singled out.

Only what an event itself can cause ends in a dead letter; a database that is away, full, read-only or locked does
not, however long it lasts. So an answer is always about the event, and never about the weather.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

import psycopg
import structlog

from schema.reasons import DeadLetterReason
from worker.config import Settings
from worker.db import connect

from . import store
from .apply import apply_batch
from .dead_letters import NewDeadLetter
from .deliveries import Delivery
from .errors import LOCK_NOT_AVAILABLE, MAX_CULPRITS, Interrupted, SuspiciousBatch, caused_by_event
from .outcomes import DeadLettered, Locked, Outcome

log = structlog.get_logger(__name__)

FIRST_PAUSE: Final = 0.05  # seconds before the second try; doubles, with jitter
LONGEST_PAUSE: Final = 5.0  # seconds

#: Seconds that the server's own word on a statement that took too long may need to reach us.
ANSWER_MARGIN: Final = 5.0

#: Seconds to wait for somebody who is opening the same account, before it counts as locked.
OPENING: Final = 0.02

#: Whose hands an account is in that somebody is opening.
_OPENED: Final = "not committed"

#: Troubles between transactions, after which the same session is as good as before: class 40 and a lock timeout.
#: After any other a new one is made, for the old one may be the trouble: a primary that has become a read-only
#: standby keeps its sessions.
_OF_THE_MOMENT: Final = ("40", LOCK_NOT_AVAILABLE)

#: Bugs that one event's content can trigger. Anything else in Python (memory, files) says nothing about the event.
_OUR_BUGS: Final = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


class Ledger:
    """One database connection that decides batches, one at a time, for as long as it takes.

    `stop` interrupts waiting; `degraded` is told a sentence when waiting begins and None when it is over.
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
        self._stripe = stripe
        self._stop = stop or threading.Event()
        self._degraded = degraded
        self._connection: psycopg.Connection[Any] | None = None
        self._batches = 0  # of this connection
        self._trouble: str | None = None
        self._blind = False  # the last look at what accounts hold failed
        self._holders: dict[str, str] = {}  # in which transaction's hands each locked account was last seen

    def settle(
        self, deliveries: Sequence[Delivery], letters: Sequence[NewDeadLetter] = (), *, leave_locked: bool = False
    ) -> list[Outcome]:
        """The outcome of each delivery, durable; the letters are kept.

        Accounts that somebody else keeps locked hold up nobody else's events. Theirs are waited for, or with
        `leave_locked` come back as Locked, to be settled again when `unlocked` names the account.
        Raises Interrupted when stopped while waiting, and SuspiciousBatch when the database refuses more than
        MAX_CULPRITS of the events. All deliveries must then be delivered again: what was decided stays decided,
        and no event has become a dead letter for the database's refusal.
        """
        outcomes = _Settlement(self, leave_locked).run(list(deliveries), list(letters))
        self._recovered()
        return outcomes

    def close(self) -> None:
        """Close the connection; the ledger opens another when it is used again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def connection(self) -> psycopg.Connection[Any]:
        """The open connection, or a new one. What goes wrong here says nothing about any event."""
        if self._connection is None or self._connection.closed:
            limit = self._settings.statement_timeout + ANSWER_MARGIN
            self._connection = connect(self._settings.database(), self._settings, answer_within=limit)
            self._batches = 0
        return self._connection

    def attempt(self, deliveries: Sequence[Delivery], letters: Sequence[NewDeadLetter]) -> list[Outcome]:
        """One transaction, once. Raises whatever goes wrong."""
        connection = self.connection()
        self._batches += 1
        if self._batches & (self._batches - 1) == 0:
            # Before batch 1, 2, 4, 8 …: PostgreSQL keeps the foreign keys' plans for the session, and one made while
            # the tables were empty reads all records of the user for each new one.
            connection.execute("DISCARD PLANS")
        return apply_batch(connection, deliveries, stripe=self._stripe, letters=letters)

    def covered(self, burns: Sequence[Delivery]) -> list[bool]:
        """Whether there is an answer for each burn right now, as its account holds enough or another delivery of it was
        decided. No locks, no promise; all False while nobody can know.
        """
        try:
            found = store.covered(self.connection(), burns)
        except psycopg.Error as error:
            self._say(error)
            self._blind = True
            return [False] * len(burns)
        if self._blind:  # else the trouble may be one that does not keep anybody from reading
            self._blind = False
            self._recovered()
        return found

    def locked(self, users: Sequence[str]) -> set[str]:
        """Those of the accounts that somebody holds right now; none while nobody can know."""
        try:
            held = self._held(users)
        except psycopg.Error:
            return set()  # the next try meets the same trouble and names it
        self._holders |= held
        return set(held)

    def unlocked(self, users: Sequence[str]) -> set[str]:
        """Those of the accounts that were found locked and can be had now; none while nobody can know.

        A busy account is never without a lock, only in ever other hands: who stands in line for it gets it.
        """
        try:
            held = self._held(users)
        except psycopg.Error as error:
            self._say(error)
            return set()
        self._recovered()
        stuck = {user_id: holder for user_id, holder in held.items() if self._holders.get(user_id, holder) == holder}
        self._holders = stuck
        return {user_id for user_id in users if user_id not in stuck}

    def probe(self) -> None:
        """Find out whether the trouble that there was is over, where no event is left that would meet it."""
        try:
            self.connection().execute("SELECT")
        except psycopg.Error as error:
            self._say(error)
        else:
            self._recovered()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def _held(self, users: Sequence[str]) -> dict[str, str]:
        """In whose hands those of the accounts are that are in somebody's. They are opened, so that they can be."""
        self._end_frozen()
        refused = store.open_accounts_within(self.connection(), users, OPENING)
        found = store.holders(self.connection(), users)
        holders = {user_id: found.get(user_id, _OPENED) for user_id in users if user_id not in refused}
        return {user_id: holder for user_id, holder in holders.items() if holder is not None}

    def _end_frozen(self) -> None:
        """End whoever holds locks in a session that PostgreSQL does not end."""
        for pid in store.end_frozen(self.connection(), self._settings.idle_in_transaction_timeout):
            log.warning("ended the session of a worker that froze while it wrote", backend=pid)

    def not_now(self, error: psycopg.Error, pause: float) -> None:
        """Wait before the next try. Says so once, however many tries it takes."""
        trouble = self._say(error)
        if self._stop.wait(random.uniform(pause / 2, pause)):  # noqa: S311 - jitter
            raise Interrupted(f"stopped while waiting: {trouble}")

    def _say(self, error: psycopg.Error) -> str:
        """What the trouble is, said once. The session that met it is not used again, unless it is as good as before."""
        if error.sqlstate is None or not error.sqlstate.startswith(_OF_THE_MOMENT):
            self.close()
        trouble = _sentence(error)
        if self._trouble is None:
            log.warning("database not available, keeping messages and trying again", reason=trouble)
        if self._trouble != trouble:
            self._trouble = trouble
            self._degraded(trouble)
        return trouble

    def _recovered(self) -> None:
        if self._trouble is not None:
            log.info("database available again", was=self._trouble)
            self._trouble = None
            self._degraded(None)


class _Settlement:
    """One call of Ledger.settle: a batch, cut where it must be."""

    def __init__(self, ledger: Ledger, leave_locked: bool) -> None:
        self._ledger = ledger
        self._leave_locked = leave_locked
        self._locked: set[str] = set()  # accounts whose events are left
        self._culprits: list[NewDeadLetter] = []

    def run(self, deliveries: list[Delivery], letters: list[NewDeadLetter]) -> list[Outcome]:
        """Settle all, then keep the culprits: not before it is known that they are few enough to be just that."""
        outcomes = self.settle(deliveries, letters)
        if self._culprits:
            self.settle([], self._culprits)
        return outcomes

    def settle(self, deliveries: list[Delivery], letters: list[NewDeadLetter]) -> list[Outcome]:
        """Decide the deliveries in their order, cutting the batch in halves until each part goes through."""
        # Also where they come free meanwhile: of an account's events none is decided before an earlier one.
        if places := _of_users(deliveries, self._locked):
            return self._locked_last(deliveries, letters, places)
        pause = FIRST_PAUSE
        while True:
            try:
                self._ledger.connection()
            except psycopg.Error as error:
                self._ledger.not_now(error, pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            try:
                return self._ledger.attempt(deliveries, letters)
            except psycopg.Error as error:
                if caused_by_event(error.sqlstate) or (error.sqlstate is None and isinstance(error, _CLIENT_SIDE)):
                    return self._halve(deliveries, letters, error)
                places = self._locked_places(deliveries) if error.sqlstate == LOCK_NOT_AVAILABLE else []
                if places and (self._leave_locked or len(places) < len(deliveries)):
                    return self._locked_last(deliveries, letters, places)
                self._ledger.not_now(error, pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            except _OUR_BUGS as bug:
                return self._halve(deliveries, letters, bug)

    def _halve(self, deliveries: list[Delivery], letters: list[NewDeadLetter], error: Exception) -> list[Outcome]:
        """Single out whom the error is about: n events and k culprits take some 2 k log n transactions."""
        if len(deliveries) + len(letters) <= 1:
            return self._sentence_culprit(deliveries, letters, error)
        if not deliveries:
            middle = len(letters) // 2
            return self.settle([], letters[:middle]) + self.settle([], letters[middle:])
        if letters:
            self.settle([], letters)
            return self.settle(deliveries, [])
        middle = len(deliveries) // 2
        return self.settle(deliveries[:middle], []) + self.settle(deliveries[middle:], [])

    def _sentence_culprit(
        self, deliveries: list[Delivery], letters: list[NewDeadLetter], error: Exception
    ) -> list[Outcome]:
        if not deliveries:
            # The letter itself cannot be written: a bug of ours, and the message must not be lost over it.
            raise SuspiciousBatch(1, f"a dead letter ({letters[0].reason if letters else 'none'}): {_sentence(error)}")
        delivery = deliveries[0]
        reason: DeadLetterReason = "refused_by_database" if isinstance(error, psycopg.Error) else "internal_error"
        detail = _sentence(error)
        self._culprits.append(NewDeadLetter.of_event(reason, detail, delivery.event, delivery.origin))
        if len(self._culprits) > MAX_CULPRITS:
            raise SuspiciousBatch(len(self._culprits), self._culprits[0].detail)
        log.warning(
            "event refused, to be kept as a dead letter",
            reason=reason,
            detail=detail,
            user_id=delivery.event.user_id,
            idempotency_key=delivery.event.idempotency_key,
        )
        return [DeadLettered(reason, detail)]

    def _locked_places(self, deliveries: list[Delivery]) -> list[int]:
        """The places of the deliveries whose accounts are locked. Not worth the time where all is to be put back."""
        if self._ledger.stopping:
            return []
        users = sorted({delivery.event.user_id for delivery in deliveries})
        return _of_users(deliveries, self._ledger.locked(users))

    def _locked_last(
        self, deliveries: list[Delivery], letters: list[NewDeadLetter], places: list[int]
    ) -> list[Outcome]:
        """Decide what can be decided, then those at `places`, whose accounts are locked, unless they are left.
        Order within each account is kept.
        """
        if self._leave_locked:
            self._locked.update(deliveries[place].event.user_id for place in places)
        late = set(places)
        early = [place for place in range(len(deliveries)) if place not in late]
        outcomes: dict[int, Outcome] = {}
        if early or letters:
            outcomes.update(zip(early, self.settle([deliveries[place] for place in early], letters), strict=True))
        if self._leave_locked:
            outcomes.update((place, Locked(deliveries[place].event.user_id)) for place in places)
        else:
            last = self.settle([deliveries[place] for place in places], [])
            outcomes.update(zip(places, last, strict=True))
        return [outcomes[place] for place in range(len(deliveries))]


def _of_users(deliveries: Sequence[Delivery], users: AbstractSet[str]) -> list[int]:
    """The places of the deliveries that concern these accounts."""
    return [place for place, delivery in enumerate(deliveries) if delivery.event.user_id in users] if users else []


#: What psycopg itself refuses to send, without asking the server.
_CLIENT_SIDE: Final = (psycopg.DataError, psycopg.ProgrammingError, psycopg.NotSupportedError)


def _sentence(error: Exception) -> str:
    """The first line of an error, with its SQLSTATE."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, psycopg.Error):
        return f"{text} [{error.sqlstate}]" if error.sqlstate else text
    return f"{type(error).__name__}: {text}"
