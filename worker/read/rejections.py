"""An account's rejections, newest first, page by page; like records they are numbered without a gap."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from psycopg import AsyncConnection, Connection
from psycopg.rows import dict_row

from schema.responses import Pagination, Rejections, rejection

from .history import page_numbers

TOTAL: Final = "SELECT rejections FROM account WHERE user_id = %s"

REJECTIONS: Final = """
    SELECT user_id, number, type, amount, reason, balance, source, action, metadata::text AS metadata,
           idempotency_key, occurred_at, created_at
    FROM rejected_event
    WHERE user_id = %(user_id)s AND number > %(after)s AND number <= %(up_to)s
    ORDER BY number DESC
"""


async def read_rejections(connection: AsyncConnection, user_id: str, page: int, limit: int) -> Rejections:
    """Page `page` (from 1) of `limit` rejections of the user; empty for an unknown user and behind the last page."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        total = _total(await (await cursor.execute(TOTAL, (user_id,))).fetchone())
        wanted = page_numbers(user_id, page, limit, total)
        rows = await (await cursor.execute(REJECTIONS, wanted)).fetchall() if wanted["up_to"] else []
    return _rejections(rows, page, limit, total)


def read_rejections_now(connection: Connection, user_id: str, page: int, limit: int) -> Rejections:
    """`read_rejections` for a program without an event loop."""
    with connection.cursor(row_factory=dict_row) as cursor:
        total = _total(cursor.execute(TOTAL, (user_id,)).fetchone())
        wanted = page_numbers(user_id, page, limit, total)
        rows = cursor.execute(REJECTIONS, wanted).fetchall() if wanted["up_to"] else []
    return _rejections(rows, page, limit, total)


def _total(account: dict[str, Any] | None) -> int:
    return 0 if account is None else int(account["rejections"])


def _rejections(rows: Iterable[dict[str, Any]], page: int, limit: int, total: int) -> Rejections:
    return Rejections(
        rejections=[rejection(row) for row in rows],
        pagination=Pagination(page=page, limit=limit, total=total, total_pages=-(-total // limit)),
    )
