"""The SQL of a batch: each function is one statement (recording: one a table), whatever the batch's size.

`…_within` are transactions of their own, for what a batch could not have.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple
from zlib import crc32

import psycopg
from psycopg import Connection, Cursor

from .deliveries import Delivery
from .errors import LOCK_NOT_AVAILABLE, caused_by_event
from .outcomes import Applied, Decision, Rejected
from .rules import Reason

#: Tries to open accounts that fail, for somebody else is opening them or the database refuses one: three such are found
#: among 500 new ones.
MOST_IN_VAIN: Final = 25


@dataclass(slots=True)
class Account:
    """A locked account as the batch moves it."""

    user_id: str
    balance: Decimal
    opening_balance: Decimal | None
    sequence: int
    head_hash: bytes | None
    rejections: int
    rejection_head: bytes | None
    last_recorded_at: datetime | None


class Earlier(NamedTuple):
    """What a key already stands for."""

    payload_hash: bytes
    decision: Decision


@dataclass(slots=True)
class Flow:
    """What a batch issued and burned in one hour."""

    issued: Decimal = Decimal(0)
    burned: Decimal = Decimal(0)
    accruals: int = 0
    burns: int = 0
    rejections: int = 0


def open_accounts(cursor: Cursor[Any], users: Sequence[str]) -> None:
    """Make sure that each account exists. In order, as locks are taken: two batches cannot wait for each other."""
    cursor.execute(
        "INSERT INTO account (user_id) SELECT u FROM unnest(%s::text[]) AS u"
        " WHERE NOT EXISTS (SELECT FROM account WHERE user_id = u)"
        ' ORDER BY u COLLATE "C" ON CONFLICT DO NOTHING',
        (_array_of_texts(users),),
    )


def open_accounts_within(connection: Connection[Any], users: Sequence[str], seconds: float) -> set[str]:
    """Make sure that each account exists, but for those that somebody has been opening for longer than `seconds`, and
    those that the database refuses, which are returned: nobody holds them, and their events will meet the refusal.

    Ends in bounded time, before all is tried, when there are many of these or the whole table is locked. The order is
    another one each time, so that who is called again gets further.
    """
    rows = connection.execute(
        "SELECT u FROM unnest(%s::text[]) AS x (u) WHERE NOT EXISTS (SELECT FROM account WHERE user_id = u)",
        (_array_of_texts(users),),
    )
    missing = [row[0] for row in rows]
    random.shuffle(missing)
    parts = [missing] if missing else []
    refused = set()
    in_vain = 0
    while parts and in_vain < MOST_IN_VAIN:
        part = parts.pop()
        try:
            with connection.transaction(), connection.cursor() as cursor:
                cursor.execute("SELECT set_config('lock_timeout', %s, true)", (f"{round(seconds * 1000)}ms",))
                open_accounts(cursor, part)
        except psycopg.Error as error:
            if not caused_by_event(error.sqlstate):
                if error.sqlstate != LOCK_NOT_AVAILABLE:
                    raise
            elif len(part) == 1:
                refused.add(part[0])
            in_vain += 1
            if len(part) > 1:
                parts += [part[len(part) // 2 :], part[: len(part) // 2]]
    return refused


def lock_accounts(cursor: Cursor[Any], users: Sequence[str]) -> dict[str, Account]:
    """Those of the accounts that exist, locked in order of user_id until the transaction ends.

    A row that had to be waited for comes as it is after the wait, not as the statement's snapshot knew it: under READ
    COMMITTED, FOR UPDATE reads the newest version anew (PostgreSQL's manual, 13.2.1).
    """
    cursor.execute(
        "SELECT user_id, balance, opening_balance, sequence, head_hash, rejections, rejection_head, last_recorded_at"
        " FROM account WHERE user_id = ANY(%s) ORDER BY user_id FOR UPDATE",
        (_array_of_texts(users),),
    )
    return {row[0]: Account(*row) for row in cursor}


def holders(connection: Connection[Any], users: Sequence[str]) -> dict[str, str | None]:
    """In which transaction's hands each account is that exists; None if its lock could be had at once, and is not kept.

    The number of a transaction that has locked a row is the row's xmax. One that is somebody else's at the next look
    is busy, and not stuck.
    """
    rows = connection.execute(
        """
        WITH free AS MATERIALIZED (SELECT user_id FROM account WHERE user_id = ANY(%(users)s) FOR UPDATE SKIP LOCKED)
        SELECT a.user_id, CASE WHEN free.user_id IS NULL THEN a.xmax::text END
        FROM account a LEFT JOIN free ON free.user_id = a.user_id WHERE a.user_id = ANY(%(users)s)
        """,
        {"users": _array_of_texts(users)},
    )
    return {row[0]: row[1] for row in rows}


def end_frozen(connection: Connection[Any], after: float) -> list[int]:
    """End the sessions of workers that began a COPY `after` seconds ago and have not sent its lines; their pids.

    None of PostgreSQL's timeouts ends a session that waits for the lines of a COPY: not statement_timeout, nor
    idle_in_transaction_session_timeout, nor transaction_timeout (tried with 18). A worker that is frozen just then
    would hold its accounts for as long as its machine is up.
    """
    # Materialized: among conditions PostgreSQL may well evaluate the one that kills first.
    rows = connection.execute(
        """
        WITH frozen AS MATERIALIZED (
            SELECT pid FROM pg_stat_activity
            WHERE datname = current_database() AND usename = current_user AND application_name = %s
                AND state = 'active' AND wait_event = 'ClientRead' AND query LIKE 'COPY %%'
                AND query_start < clock_timestamp() - make_interval(secs => %s)
        )
        SELECT pid FROM frozen WHERE pg_terminate_backend(pid)
        """,
        (connection.info.parameter_status("application_name"), after),
    )
    return [row[0] for row in rows]


def covered(connection: Connection[Any], burns: Sequence[Delivery]) -> list[bool]:
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


def look_up(cursor: Cursor[Any], deliveries: Sequence[Delivery]) -> tuple[dict[tuple[str, str], Earlier], datetime]:
    """What the deliveries' keys already stand for, and the clock.

    A statement of its own, begun when the locks are held, so that no one else is deciding the keys: the snapshot of
    the locking statement, which may have waited, is from before the wait. So would its clock be.
    """
    cursor.execute(
        """
        SELECT NULL AS u, NULL AS k, NULL::bytea, NULL::bigint, NULL::numeric, NULL::numeric, NULL, NULL::numeric,
            clock_timestamp()
        UNION ALL
        SELECT x.u, x.k, t.payload_hash, t.sequence, t.balance_before, t.balance_after, NULL, NULL, NULL
        FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (u, k)
        JOIN transaction_record t ON t.user_id = x.u AND t.idempotency_key = x.k
        UNION ALL
        SELECT x.u, x.k, r.payload_hash, r.number, r.balance, NULL, r.reason, r.amount, NULL
        FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (u, k)
        JOIN rejected_event r ON r.user_id = x.u AND r.idempotency_key = x.k
        """,
        {
            "users": _array_of_texts([delivery.event.user_id for delivery in deliveries]),
            "keys": _array_of_texts([delivery.event.idempotency_key for delivery in deliveries]),
        },
    )
    (*_, now), *rows = cursor.fetchall()
    found: dict[tuple[str, str], Earlier] = {}
    for user, key, payload, number, balance, after, reason, amount, _ in rows:
        decision: Decision = (
            Applied(number, balance, after, repeated=True)
            if reason is None
            else Rejected(number, Reason(reason), balance, amount, repeated=True)
        )
        found[user, key] = Earlier(payload, decision)
    return found, now


def contents(cursor: Cursor[Any], keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The content that keys stand for, field by field, to say in what another event under them differs."""
    users, names = zip(*keys, strict=True)
    cursor.execute(
        """
        SELECT t.user_id, t.idempotency_key, t.type, t.amount, a.source, b.action, t.metadata::text, t.occurred_at
        FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (u, k)
        JOIN transaction_record t ON t.user_id = x.u AND t.idempotency_key = x.k
        LEFT JOIN accrual_record a ON a.user_id = t.user_id AND a.sequence = t.sequence
        LEFT JOIN burned_credit b ON b.user_id = t.user_id AND b.sequence = t.sequence
        UNION ALL
        SELECT r.user_id, r.idempotency_key, r.type, r.amount, r.source, r.action, r.metadata::text, r.occurred_at
        FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (u, k)
        JOIN rejected_event r ON r.user_id = x.u AND r.idempotency_key = x.k
        """,
        {"users": list(users), "keys": list(names)},
    )
    fields = ("type", "amount", "source", "action", "metadata", "occurred_at")
    return {(row[0], row[1]): dict(zip(fields, row[2:], strict=True)) for row in cursor}


#: Each table that recording fills, in the order that its foreign keys need, with the columns of a line.
RECORDED: Final[Mapping[str, str]] = {
    "transaction_record": "user_id, sequence, idempotency_key, type, amount, balance_before, balance_after, metadata,"
    " occurred_at, created_at, payload_hash, hash, hash_version",
    "accrual_record": "user_id, sequence, amount, source, created_at",
    "burned_credit": "user_id, sequence, amount, action, balance_before, balance_after, created_at",
    "rejected_event": "user_id, number, idempotency_key, type, amount, source, action, metadata, occurred_at,"
    " created_at, reason, balance, payload_hash, hash, hash_version",
}

_COPY: Final = {table: f"COPY {table} ({columns}) FROM STDIN".encode() for table, columns in RECORDED.items()}


def record(cursor: Cursor[Any], table: str, lines: Sequence[str]) -> None:
    """Append lines in COPY's text format (`copy_line` makes them) to one of RECORDED's tables."""
    with cursor.copy(_COPY[table]) as copy:
        copy.write("".join(lines))


def copy_line(*fields: str | None) -> str:
    """One line in COPY's text format. Fields that may hold anything go through `copy_text` first."""
    return "\t".join(["\\N" if field is None else field for field in fields]) + "\n"


_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_TO_ESCAPE: Final = re.compile(r"[\\\t\n\r]")


def copy_text(text: str | None) -> str | None:
    """Any text as a field of a COPY line."""
    # Looked at first: most texts hold nothing to escape, and translating takes five times as long.
    return text.translate(_ESCAPES) if text is not None and _TO_ESCAPE.search(text) else text


def copy_bytes(value: bytes) -> str:
    """Bytes as a field of a COPY line."""
    return "\\\\x" + value.hex()


def move_balances(cursor: Cursor[Any], accounts: Sequence[Account]) -> None:
    """Write the moved accounts back."""
    cursor.execute(
        """
        UPDATE account SET balance = x.balance, opening_balance = x.opening_balance, sequence = x.sequence,
            head_hash = x.head_hash, rejections = x.rejections, rejection_head = x.rejection_head,
            last_recorded_at = x.last_recorded_at
        FROM unnest(%s::text[], %s::numeric[], %s::numeric[], %s::bigint[], %s::bytea[], %s::bigint[], %s::bytea[],
                    %s::timestamptz[])
            AS x (user_id, balance, opening_balance, sequence, head_hash, rejections, rejection_head, last_recorded_at)
        WHERE account.user_id = x.user_id
        """,
        (
            _array_of_texts([account.user_id for account in accounts]),
            _array([account.balance for account in accounts]),
            _array([account.opening_balance for account in accounts]),
            _array([account.sequence for account in accounts]),
            _array_of_bytes([account.head_hash for account in accounts]),
            _array([account.rejections for account in accounts]),
            _array_of_bytes([account.rejection_head for account in accounts]),
            _array([account.last_recorded_at for account in accounts]),
        ),
    )


def stripe_of(host: str, pid: int, stripes: int) -> int:
    """Which row of the global token balance a process adds to, below zero, where none of before the trail is.

    Processes of one host begun one after the other differ; so, mostly, do those of containers, whose pids are alike.
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
            f"row {stripe} of global_token_balance is from before the trail and cannot be a stripe: give it another id"
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


def _array(values: Iterable[object]) -> str:
    """An array of numbers or times as PostgreSQL reads it. For psycopg to make one takes several times as long."""
    return f"{{{','.join(['NULL' if value is None else str(value) for value in values])}}}"


def _array_of_texts(texts: Iterable[str]) -> str:
    """The same of texts, which may hold anything."""
    quoted = [f'"{escaped}"' for escaped in [text.replace("\\", r"\\").replace('"', r"\"") for text in texts]]
    return f"{{{','.join(quoted)}}}"


def _array_of_bytes(values: Iterable[bytes | None]) -> str:
    return _array([None if value is None else rf"\\x{value.hex()}" for value in values])
