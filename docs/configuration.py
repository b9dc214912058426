"""`python docs/configuration.py > docs/configuration.md`: the page, written from the settings themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le

from worker.config import Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_HEAD: Final = """\
# Configuration

Everything is set by environment variables, read once at start. What is not set, or empty, has its default; an
unusable value ends every command with exit code 2 and a sentence that names the variable. `tokentrail settings`
shows what is set, with secrets masked, and where each value comes from.

```sh
.venv/bin/tokentrail settings
TOKENTRAIL_BATCH_SIZE=100 .venv/bin/tokentrail settings --json
```

A command in a folder where `tokentrail up` runs takes the servers of that, unless `DATABASE_URL` or `BROKER_URL` is
set: their addresses are in `.tokentrail/servers.json`, which only its owner can read, and which nobody else's command
believes. `TOKENTRAIL_HOME` names another folder than `.tokentrail`; it must be yours, and none but you may write in it.
Each of the two falls back by itself, so set both or neither: else a worker takes events from one system and writes them
into another.

## Settings

| Variable | Default | Values | Meaning |
|---|---|---|---|
"""

_FOOT: Final = """
Everything that uses one queue must agree on `TOKENTRAIL_QUEUE`, and its workers on `TOKENTRAIL_MAX_AMOUNT` and
`TOKENTRAIL_VISIBILITY_TIMEOUT`. The rest may differ from process to process.

## The servers

`tokentrail worker` looks at both before it starts, refuses what would lose tokens and names what might.

| Server | Must be | Otherwise |
|---|---|---|
| PostgreSQL | 15 or newer | refused |
| PostgreSQL | migrated | refused; a schema *newer* than the worker is warned of and worked with |
| PostgreSQL | `fsync` on, `synchronous_commit` not off | not looked at: a crash may lose outcomes |
| Redis | 7.0 or newer, or Valkey | refused |
| Redis | `maxmemory-policy noeviction` | `allkeys-…` is refused, for it forgets queues; `volatile-…` is warned of |
| Redis | `appendonly yes`, `appendfsync always` | warned of: a crash may lose the newest messages |
| Redis | a database (`/0`) of its own | not looked at: apps that share a Redis database share `unacked` |

Behind a connection pooler PostgreSQL works in session mode only: timeouts and more are set once a connection (`SET`).

## Celery and Flower

Celery's settings are in `celeryconfig.py`, with a reason on each line; they are part of what is promised, so change
them only together with the tests. Flower reads its own variables, such as `FLOWER_ADDRESS` and `FLOWER_BASIC_AUTH`;
`tokentrail flower` starts it on loopback unless told otherwise, docker-compose.yml with a password. Its API is closed
without a password, with `tokentrail up` too, unless you set `FLOWER_UNAUTHENTICATED_API`. Who else can reach it is in
[operating](operating.md#who-may-look).

---
This page is written by `python docs/configuration.py > docs/configuration.md`; a test holds it current.
"""


def page() -> str:
    """The page as it must be committed."""
    rows = (
        f"| `{_variable(name, field)}` | {_default(field)} | {_values(field)} | {_text(field)} |\n"
        for name, field in Settings.model_fields.items()
    )
    return "".join([_HEAD, *rows, _FOOT])


def _variable(name: str, field: FieldInfo) -> str:
    alias = field.validation_alias
    return alias if isinstance(alias, str) else f"TOKENTRAIL_{name.upper()}"


def _text(field: FieldInfo) -> str:
    return (field.description or "").replace("<", "\\<").replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    return "not set" if field.default is None else f"`{field.default}`"


def _values(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    bounds = {type(bound): bound for bound in field.metadata}
    if not bounds:
        return "path" if Path in get_args(field.annotation) else "text"
    kind = "whole number" if field.annotation is int else "number"
    least = f"more than {bounds[Gt].gt}" if Gt in bounds else f"{bounds[Ge].ge:,}"
    return f"{kind}, {least} to {bounds[Le].le:,}"


if __name__ == "__main__":
    sys.stdout.write(page())
