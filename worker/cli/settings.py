"""`tokentrail settings`: every setting and where its value comes from."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from pydantic import SecretStr

from schema.urls import mask_secrets
from worker.config import Settings, load_settings
from worker.output import console, table

_MASK = "********"


def settings(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show every setting, its value with secrets masked, and where the value comes from."""
    current = load_settings()
    rows = [
        (_variable(name), _printable(getattr(current, name)), _origin(name, current), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
    if as_json:
        keys = ("value", "from", "description")
        typer.echo(json.dumps({name: dict(zip(keys, rest, strict=True)) for name, *rest in rows}, indent=2))
        return
    rendered = table("Settings", variable="left", value="left", **{"from": "left"})
    for variable, value, origin, _ in rows:
        rendered.add_row(variable, "not set" if value is None else str(value), origin)
    console().print(rendered)


def _variable(name: str) -> str:
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else f"TOKENTRAIL_{name.upper()}"


def _origin(name: str, current: Settings) -> str:
    variable = _variable(name)
    # Variables are matched in any case, and an empty one counts as not set.
    if any(each.upper() == variable and value for each, value in os.environ.items()):
        return "environment"
    return "default" if getattr(current, name) == Settings.model_fields[name].default else "tokentrail up"


def _printable(value: object) -> str | int | float | None:
    if isinstance(value, SecretStr):
        return mask_secrets(value.get_secret_value(), _MASK)
    return value if isinstance(value, int | float) or value is None else str(value)
