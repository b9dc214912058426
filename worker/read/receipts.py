"""What became of an event: the answer for its user and idempotency key, wherever it ended.

An outcome has precedence over a dead letter: a letter does not use up its key, so the event may have been applied
since. A replayed letter does not count, for its event is in the queue again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from psycopg import AsyncConnection
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

if TYPE_CHECKING:
    from .database import Database

#: The user is repeated beside each key: with `user_id = …` as a condition of its own, PostgreSQL might read all of the
#: user's rows. For the same reason details are looked up record by record.
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

#: The last row of a key counts: of several letters an open one, and then the newest.
DEAD_LETTERED: Final = """
    SELECT d.user_id, d.idempotency_key, d.reason, d.detail, d.state, d.id AS dead_letter, d.last_seen_at
    FROM unnest(%(users)s::text[], %(keys)s::text[]) AS x (u, k)
    JOIN dead_letter d ON d.user_id = x.u AND d.idempotency_key = x.k
    ORDER BY d.state = 'open', d.id
"""

#: Between two polls while a reader waits; each pause is longer than the one before.
MIN_POLL_SECONDS: Final = 0.05
MAX_POLL_SECONDS: Final = 0.5

Rows = list[dict[str, Any]]


async def read_receipts(connection: AsyncConnection, user_id: str, keys: Sequence[str]) -> Receipts:
    """The receipt of each key, in this order; three statements however many keys there are."""
    distinct = list(dict.fromkeys(keys))
    parameters = {"users": [user_id] * len(distinct), "keys": distinct}
    async with connection.cursor(row_factory=dict_row) as cursor:
        applied, rejected, letters = [
            await (await cursor.execute(statement, parameters)).fetchall()
            for statement in (APPLIED, REJECTED, DEAD_LETTERED)
        ]
    return _receipts(user_id, distinct, applied, rejected, letters)


async def wait_for_receipts(database: Database, user_id: str, keys: Sequence[str], seconds: float) -> Receipts:
    """The receipts as soon as one of them is known, and after so many seconds at the latest.

    No connection is held between two polls. Raises DatabaseUnavailable without waiting.
    """
    read = partial(read_receipts, user_id=user_id, keys=keys)
    deadline, pause = time.monotonic() + seconds, MIN_POLL_SECONDS
    while True:
        receipts = await database.read(read)
        remaining = deadline - time.monotonic()
        if remaining <= 0 or any(receipt.status != "unknown" for receipt in receipts.receipts):
            return receipts
        await asyncio.sleep(min(pause, remaining))
        pause = min(pause * 1.5, MAX_POLL_SECONDS)


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
    return Receipts(receipts=[known.get(key) or UnknownReceipt(user_id=user_id, idempotency_key=key) for key in keys])
