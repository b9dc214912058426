"""`tokentrail supply`: how many tokens there are."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from schema.canonical import plain_number
from worker.cli.ledger import read
from worker.output import console, supply_table
from worker.read.supply import read_supply


def supply(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable; amounts are text.")] = False,
) -> None:
    """Show how many tokens were issued and burned, and how many circulate."""
    current = read(read_supply)
    if as_json:
        typer.echo(json.dumps({name: plain_number(amount) for name, amount in current._asdict().items()}))
    else:
        console().print(supply_table(current))
