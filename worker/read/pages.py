"""An account's records and its rejections, newest first, page by page.

Both are numbered 1, 2, 3 … without a gap, so the account's last number is their count, and a page is a range of
numbers: no COUNT, no OFFSET, and page 100,000 costs what page 1 costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

from psycopg import AsyncConnection
from psycopg.rows import dict_row

from schema.responses import Pagination, Rejections, TransactionHistory, rejection, transaction

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pages(NamedTuple, Generic[T_co]):
    """One kind of numbered rows of an account."""

    total: str  # SQL: the account's last number
    rows: str  # SQL: the rows with numbers above `after` and up to `up_to`
    response: Callable[[list[dict[str, Any]], Pagination], T_co]


#: The range stands in every join: the planner carries a constant across an outer join, but not a range, and without
#: it might read all of the user's details to join ten.
RECORDS: Final = Pages(
    "SELECT sequence FROM account WHERE user_id = %s",
    """
    SELECT t.user_id, t.sequence, t.type, t.amount, t.balance_before, t.balance_after, a.source, b.action,
           t.metadata::text AS metadata, t.idempotency_key, t.occurred_at, t.created_at
    FROM transaction_record t
    LEFT JOIN accrual_record a ON a.user_id = t.user_id AND a.sequence = t.sequence
        AND a.sequence > %(after)s AND a.sequence <= %(up_to)s
    LEFT JOIN burned_credit b ON b.user_id = t.user_id AND b.sequence = t.sequence
        AND b.sequence > %(after)s AND b.sequence <= %(up_to)s
    WHERE t.user_id = %(user_id)s AND t.sequence > %(after)s AND t.sequence <= %(up_to)s
    ORDER BY t.sequence DESC
    """,
    lambda rows, pagination: TransactionHistory(transactions=[transaction(row) for row in rows], pagination=pagination),
)

REJECTIONS: Final = Pages(
    "SELECT rejections FROM account WHERE user_id = %s",
    """
    SELECT user_id, number, type, amount, reason, balance, source, action, metadata::text AS metadata,
           idempotency_key, occurred_at, created_at
    FROM rejected_event
    WHERE user_id = %(user_id)s AND number > %(after)s AND number <= %(up_to)s
    ORDER BY number DESC
    """,
    lambda rows, pagination: Rejections(rejections=[rejection(row) for row in rows], pagination=pagination),
)


async def read_page(connection: AsyncConnection, pages: Pages[T], user_id: str, page: int, limit: int) -> T:
    """Page `page` (from 1) of `limit` rows; empty for an unknown user and behind the last page.

    The total is read first. Rows up to it never change, so a worker that writes meanwhile cannot change the page.
    """
    async with connection.cursor(row_factory=dict_row) as cursor:
        account = await (await cursor.execute(pages.total, (user_id,))).fetchone()
        total = 0 if account is None else int(next(iter(account.values())))
        up_to = max(total - (page - 1) * limit, 0)
        numbers = {"user_id": user_id, "up_to": up_to, "after": max(up_to - limit, 0)}
        rows = await (await cursor.execute(pages.rows, numbers)).fetchall() if up_to else []
    return pages.response(rows, Pagination(page=page, limit=limit, total=total, total_pages=-(-total // limit)))
