"""The answers that an event can get: each reads as one short line, as Flower shows it."""

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
