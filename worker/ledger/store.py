"""The SQL of a batch besides its locks: each function is one statement, whatever the size of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple, TypeAlias
from zlib import crc32

from psycopg import Connection, Cursor

from schema.events import Accrual, Event

from .deliveries import Delivery
from .outcomes import Applied, Decision, Rejected
from .pgtext import array, copy_lines
from .rows import APPENDED, Account, Flow, Row
from .rules import Reason

#: User id and idempotency key.
Key: TypeAlias = tuple[str, str]


class Earlier(NamedTuple):
    """What a key was decided as."""

    payload_hash: bytes
    decision: Decision


class Content(NamedTuple):
    """What must be the same whenever a key is used again."""

    type: str
    amount: Decimal
    source: str | None
    action: str | None
    metadata: str | None
    occurred_at: datetime | None

    @classmethod
    def of(cls, event: Event) -> Content:
        return cls(
            type=event.type,
            amount=event.amount,
            source=event.source if isinstance(event, Accrual) else None,
            action=None if isinstance(event, Accrual) else event.action,
            metadata=event.metadata,
            occurred_at=event.occurred_at,
        )


def answerable(connection: Connection[Any], burns: Sequence[Delivery]) -> list[bool]:
    """Whether each burn's account holds its amount, or its key is decided, by another delivery; read without locks."""
    rows = connection.execute(
        """
        SELECT x.place
        FROM unnest(%s::text[], %s::text[], %s::numeric[]) WITH ORDINALITY AS x (user_id, key, amount, place)
        JOIN account a ON a.user_id = x.user_id
        WHERE a.balance >= x.amount
            OR EXISTS (SELECT FROM transaction_record t WHERE t.user_id = x.user_id AND t.idempotency_key = x.key)
            OR EXISTS (SELECT FROM rejected_event r WHERE r.user_id = x.user_id AND r.idempotency_key = x.key)
        """,
        (
            [burn.event.user_id for burn in burns],
            [burn.event.idempotency_key for burn in burns],
            [burn.event.amount for burn in burns],
        ),
    )
    places = {row[0] for row in rows}
    return [place in places for place in range(1, len(burns) + 1)]


def look_up(cursor: Cursor[Any], deliveries: Sequence[Delivery]) -> tuple[dict[Key, Earlier], datetime]:
    """What the deliveries' keys were decided as, and the clock.

    This must be a statement of its own, sent when the accounts are locked: the locking statement may have waited, and
    its snapshot and its clock are from before the wait.
    """
    cursor.execute(
        """
        SELECT clock.now, earlier.*
        FROM (SELECT clock_timestamp() AS now) AS clock
        LEFT JOIN (
            SELECT x.user_id, x.key, t.payload_hash, t.sequence AS number, NULL AS reason, t.balance_before AS balance,
                   t.balance_after, NULL::numeric AS amount
            FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (user_id, key)
            JOIN transaction_record t ON t.user_id = x.user_id AND t.idempotency_key = x.key
            UNION ALL
            SELECT x.user_id, x.key, r.payload_hash, r.number, r.reason, r.balance, NULL, r.amount
            FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (user_id, key)
            JOIN rejected_event r ON r.user_id = x.user_id AND r.idempotency_key = x.key
        ) AS earlier ON true
        """,
        {
            "users": array([delivery.event.user_id for delivery in deliveries]),
            "keys": array([delivery.event.idempotency_key for delivery in deliveries]),
        },
    )
    rows = cursor.fetchall()  # at least one, with the clock
    decided: dict[Key, Earlier] = {}
    for _, user_id, key, payload_hash, number, reason, balance, balance_after, amount in rows:
        if user_id is not None:
            decision: Decision = (
                Applied(number, balance, balance_after, repeated=True)
                if reason is None
                else Rejected(number, Reason(reason), balance, amount, repeated=True)
            )
            decided[user_id, key] = Earlier(payload_hash, decision)
    return decided, rows[0][0]


