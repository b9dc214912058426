"""An account's records, newest first, page by page.

Records are numbered 1, 2, 3 … without a gap, so the account's last number is their count, and a page is a range of
numbers: no COUNT, no OFFSET, and page 100,000 costs what page 1 costs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from psycopg import AsyncConnection, Connection
from psycopg.rows import dict_row

from schema.responses import Pagination, TransactionHistory, transaction

TOTAL: Final = "SELECT sequence FROM account WHERE user_id = %s"

#: The range stands in every join: the planner carries a constant across an outer join, but not a range, and without
#: it might read all of the user's details to join ten.
RECORDS: Final = """
    SELECT t.user_id, t.sequence, t.type, t.amount, t.balance_before, t.balance_after, a.source, b.action,
           t.metadata::text AS metadata, t.idempotency_key, t.occurred_at, t.created_at
    FROM transaction_record t
    LEFT JOIN accrual_record a ON a.user_id = t.user_id AND a.sequence = t.sequence
        AND a.sequence > %(after)s AND a.sequence <= %(up_to)s
    LEFT JOIN burned_credit b ON b.user_id = t.user_id AND b.sequence = t.sequence
        AND b.sequence > %(after)s AND b.sequence <= %(up_to)s
    WHERE t.user_id = %(user_id)s AND t.sequence > %(after)s AND t.sequence <= %(up_to)s
    ORDER BY t.sequence DESC
"""


async def read_history(connection: AsyncConnection, user_id: str, page: int, limit: int) -> TransactionHistory:
    """Page `page` (from 1) of `limit` records of the user; empty for an unknown user and behind the last page.

    The count is read first: records up to it are there for good, so a worker that writes meanwhile adds nothing to
    the page and takes nothing from it.
    """
    async with connection.cursor(row_factory=dict_row) as cursor:
        total = _total(await (await cursor.execute(TOTAL, (user_id,))).fetchone())
        numbers = page_numbers(user_id, page, limit, total)
        rows = await (await cursor.execute(RECORDS, numbers)).fetchall() if numbers["up_to"] else []
    return _history(rows, page, limit, total)


def read_history_now(connection: Connection, user_id: str, page: int, limit: int) -> TransactionHistory:
    """`read_history` for a program without an event loop."""
    with connection.cursor(row_factory=dict_row) as cursor:
        total = _total(cursor.execute(TOTAL, (user_id,)).fetchone())
        numbers = page_numbers(user_id, page, limit, total)
        rows = cursor.execute(RECORDS, numbers).fetchall() if numbers["up_to"] else []
    return _history(rows, page, limit, total)


def _total(account: dict[str, Any] | None) -> int:
    return 0 if account is None else int(account["sequence"])


def page_numbers(user_id: str, page: int, limit: int, total: int) -> dict[str, Any]:
    """The page's records are those numbered after `after` and up to `up_to`; 0 and 0 when it has none."""
    up_to = max(total - (page - 1) * limit, 0)
    return {"user_id": user_id, "up_to": up_to, "after": max(up_to - limit, 0)}


def _history(rows: Iterable[dict[str, Any]], page: int, limit: int, total: int) -> TransactionHistory:
    return TransactionHistory(
        transactions=[transaction(row) for row in rows],
        pagination=Pagination(page=page, limit=limit, total=total, total_pages=-(-total // limit)),
    )
