"""What goes into the ledger, and the answers that come out: each reads as one short line, as Flower shows it."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple, TypeAlias

from schema.canonical import plain_number
from schema.events import Event
from schema.reasons import DeadLetterReason

from .chain import payload_hash
from .rules import Reason


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
    #: Whether too small a balance is the final answer. If not, the burn stays undecided and nothing is written.
    final: bool
    #: Reason and sentence of the dead letter it becomes, unless it was decided by an earlier delivery.
    refusal: tuple[DeadLetterReason, str] | None = None
    #: Whether that answer is final only if its batch did not have to stand in line for its accounts.
    prompt: bool = False

    @classmethod
    def of(cls, event: Event, origin: Origin | None = None, *, final: bool = True) -> Delivery:
        """Hashes the event's content, so that no lock is held meanwhile."""
        return cls(event, payload_hash(event), origin or Origin(), final)


class Applied(NamedTuple):
    """The event is record `sequence` of its account."""

    sequence: int
    balance_before: Decimal
    balance_after: Decimal
    repeated: bool = False  # decided by an earlier delivery

    def __str__(self) -> str:
        again = " (again)" if self.repeated else ""
        return (
            f"applied #{self.sequence}: {plain_number(self.balance_before)} → {plain_number(self.balance_after)}{again}"
        )


class Rejected(NamedTuple):
    """The event was refused for good; it is rejection `number` of its account."""

    number: int
    reason: Reason
    balance: Decimal
    amount: Decimal
    repeated: bool = False

    def __str__(self) -> str:
        held, asked = plain_number(self.balance), plain_number(self.amount)
        again = " (again)" if self.repeated else ""
        if self.reason is Reason.INSUFFICIENT_TOKENS:
            return f"rejected: insufficient tokens, {held} held, {asked} asked{again}"
        return f"rejected: balance limit, {held} held, {asked} more would pass 20 digits{again}"


class Undecided(NamedTuple):
    """The burn met too small a balance, and its caller wants to try again. Nothing was written."""

    balance: Decimal

    def __str__(self) -> str:
        return f"undecided: {plain_number(self.balance)} held"


class Locked(NamedTuple):
    """Somebody else keeps the account locked, and the caller wants to go on without it. Nothing was written."""

    user_id: str

    def __str__(self) -> str:
        return f"locked: {self.user_id} is in another session's hands"


class DeadLettered(NamedTuple):
    """The message has no outcome; it is kept whole among the dead letters."""

    reason: str
    detail: str

    def __str__(self) -> str:
        return f"dead letter ({self.reason}): {self.detail}"


Decision: TypeAlias = Applied | Rejected
Outcome: TypeAlias = Applied | Rejected | Undecided | Locked | DeadLettered
