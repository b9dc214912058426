"""One batch until it is decided: transient errors are waited out, and a refused batch is bisected.

n events with k culprits take some 2 k log n transactions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import psycopg
import structlog

from schema.reasons import DeadLetterReason

from .dead_letters import NewDeadLetter
from .deliveries import Delivery
from .errors import LOCK_NOT_AVAILABLE, MAX_CULPRITS, SuspiciousBatch, blames_event
from .outcomes import DeadLettered, Locked, Outcome
from .session import FIRST_PAUSE_SECONDS, Session, first_line

log = structlog.get_logger(__name__)


class Bisection:
    """Settles one batch, in parts where it must be cut. Within an account the order of events is kept."""

    def __init__(
        self, session: Session, locked_among: Callable[[Sequence[str]], set[str]], *, leave_locked: bool
    ) -> None:
        self._session = session
        self._locked_among = locked_among
        self._leave_locked = leave_locked
        self._left: set[str] = set()  # locked accounts, whose events are left undecided from then on
        self._culprits: list[NewDeadLetter] = []

    def run(self, deliveries: Sequence[Delivery], letters: Sequence[NewDeadLetter]) -> list[Outcome]:
        """The outcome of each delivery. The culprits are written last, when it is known that they are few enough."""
        outcomes = self._settle(deliveries, letters)
        if self._culprits:
            self._settle([], self._culprits)
        return outcomes

    def _settle(self, deliveries: Sequence[Delivery], letters: Sequence[NewDeadLetter]) -> list[Outcome]:
        """Decide the deliveries in their order: in one transaction, or in parts if that does not go through."""
        # An account that was left stays left, even if it is free by now: its earlier events are undecided.
        if self._left and any(delivery.event.user_id in self._left for delivery in deliveries):
            return self._without(self._left, deliveries, letters)
        pause = FIRST_PAUSE_SECONDS
        while True:
            self._session.wait_for_connection()
            try:
                return self._session.attempt(deliveries, letters)
            except Exception as error:
                if blames_event(error):
                    return self._bisect(deliveries, letters, error)
                if not isinstance(error, psycopg.Error):
                    raise
                locked = self._locked_users(deliveries) if error.sqlstate == LOCK_NOT_AVAILABLE else set()
                if locked and (self._leave_locked or any(each.event.user_id not in locked for each in deliveries)):
                    return self._without(locked, deliveries, letters)
                pause = self._session.wait(error, pause)

    def _bisect(
        self, deliveries: Sequence[Delivery], letters: Sequence[NewDeadLetter], error: Exception
    ) -> list[Outcome]:
        """Settle two smaller parts of a batch that was refused; a single delivery is the culprit."""
        if letters and deliveries:
            self._settle([], letters)
            return self._settle(deliveries, [])
        if len(deliveries) > 1:
            middle = len(deliveries) // 2
            return self._settle(deliveries[:middle], []) + self._settle(deliveries[middle:], [])
        if len(letters) > 1:
            middle = len(letters) // 2
            return self._settle([], letters[:middle]) + self._settle([], letters[middle:])
        if not deliveries:
            # The letter itself cannot be written: a bug of tokentrail, over which the message must not be lost.
            reason = letters[0].reason if letters else "none"
            raise SuspiciousBatch(1, f"a dead letter ({reason}): {first_line(error)}")
        return [self._condemn(deliveries[0], error)]

    def _condemn(self, delivery: Delivery, error: Exception) -> Outcome:
        """Note the culprit, to be written as a dead letter. Raises SuspiciousBatch if there are too many."""
        reason: DeadLetterReason = "refused_by_database" if isinstance(error, psycopg.Error) else "internal_error"
        detail = first_line(error)
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
        return DeadLettered(reason, detail)

    def _locked_users(self, deliveries: Sequence[Delivery]) -> set[str]:
        """The locked accounts of a batch. Not worth the time when the batch is about to be requeued."""
        if self._session.stopping:
            return set()
        return self._locked_among(sorted({delivery.event.user_id for delivery in deliveries}))

    def _without(
        self, locked: AbstractSet[str], deliveries: Sequence[Delivery], letters: Sequence[NewDeadLetter]
    ) -> list[Outcome]:
        """Settle the events of other accounts first; then leave those of locked accounts, or wait for the locks."""
        locked = frozenset(locked)
        if self._leave_locked:
            self._left |= locked
        free = [delivery for delivery in deliveries if delivery.event.user_id not in locked]
        waiting = [delivery for delivery in deliveries if delivery.event.user_id in locked]
        free_outcomes = iter(self._settle(free, letters) if free or letters else [])
        waiting_outcomes = iter(
            [Locked(delivery.event.user_id) for delivery in waiting]
            if self._leave_locked
            else self._settle(waiting, [])
        )
        return [
            next(waiting_outcomes if delivery.event.user_id in locked else free_outcomes) for delivery in deliveries
        ]
