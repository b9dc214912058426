"""`tokentrail history`: an account's records or rejections."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer
from pydantic import ValidationError

from schema.responses import MAX_LIMIT, USER_RULE, HistoryQuery, Rejections, TransactionHistory
from worker.cli.ledger import read
from worker.cli.usage import UsageError
from worker.output import console, history_table, printable, rejections_table
from worker.read.pages import RECORDS, REJECTIONS, Pages, read_page


def history(
    user: Annotated[str, typer.Argument(help="The user's ID.", show_default=False)],
    page: Annotated[int, typer.Option(min=1, help="Page number, from 1 (newest).")] = 1,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, help="Records on a page.")] = 10,
    rejected: Annotated[bool, typer.Option("--rejected", help="Rejected events instead of records.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The API's response.")] = False,
) -> None:
    """Show a user's records or rejections, newest first."""
    try:
        query = HistoryQuery.model_validate({"userId": user, "page": page, "limit": limit})
    except ValidationError:
        raise UsageError(f"USER must be {USER_RULE}.") from None
    pages: Pages[TransactionHistory | Rejections] = REJECTIONS if rejected else RECORDS
    answer = read(partial(read_page, pages=pages, user_id=query.user_id, page=query.page, limit=query.limit))
    if as_json:
        typer.echo(answer.json_text())
    elif not answer.pagination.total:
        console().print(f"{printable(user)} has no {'rejections' if rejected else 'records'}.")
    elif isinstance(answer, Rejections):
        console().print(rejections_table(user, answer))
    else:
        console().print(history_table(user, answer))
