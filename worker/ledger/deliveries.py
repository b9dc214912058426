"""The input of the ledger: deliveries of events, and the messages they came in."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from schema.events import Event
from schema.reasons import DeadLetterReason

from .chain import payload_hash


class IfShort(Enum):
    """What to do with a burn whose account holds too little."""

    WAIT = "wait"  # undecided, nothing is written: its accrual may still arrive
    REJECT_UNLESS_CONTENDED = "reject unless contended"  # undecided if the batch waited for row locks, else rejected
    REJECT = "reject"


class Origin(NamedTuple):
    """The message that a delivery came in, as a dead letter stores it."""

    task: str | None = None
    message_id: str | None = None
    body: bytes = b""
    headers: Mapping[str, Any] | None = None
    event_index: int | None = None  # place in a bulk message
    replay_of: int | None = None  # the dead letter that the message claims to replay; any producer can claim it

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
    #: Reason and sentence of the dead letter to write, unless an earlier delivery of the event was decided.
    refusal: tuple[DeadLetterReason, str] | None = None

    @classmethod
    def of(cls, event: Event, origin: Origin | None = None, *, if_short: IfShort = IfShort.REJECT) -> Delivery:
        """Hashes the event's content, so that no lock is held meanwhile."""
        return cls(event, payload_hash(event), origin or Origin(), if_short)

    @property
    def key(self) -> tuple[str, str]:
        """User id and idempotency key."""
        return self.event.user_id, self.event.idempotency_key
