"""The canonical form of records and rejections, and the hash that chains each to its predecessor.

Version 1. Every field is its length in bytes, a colon and its text (`~` alone for NULL), in a fixed order, and the
whole is UTF-8: no two different records share a form. Numbers have exactly 18 decimals, times are microseconds since
1970, hashes are hex, metadata is its canonical JSON text. Each form ends with the predecessor's hash, so that
changing, removing or inserting a record breaks every hash after it. `RECORD_FORM` and `REJECTION_FORM` are the same
forms as SQL expressions: PostgreSQL alone can recompute a chain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Final

from schema.events import Accrual, Event

VERSION: Final = 1

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_NULL: Final = "~"


def payload_hash(event: Event) -> bytes:
    """sha256 over the content of an event, which must be the same whenever its key is used again.

    An absent field is left out, so that a field added later changes no hash of events without it.
    """
    kind = "source" if isinstance(event, Accrual) else "action"
    content = [event.type, event.user_id, money(event.amount), kind, event.purpose]
    if event.metadata is not None:
        content += ("metadata", event.metadata)
    if event.occurred_at is not None:
        content += ("occurred_at", micros(event.occurred_at))
    return _sha256(content)


def record_hash(
    event: Event,
    sequence: int,
    amount: str,
    before: str,
    after: str,
    created_at: str,
    payload: bytes,
    predecessor: bytes | None,
) -> bytes:
    """The hash of an account's record `sequence`. Money as `money` writes it, time as `micros` does."""
    closing = (before, after, created_at, payload.hex(), None if predecessor is None else predecessor.hex())
    return _sha256((*_of_event(event, sequence, amount), *closing))


def rejection_hash(
    event: Event,
    number: int,
    amount: str,
    reason: str,
    balance: str,
    created_at: str,
    payload: bytes,
    predecessor: bytes | None,
) -> bytes:
    """The hash of an account's rejection `number`."""
    closing = (reason, balance, created_at, payload.hex(), None if predecessor is None else predecessor.hex())
    return _sha256((*_of_event(event, number, amount), *closing))


def money(amount: Decimal) -> str:
    """An amount as NUMERIC(38,18) prints it: always 18 decimals."""
    return format(amount, ".18f")


def micros(moment: datetime) -> str:
    """Microseconds since 1970, exact."""
    return str((moment - _EPOCH) // _MICROSECOND)


def _of_event(event: Event, number: int, amount: str) -> tuple[str | None, ...]:
    occurred_at = None if event.occurred_at is None else micros(event.occurred_at)
    return (
        event.user_id,
        str(number),
        event.idempotency_key,
        event.type,
        amount,
        event.purpose,
        event.metadata,
        occurred_at,
    )


def _sha256(fields: Sequence[str | None]) -> bytes:
    """The hash of the fields' form."""
    form = "".join([_NULL if text is None else f"{len(text)}:{text}" for text in fields])
    if not form.isascii():  # then some text has more bytes than characters
        form = "".join([_NULL if text is None else f"{len(text.encode())}:{text}" for text in fields])
    return hashlib.sha256(form.encode()).digest()


def _sql(*expressions: str) -> str:
    fields = ", ".join(f"coalesce(octet_length({x}) || ':' || ({x}), '{_NULL}')" for x in expressions)
    return f"sha256(convert_to(concat({fields}), 'UTF8'))"


def _sql_micros(column: str) -> str:
    return f"(extract(epoch FROM {column}) * 1000000)::bigint::text"


def _sql_event(number: str, what: str) -> tuple[str, ...]:
    return (
        "r.user_id",
        f"r.{number}::text",
        "r.idempotency_key",
        "r.type",
        "r.amount::text",
        what,
        "r.metadata::text",
        _sql_micros("r.occurred_at"),
    )


#: The hash of row `r` of transaction_record with detail rows `a` and `b` and the predecessor's hash `previous`.
RECORD_FORM: Final = _sql(
    *_sql_event("sequence", "CASE r.type WHEN 'accrual' THEN a.source ELSE b.action END"),
    "r.balance_before::text",
    "r.balance_after::text",
    _sql_micros("r.created_at"),
    "encode(r.payload_hash, 'hex')",
    "encode(previous, 'hex')",
)

#: The hash of row `r` of rejected_event with the predecessor's hash `previous`.
REJECTION_FORM: Final = _sql(
    *_sql_event("number", "coalesce(r.source, r.action)"),
    "r.reason",
    "r.balance::text",
    _sql_micros("r.created_at"),
    "encode(r.payload_hash, 'hex')",
    "encode(previous, 'hex')",
)

#: The payload hash of `r`, a row with source and action beside it: absent fields are left out, not NULL.
PAYLOAD_FORM: Final = "sha256(convert_to(concat({}), 'UTF8'))".format(
    ", ".join(
        f"octet_length({x}) || ':' || ({x})"
        for x in (
            "r.type",
            "r.user_id",
            "r.amount::text",
            "CASE r.type WHEN 'accrual' THEN 'source' ELSE 'action' END",
            "CASE r.type WHEN 'accrual' THEN r.source ELSE r.action END",
            "CASE WHEN r.metadata IS NOT NULL THEN 'metadata' END",
            "r.metadata::text",
            "CASE WHEN r.occurred_at IS NOT NULL THEN 'occurred_at' END",
            _sql_micros("r.occurred_at"),
        )
    )
)
