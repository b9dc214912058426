"""`tokentrail history`, `receipt` and `supply`: what the ledger holds."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from schema.canonical import plain_number
from schema.responses import MAX_LIMIT, HistoryQuery, ReceiptsQuery, Rejections
from worker.cli.usage import Misused
from worker.config import settings
from worker.db import connect
from worker.output import console, history_table, printable, receipt_table, rejections_table, supply_table
from worker.read.history import read_history_now
from worker.read.receipts import read_receipts_now
from worker.read.rejections import read_rejections_now
from worker.read.supply import read_supply
from worker.schema_version import check_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg


def history(
    user: Annotated[str, typer.Argument(help="Whose history.", show_default=False)],
    page: Annotated[int, typer.Option(min=1, help="1 is the newest.")] = 1,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, help="Records on a page.")] = 10,
    rejected: Annotated[
        bool, typer.Option("--rejected", help="What was refused for good, instead of the records.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The API's answer.")] = False,
) -> None:
    """Show a user's records or rejections, newest first."""
    try:
        query = HistoryQuery.model_validate({"userId": user, "page": page, "limit": limit})
    except ValidationError:
        raise Misused(f"USER must be {HistoryQuery.model_fields['user_id'].description}.") from None
    with _reader() as connection:
        read = read_rejections_now if rejected else read_history_now
        answer = read(connection, query.user_id, query.page, query.limit)
    if as_json:
        typer.echo(answer.json_text())
    elif not answer.pagination.total:
        console().print(f"{printable(user)} has no {'rejections' if rejected else 'records'}.")
    elif isinstance(answer, Rejections):
        console().print(rejections_table(user, answer))
    else:
        console().print(history_table(user, answer))


def receipt(
    user: Annotated[str, typer.Argument(help="Whose event.", show_default=False)],
    key: Annotated[str, typer.Argument(help="Its idempotency key.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="The API's answer.")] = False,
) -> None:
    """Say what became of an event: applied, rejected, dead-lettered, or unknown."""
    try:
        query = ReceiptsQuery.model_validate({"userId": user, "idempotencyKey": [key]})
    except ValidationError as error:
        name, field = ("USER", "user_id") if error.errors()[0]["loc"][0] == "userId" else ("KEY", "idempotency_keys")
        rule = (ReceiptsQuery.model_fields[field].description or "").rpartition("each time ")[2]
        raise Misused(f"{name} must be {rule}.") from None
    with _reader() as connection:
        answer = read_receipts_now(connection, query.user_id, query.idempotency_keys)
    if as_json:
        typer.echo(answer.json_text())
    else:
        console().print(receipt_table(answer.receipts[0]))


def supply(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable; amounts are text.")] = False,
) -> None:
    """Show how many tokens were issued and burned, and how many circulate."""
    with _reader() as connection:
        found = read_supply(connection)
    if as_json:
        typer.echo(json.dumps({name: plain_number(amount) for name, amount in found._asdict().items()}))
    else:
        console().print(supply_table(found))


@contextlib.contextmanager
def _reader() -> Iterator[psycopg.Connection]:
    found = settings()
    with connect(found.database(), found, name="tokentrail cli") as connection:
        check_schema(connection)
        yield connection
