"""`tokentrail receipt`: what became of one event."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer
from pydantic import ValidationError

from schema.responses import KEY_RULE, USER_RULE, ReceiptsQuery
from worker.cli.ledger import read
from worker.cli.usage import UsageError
from worker.output import console, receipt_table
from worker.read.receipts import read_receipts


def receipt(
    user: Annotated[str, typer.Argument(help="The user's ID.", show_default=False)],
    key: Annotated[str, typer.Argument(help="The event's idempotency key.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="The API's response.")] = False,
) -> None:
    """Show what became of an event: applied, rejected, dead-lettered or unknown."""
    try:
        query = ReceiptsQuery.model_validate({"userId": user, "idempotencyKey": [key]})
    except ValidationError as error:
        in_user = error.errors()[0]["loc"][0] == "userId"
        raise UsageError(f"USER must be {USER_RULE}." if in_user else f"KEY must be {KEY_RULE}.") from None
    answer = read(partial(read_receipts, user_id=query.user_id, keys=query.idempotency_keys))
    if as_json:
        typer.echo(answer.json_text())
    else:
        console().print(receipt_table(answer.receipts[0]))
