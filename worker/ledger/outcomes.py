"""The outcomes of a delivery. `str()` of each is the short line that Flower shows."""

from __future__ import annotations

from decimal import Decimal
from typing import NamedTuple, TypeAlias

from schema.canonical import plain_number

from .rules import Reason


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
    """The event was rejected for good, as rejection `number` of its account."""

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
    """The balance was too small, and the burn may be tried again (IfShort). Nothing was written."""

    balance: Decimal

    def __str__(self) -> str:
        return f"undecided: {plain_number(self.balance)} held"


class Locked(NamedTuple):
    """Another session holds the account's row lock, and the event was left for later. Nothing was written."""

    user_id: str

    def __str__(self) -> str:
        return f"locked: {self.user_id} another session holds its row lock"


class DeadLettered(NamedTuple):
    """The event has no outcome; its message is stored as a dead letter."""

    reason: str
    detail: str

    def __str__(self) -> str:
        return f"dead letter ({self.reason}): {self.detail}"


Decision: TypeAlias = Applied | Rejected
Outcome: TypeAlias = Applied | Rejected | Undecided | Locked | DeadLettered
