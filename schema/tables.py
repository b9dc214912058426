"""The tables in PostgreSQL: the constraints are the specification.

`account`, `burned_credit` and `global_token_balance` are older than the audit trail. The columns that the trail added
stay NULL (counts: 0) in legacy rows. Every unique key of a table that grows starts with `user_id`, so that the tables
can be distributed or partitioned by user later; the exception is `dead_letter`, whose user may be unknown. Constraint
names come from NAMING. A test compares models, migrations and database.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any, ClassVar, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from .reasons import DEAD_LETTER_REASONS, DEAD_LETTER_STATES, REJECTION_REASONS

NAMING: Final = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

#: Tokens: up to 20 digits before the point and 18 after it.
Money: Final = Numeric(38, 18)

#: Sums have no precision, so that none can overflow.
Sum: Final = Numeric()

#: Keys compare byte by byte: the same order and the same equality on every server and in Python.
Key: Final = Text(collation="C")

#: Audit tables: the database refuses UPDATE, DELETE and TRUNCATE of their rows.
APPEND_ONLY: Final = ("transaction_record", "accrual_record", "burned_credit", "rejected_event")


def _one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text,
        bytes: LargeBinary,
        int: BigInteger,
        Decimal: Money,
        datetime: DateTime(timezone=True),
    }


class Account(Base):
    """One user's tokens. A batch locks the row, so that the events of an account are decided one after the other."""

    __tablename__ = "account"
    __table_args__ = (
        CheckConstraint("balance >= 0", name="balance_not_negative"),
        CheckConstraint("sequence >= 0", name="sequence_not_negative"),
        CheckConstraint(
            "(sequence = 0) = (head_hash IS NULL) AND (sequence = 0) = (opening_balance IS NULL)",
            name="head_of_records",
        ),
        CheckConstraint("rejections >= 0 AND (rejections = 0) = (rejection_head IS NULL)", name="head_of_rejections"),
        # Room on the page for the next version of the row (HOT update), so that an update adds no index entry.
        {"postgresql_with": {"fillfactor": 70}},
    )

    user_id: Mapped[str] = mapped_column(Key, primary_key=True)
    balance: Mapped[Decimal] = mapped_column(server_default=text("0"))
    opening_balance: Mapped[Decimal | None]  # of the account, at the rejection before its first record
    sequence: Mapped[int] = mapped_column(server_default=text("0"))  # of its last record, so also the number of records
    head_hash: Mapped[bytes | None]  # hash of its last record
    rejections: Mapped[int] = mapped_column(server_default=text("0"))
    rejection_head: Mapped[bytes | None]
    last_recorded_at: Mapped[datetime | None]


class TransactionRecord(Base):
    """A record: one change of one balance, the n-th of its account. Never updated, never deleted."""

    __tablename__ = "transaction_record"
    __table_args__ = (
        PrimaryKeyConstraint("user_id", "sequence"),
        UniqueConstraint("user_id", "idempotency_key"),
        CheckConstraint("sequence > 0", name="sequence_from_one"),
        CheckConstraint("type IN ('accrual', 'burn')", name="type_known"),
        CheckConstraint("amount > 0", name="amount_positive"),
        CheckConstraint("balance_before >= 0 AND balance_after >= 0", name="balance_not_negative"),
        CheckConstraint(
            "balance_after = CASE type WHEN 'accrual' THEN balance_before + amount ELSE balance_before - amount END",
            name="balances_tie",
        ),
    )

    user_id: Mapped[str] = mapped_column(Key)
    sequence: Mapped[int]
    idempotency_key: Mapped[str] = mapped_column(Key)
    type: Mapped[str]
    amount: Mapped[Decimal]
    balance_before: Mapped[Decimal]
    balance_after: Mapped[Decimal]
    # json, not jsonb: the canonical text must come back as it was hashed.
    details: Mapped[Any | None] = mapped_column("metadata", JSON(none_as_null=True))
    occurred_at: Mapped[datetime | None]  # the producer's clock
    created_at: Mapped[datetime]  # the server's clock, read after the locks
    payload_hash: Mapped[bytes]
    hash: Mapped[bytes]
    hash_version: Mapped[int] = mapped_column(SmallInteger)


class AccrualRecord(Base):
    """What an accrual writes beside its transaction record: where the tokens came from."""

    __tablename__ = "accrual_record"
    __table_args__ = (
        PrimaryKeyConstraint("user_id", "sequence"),
        ForeignKeyConstraint(["user_id", "sequence"], ["transaction_record.user_id", "transaction_record.sequence"]),
        CheckConstraint("amount > 0", name="amount_positive"),
    )

    user_id: Mapped[str] = mapped_column(Key)
    sequence: Mapped[int]
    amount: Mapped[Decimal]
    source: Mapped[str]
    created_at: Mapped[datetime]


class BurnedCredit(Base):
    """What a burn writes beside its transaction record; legacy rows have neither sequence nor balances."""

    __tablename__ = "burned_credit"
    __table_args__ = (
        PrimaryKeyConstraint("user_id", "id"),
        ForeignKeyConstraint(["user_id", "sequence"], ["transaction_record.user_id", "transaction_record.sequence"]),
        CheckConstraint("amount > 0", name="amount_positive"),
        CheckConstraint(
            "(sequence IS NULL) = (balance_before IS NULL) AND (sequence IS NULL) = (balance_after IS NULL)",
            name="trail_all_or_nothing",
        ),
        CheckConstraint("balance_after >= 0 AND balance_after = balance_before - amount", name="balances_tie"),
        Index(
            "uq_burned_credit_user_id_sequence",
            "user_id",
            "sequence",
            unique=True,
            postgresql_where=text("sequence IS NOT NULL"),  # so it holds no legacy rows
        ),
    )

    user_id: Mapped[str] = mapped_column(Key)
    id: Mapped[int] = mapped_column(Identity(always=True))
    amount: Mapped[Decimal]
    action: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    sequence: Mapped[int | None]
    balance_before: Mapped[Decimal | None]
    balance_after: Mapped[Decimal | None]


