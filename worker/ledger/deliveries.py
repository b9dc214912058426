"""What goes into the ledger: one arrival of an event, and the message it came in."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from schema.events import Event
from schema.reasons import DeadLetterReason

from .chain import payload_hash


class IfShort(Enum):
    """What becomes of a burn whose account holds too little."""

    WAIT = "wait"  # undecided, nothing is written: its accrual may still be on its way
    REJECT_UNLESS_CONTENDED = "reject unless contended"  # undecided if the batch waited for row locks, else rejected
    REJECT = "reject"


class Origin(NamedTuple):
    """The message a delivery came in: what a dead letter keeps of it."""

    task: str | None = None
    message_id: str | None = None
    body: bytes = b""
    headers: Mapping[str, Any] | None = None
    event_index: int | None = None  # place in a bulk message
    replay_of: int | None = None  # the dead letter it says it is a replay of: a hint, for anyone can say so

    def at(self, index: int) -> Origin:
        """The same message, at its event `index`."""
        # Written out: _replace takes four times as long, and a message may hold a thousand events.
        return Origin(self.task, self.message_id, self.body, self.headers, index, self.replay_of)


class Delivery(NamedTuple):
    """One arrival of an event, ready to be decided."""

    event: Event
    payload_hash: bytes
    origin: Origin
    if_short: IfShort
    #: Reason and sentence of the dead letter it becomes, unless it was decided by an earlier delivery.
    refusal: tuple[DeadLetterReason, str] | None = None

    @classmethod
    def of(cls, event: Event, origin: Origin | None = None, *, if_short: IfShort = IfShort.REJECT) -> Delivery:
        """Hashes the event's content, so that no lock is held meanwhile."""
        return cls(event, payload_hash(event), origin or Origin(), if_short)
