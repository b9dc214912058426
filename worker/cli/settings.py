"""`tokentrail settings`: what is set, and where from."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from pydantic import SecretStr

from schema.urls import masked
from worker.config import Settings, settings
from worker.output import console, table

_MASK = "********"


def show(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show every setting, its value with secrets masked, and where the value comes from."""
    found = settings()
    rows = [
        (_variable(name), _shown(getattr(found, name)), _origin(name, found), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
    if as_json:
        keys = ("value", "from", "description")
        typer.echo(json.dumps({name: dict(zip(keys, rest, strict=True)) for name, *rest in rows}, indent=2))
        return
    shown = table("Settings", variable="left", value="left", **{"from": "left"})
    for variable, value, origin, _ in rows:
        shown.add_row(variable, "not set" if value is None else str(value), origin)
    console().print(shown)


def _variable(name: str) -> str:
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else f"TOKENTRAIL_{name.upper()}"


def _origin(name: str, found: Settings) -> str:
    variable = _variable(name)
    # Names are matched whatever their case, and an empty one counts as not set.
    if any(each.upper() == variable and value for each, value in os.environ.items()):
        return "environment"
    return "default" if getattr(found, name) == Settings.model_fields[name].default else "tokentrail up"


def _shown(value: object) -> str | int | float | None:
    if isinstance(value, SecretStr):
        return masked(value.get_secret_value(), _MASK)
    return value if isinstance(value, int | float) or value is None else str(value)
