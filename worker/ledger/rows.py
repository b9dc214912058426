"""The rows that the ledger writes. The fields of a row are the columns of its table, under the same names.

Amounts and times are text, as both COPY and the hash chain need them. For every event apply.py calls `__new__` itself:
with keywords, calling a NamedTuple takes more than twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final, NamedTuple, TypeAlias


class TransactionRow(NamedTuple):
    """A record: an event that was applied."""

    user_id: str
    sequence: int
    idempotency_key: str
    type: str
    amount: str
    balance_before: str
    balance_after: str
    metadata: str | None
    occurred_at: str | None
    created_at: str
    payload_hash: bytes
    hash: bytes
    hash_version: int


class AccrualRow(NamedTuple):
    """What is recorded of an accrual besides."""

    user_id: str
    sequence: int
    amount: str
    source: str
    created_at: str


class BurnedRow(NamedTuple):
    """What is recorded of a burn besides."""

    user_id: str
    sequence: int
    amount: str
    action: str
    balance_before: str
    balance_after: str
    created_at: str


class RejectedRow(NamedTuple):
    """A rejection: an event that was refused for good."""

    user_id: str
    number: int
    idempotency_key: str
    type: str
    amount: str
    source: str | None
    action: str | None
    metadata: str | None
    occurred_at: str | None
    created_at: str
    reason: str
    balance: str
    payload_hash: bytes
    hash: bytes
    hash_version: int


Row: TypeAlias = TransactionRow | AccrualRow | BurnedRow | RejectedRow

#: The tables that a batch appends to, in the order that their foreign keys need.
APPENDED: Final[dict[str, type[Row]]] = {
    "transaction_record": TransactionRow,
    "accrual_record": AccrualRow,
    "burned_credit": BurnedRow,
    "rejected_event": RejectedRow,
}


@dataclass(slots=True)
class Account:
    """A locked row of account, which the batch changes."""

    user_id: str
    balance: Decimal
    opening_balance: Decimal | None
    sequence: int
    head_hash: bytes | None
    rejections: int
    rejection_head: bytes | None
    last_recorded_at: datetime | None


@dataclass(slots=True)
class Flow:
    """What a batch adds to one hour of token_flow."""

    issued: Decimal = Decimal(0)
    burned: Decimal = Decimal(0)
    accruals: int = 0
    burns: int = 0
    rejections: int = 0