class RejectedEvent(Base):
    """A rejection: the event as it came, the reason and the balance then; the n-th of its account."""

    __tablename__ = "rejected_event"
    __table_args__ = (
        PrimaryKeyConstraint("user_id", "number"),
        UniqueConstraint("user_id", "idempotency_key"),
        CheckConstraint("number > 0", name="number_from_one"),
        CheckConstraint("type IN ('accrual', 'burn')", name="type_known"),
        CheckConstraint(_one_of("reason", REJECTION_REASONS), name="reason_known"),
        CheckConstraint("amount > 0", name="amount_positive"),
        CheckConstraint(
            "(type = 'accrual') = (source IS NOT NULL) AND (type = 'burn') = (action IS NOT NULL)",
            name="what",
        ),
    )

    user_id: Mapped[str] = mapped_column(Key)
    number: Mapped[int]
    idempotency_key: Mapped[str] = mapped_column(Key)
    type: Mapped[str]
    amount: Mapped[Decimal]
    source: Mapped[str | None]
    action: Mapped[str | None]
    details: Mapped[Any | None] = mapped_column("metadata", JSON(none_as_null=True))
    occurred_at: Mapped[datetime | None]
    created_at: Mapped[datetime]
    reason: Mapped[str]
    balance: Mapped[Decimal]  # of the account, at the rejection
    payload_hash: Mapped[bytes]
    hash: Mapped[bytes]
    hash_version: Mapped[int] = mapped_column(SmallInteger)


class DeadLetter(Base):
    """A message without an outcome, stored with the reason. Repeated deliveries are counted and add no row."""

    __tablename__ = "dead_letter"
    __table_args__ = (
        UniqueConstraint("fingerprint"),
        CheckConstraint(_one_of("reason", DEAD_LETTER_REASONS), name="reason_known"),
        CheckConstraint(_one_of("state", DEAD_LETTER_STATES), name="state_known"),
        CheckConstraint("deliveries > 0", name="deliveries_from_one"),
        CheckConstraint(
            "state = 'open' OR state_changed_at IS NOT NULL AND state_changed_by IS NOT NULL",
            name="who_and_when",
        ),
        # Receipts select by key, operators by user. Letters without a user need no entry.
        Index(
            "ix_dead_letter_user_id_idempotency_key",
            "user_id",
            "idempotency_key",
            postgresql_where=text("user_id IS NOT NULL"),
        ),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    fingerprint: Mapped[bytes]  # sha256 of task, message id, body and the event's place in a bulk message
    reason: Mapped[str]
    detail: Mapped[str]  # one sentence
    task: Mapped[str | None]
    message_id: Mapped[str | None]
    event_index: Mapped[int | None] = mapped_column(Integer)  # place in tokens.apply_many; NULL: the whole message
    user_id: Mapped[str | None] = mapped_column(Key)
    idempotency_key: Mapped[str | None] = mapped_column(Key)
    event: Mapped[Any | None] = mapped_column(JSON(none_as_null=True))  # if the message can be parsed
    headers: Mapped[Any | None] = mapped_column(JSON(none_as_null=True))
    body: Mapped[bytes | None]  # the original bytes; NULL once purged
    first_seen_at: Mapped[datetime]
    last_seen_at: Mapped[datetime]
    deliveries: Mapped[int] = mapped_column(server_default=text("1"))
    state: Mapped[str] = mapped_column(server_default=text("'open'"))
    state_changed_at: Mapped[datetime | None]
    state_changed_by: Mapped[str | None]
    state_note: Mapped[str | None]
    replays: Mapped[int] = mapped_column(server_default=text("0"))
    purged_at: Mapped[datetime | None]


class GlobalTokenBalance(Base):
    """The supply: the legacy row as it was, and stripes that workers add to.

    Issued − burned since the audit trail began is the sum over the stripes. There are many because every batch locks
    one. Stripes have negative ids; the legacy row has an id from 0 up.
    """

    __tablename__ = "global_token_balance"
    __table_args__ = (
        CheckConstraint(
            "(issued IS NULL) = (burned IS NULL) AND (issued IS NULL OR balance = 0)",
            name="legacy_row_or_stripe",
        ),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    balance: Mapped[Decimal] = mapped_column(server_default=text("0"))  # of the legacy row; 0 in a stripe
    issued: Mapped[Decimal | None] = mapped_column(Sum)
    burned: Mapped[Decimal | None] = mapped_column(Sum)


class TokenFlow(Base):
    """Tokens that one stripe issued and burned in one UTC hour, by `created_at`."""

    __tablename__ = "token_flow"
    __table_args__ = (PrimaryKeyConstraint("hour", "stripe"),)

    hour: Mapped[datetime]
    stripe: Mapped[int] = mapped_column(Integer)
    issued: Mapped[Decimal] = mapped_column(Sum)
    burned: Mapped[Decimal] = mapped_column(Sum)
    accruals: Mapped[int]
    burns: Mapped[int]
    rejections: Mapped[int]
