"""What became of an event: the answer for its user and idempotency key, wherever it ended.

An outcome stands before a dead letter: a letter freezes nothing, so that an event may have been applied under its key
since. A letter that was replayed says nothing, for its event is in the queue again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final

from psycopg import AsyncConnection, Connection
from psycopg.rows import dict_row

from schema.responses import (
    AppliedReceipt,
    DeadLetteredReceipt,
    Receipt,
    Receipts,
    RejectedReceipt,
    UnknownReceipt,
    transaction,
)

from .database import Database

#: Each key is asked for beside its user, though there is only one: a user given once is a condition by itself, for
#: which PostgreSQL might read all of the user's rows. For the same reason details are looked up record by record.
APPLIED: Final = """
    SELECT t.user_id, t.sequence, t.type, t.amount, t.balance_before, t.balance_after, t.metadata::text AS metadata,
           t.idempotency_key, t.occurred_at, t.created_at,
           (SELECT a.source FROM accrual_record a WHERE a.user_id = t.user_id AND a.sequence = t.sequence) AS source,
           (SELECT b.action FROM burned_credit b WHERE b.user_id = t.user_id AND b.sequence = t.sequence) AS action
    FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (u, k)
    JOIN transaction_record t ON t.user_id = x.u AND t.idempotency_key = x.k
"""

REJECTED: Final = """
    SELECT r.user_id, r.idempotency_key, r.reason, r.balance, r.number, r.created_at
    FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (u, k)
    JOIN rejected_event r ON r.user_id = x.u AND r.idempotency_key = x.k
"""

#: Of several letters under one key an open one counts, and then the newest.
DEAD_LETTERED: Final = """
    SELECT d.user_id, d.idempotency_key, d.reason, d.detail, d.state, d.id AS dead_letter, d.last_seen_at
    FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (u, k)
    JOIN dead_letter d ON d.user_id = x.u AND d.idempotency_key = x.k
    ORDER BY d.state = 'open', d.id
"""

#: Seconds between two looks while a reader waits; the pause grows from the first to the last.
FIRST_LOOK: Final = 0.05
LAST_LOOK: Final = 0.5

Rows = list[dict[str, Any]]


async def read_receipts(connection: AsyncConnection, user_id: str, keys: Sequence[str]) -> Receipts:
    """The receipt of each key, in this order; three look-ups however many there are."""
    asked = _asked(user_id, keys)
    async with connection.cursor(row_factory=dict_row) as cursor:
        found = [
            await (await cursor.execute(statement, asked)).fetchall()
            for statement in (APPLIED, REJECTED, DEAD_LETTERED)
        ]
    return _receipts(user_id, keys, *found)


def read_receipts_now(connection: Connection, user_id: str, keys: Sequence[str]) -> Receipts:
    """`read_receipts` for a program without an event loop."""
    asked = _asked(user_id, keys)
    with connection.cursor(row_factory=dict_row) as cursor:
        found = [cursor.execute(statement, asked).fetchall() for statement in (APPLIED, REJECTED, DEAD_LETTERED)]
    return _receipts(user_id, keys, *found)


async def await_receipts(database: Database, user_id: str, keys: Sequence[str], seconds: float) -> Receipts:
    """The receipts, as soon as one of them is known, and after so many seconds at the latest.

    Who waits holds no connection meanwhile. Raises DatabaseAway at once when it is.
    """

    async def ask(connection: AsyncConnection) -> Receipts:
        return await read_receipts(connection, user_id, keys)

    deadline, pause = time.monotonic() + seconds, FIRST_LOOK
    while True:
        found = await database.read(ask)
        left = deadline - time.monotonic()
        if left <= 0 or any(receipt.status != "unknown" for receipt in found.receipts):
            return found
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.5, LAST_LOOK)


def _asked(user_id: str, keys: Sequence[str]) -> dict[str, list[str]]:
    distinct = list(dict.fromkeys(keys))
    return {"users": [user_id] * len(distinct), "keys": distinct}


def _receipts(user_id: str, keys: Sequence[str], applied: Rows, rejected: Rows, letters: Rows) -> Receipts:
    known: dict[str, Receipt] = {}
    for row in letters:
        if row["state"] == "replayed":
            known.pop(row["idempotency_key"], None)
        else:
            known[row["idempotency_key"]] = DeadLetteredReceipt(**row)
    known |= {row["idempotency_key"]: RejectedReceipt(**row) for row in rejected}
    known |= {
        row["idempotency_key"]: AppliedReceipt(
            user_id=row["user_id"], idempotency_key=row["idempotency_key"], transaction=transaction(row)
        )
        for row in applied
    }
    return Receipts(
        receipts=[known.get(key) or UnknownReceipt(user_id=user_id, idempotency_key=key) for key in dict.fromkeys(keys)]
    )
