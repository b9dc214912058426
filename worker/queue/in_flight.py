"""A message in flight, and the parts of it that go into batches."""

from __future__ import annotations

from dataclasses import dataclass

from celery.worker.request import Request
from kombu.message import Message

from worker.ledger.dead_letters import NewDeadLetter
from worker.ledger.deliveries import Delivery, IfShort
from worker.ledger.outcomes import Applied, DeadLettered, Outcome, Rejected

#: Restores after which a message is suspected to kill its workers, and is applied alone.
SUSPECT_RESTORES = 2


@dataclass(slots=True, eq=False)
class InFlight:
    """A message from its arrival to its acknowledgement, with an outcome for each of its events."""

    kombu_message: Message
    number: int  # in order of arrival
    size: int  # bytes, headers included
    task: str
    task_id: str
    bulk: bool
    letters: list[NewDeadLetter]  # dead letters that are still to be written
    outcomes: list[Outcome | None]
    arguments: str = "{}"  # as Flower shows them
    request: Request | None = None
    restores: int = 0
    solo_attempts: int = 0  # of this worker
    released: bool = False

    @property
    def complete(self) -> bool:
        """Whether each of its events has an outcome."""
        return None not in self.outcomes

    @property
    def suspect(self) -> bool:
        """Whether it was in flight in so many dead workers that it may be what killed them."""
        return self.restores >= SUSPECT_RESTORES

    def result(self) -> tuple[bool, str]:
        """Whether any of its events was applied or rejected, and the result as Flower shows it."""
        if not self.bulk:
            outcome = self.outcomes[0]
            return not isinstance(outcome, DeadLettered), str(outcome)
        counts = {
            "applied": sum(isinstance(outcome, Applied) for outcome in self.outcomes),
            "rejected": sum(isinstance(outcome, Rejected) for outcome in self.outcomes),
            "dead-lettered": sum(isinstance(outcome, DeadLettered) for outcome in self.outcomes),
        }
        text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        if counts["dead-lettered"] < len(self.outcomes):
            return True, text
        return False, f"{text}, the first: {self.outcomes[0]}"


@dataclass(slots=True, eq=False)
class Part:
    """What of one message goes into one batch: all of it, or one event that was parked."""

    message: InFlight
    deliveries: list[Delivery]
    #: When a parked burn's patience is over, by time.monotonic(); None before its first insufficient balance.
    deadline: float | None = None
    #: Whether the event had to wait for a row lock before. Then its patience is longer, and its last try is final.
    was_contended: bool = False

    @property
    def rows(self) -> int:
        """How many rows it may write; a dead letter is one like an event."""
        return len(self.deliveries) + len(self.message.letters)

    @property
    def user_id(self) -> str:
        """The account of a parked part, which has one event."""
        return self.deliveries[0].event.user_id

    def give_last_try(self) -> None:
        """Let an insufficient balance reject the burn next time.

        A batch that had to wait for row locks is an exception, for the accrual may have waited for the same lock. That
        exception is made once: an account that many sessions use is contended nearly always.
        """
        if_short = IfShort.REJECT if self.was_contended else IfShort.REJECT_UNLESS_CONTENDED
        self.deliveries = [delivery._replace(if_short=if_short) for delivery in self.deliveries]