def contents(cursor: Cursor[Any], keys: Iterable[Key]) -> dict[Key, Content]:
    """The content that each key was decided with."""
    users, names = zip(*keys, strict=True)
    cursor.execute(
        """
        SELECT t.user_id, t.idempotency_key, t.type, t.amount, a.source, b.action, t.metadata::text, t.occurred_at
        FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (user_id, key)
        JOIN transaction_record t ON t.user_id = x.user_id AND t.idempotency_key = x.key
        LEFT JOIN accrual_record a ON a.user_id = t.user_id AND a.sequence = t.sequence
        LEFT JOIN burned_credit b ON b.user_id = t.user_id AND b.sequence = t.sequence
        UNION ALL
        SELECT r.user_id, r.idempotency_key, r.type, r.amount, r.source, r.action, r.metadata::text, r.occurred_at
        FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (user_id, key)
        JOIN rejected_event r ON r.user_id = x.user_id AND r.idempotency_key = x.key
        """,
        {"users": array(users), "keys": array(names)},
    )
    return {(user_id, key): Content(*content) for user_id, key, *content in cursor}


_COPY: Final[dict[type[Row], bytes]] = {
    row: f"COPY {table} ({', '.join(row._fields)}) FROM STDIN".encode() for table, row in APPENDED.items()
}


def append(cursor: Cursor[Any], rows: Sequence[Row]) -> None:
    """Append rows of one table to it."""
    with cursor.copy(_COPY[type(rows[0])]) as copy:
        copy.write(copy_lines(rows))


def update_accounts(cursor: Cursor[Any], accounts: Sequence[Account]) -> None:
    """Write the accounts back."""
    cursor.execute(
        """
        UPDATE account SET balance = x.balance, opening_balance = x.opening_balance, sequence = x.sequence,
            head_hash = x.head_hash, rejections = x.rejections, rejection_head = x.rejection_head,
            last_recorded_at = x.last_recorded_at
        FROM unnest(%(user_id)s::text[], %(balance)s::numeric[], %(opening_balance)s::numeric[],
                    %(sequence)s::bigint[], %(head_hash)s::bytea[], %(rejections)s::bigint[],
                    %(rejection_head)s::bytea[], %(last_recorded_at)s::timestamptz[])
            AS x (user_id, balance, opening_balance, sequence, head_hash, rejections, rejection_head, last_recorded_at)
        WHERE account.user_id = x.user_id
        """,
        {field.name: array([getattr(account, field.name) for account in accounts]) for field in fields(Account)},
    )


def stripe_of(host: str, pid: int, stripes: int) -> int:
    """The stripe (row id of global_token_balance) that a process adds to: negative, for legacy rows have ids from 0.

    Processes started one after the other on one host get different stripes; so, mostly, do containers, whose process
    ids are alike.
    """
    return -1 - (crc32(host.encode()) + pid) % stripes


def add_to_supply(cursor: Cursor[Any], stripe: int, issued: Decimal, burned: Decimal) -> None:
    """Add to one stripe of the global token balance; after the accounts, so that its lock is held briefly."""
    cursor.execute(
        """
        INSERT INTO global_token_balance AS stripe (id, issued, burned) VALUES (%s, %s, %s)
        ON CONFLICT (id) DO UPDATE SET
            issued = stripe.issued + excluded.issued, burned = stripe.burned + excluded.burned
        WHERE stripe.issued IS NOT NULL
        """,
        (stripe, issued, burned),
    )
    if cursor.rowcount != 1:
        raise RuntimeError(
            f"row {stripe} of global_token_balance is a legacy row and cannot be a stripe: give it another id"
        )


def add_to_hours(cursor: Cursor[Any], stripe: int, flows: Mapping[datetime, Flow]) -> None:
    """Add to what the stripe issued and burned hour by hour."""
    hours = sorted(flows)
    cursor.execute(
        """
        INSERT INTO token_flow AS flow (hour, stripe, issued, burned, accruals, burns, rejections)
        SELECT x.hour, %s, x.issued, x.burned, x.accruals, x.burns, x.rejections
        FROM unnest(%s::timestamptz[], %s::numeric[], %s::numeric[], %s::bigint[], %s::bigint[], %s::bigint[])
            AS x (hour, issued, burned, accruals, burns, rejections)
        ON CONFLICT (hour, stripe) DO UPDATE SET
            issued = flow.issued + excluded.issued, burned = flow.burned + excluded.burned,
            accruals = flow.accruals + excluded.accruals, burns = flow.burns + excluded.burns,
            rejections = flow.rejections + excluded.rejections
        """,
        (
            stripe,
            hours,
            [flows[hour].issued for hour in hours],
            [flows[hour].burned for hour in hours],
            [flows[hour].accruals for hour in hours],
            [flows[hour].burns for hour in hours],
            [flows[hour].rejections for hour in hours],
        ),
    )
