"""`python docs/configuration.py > docs/configuration.md` writes the page from the settings."""

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

Environment variables are read once, at start. A variable that is not set, or empty, has its default. With an invalid
value every command ends with exit code 2 and a sentence that names the variable. `tokentrail settings` shows each
value, with secrets masked, and where it comes from.

```sh
.venv/bin/tokentrail settings
TOKENTRAIL_BATCH_SIZE=100 .venv/bin/tokentrail settings --json
```

A command in a folder where `tokentrail up` runs uses its servers, unless `DATABASE_URL` or `BROKER_URL` is set: their
addresses are in `.tokentrail/servers.json`, which only its owner can read, and which no other user's command trusts.
`TOKENTRAIL_HOME` names another folder than `.tokentrail`; it must be yours, and only you may write in it. Set both
variables or neither: each falls back by itself, and a worker would read events of one system and write them into
another.

## Settings

| Variable | Default | Values | Meaning |
|---|---|---|---|
"""

_FOOT: Final = """
All producers and workers of a queue must have the same `TOKENTRAIL_QUEUE`, and its workers the same
`TOKENTRAIL_MAX_AMOUNT` and `TOKENTRAIL_VISIBILITY_TIMEOUT`. The rest may differ between processes.

## The servers

`tokentrail worker` checks both before it starts. It refuses servers that would lose tokens, and warns of those that
might.

| Server | Must be | Otherwise |
|---|---|---|
| PostgreSQL | 15 or newer | refused |
| PostgreSQL | migrated | refused; with a schema *newer* than the worker, it warns and starts |
| PostgreSQL | `fsync` on, `synchronous_commit` not off | not checked: a crash may lose outcomes |
| Redis | 7.0 or newer, or Valkey | refused |
| Redis | `maxmemory-policy noeviction` | `allkeys-…` is refused, because it evicts queues; a warning for `volatile-…` |
| Redis | `appendonly yes`, `appendfsync always` | warning: a crash may lose the newest messages |
| Redis | a database (`/0`) of its own | not checked: applications that share a Redis database share `unacked` |

Connection poolers: session mode only, because workers set timeouts and more once for each connection (`SET`).

## Celery and Flower

Celery's settings are in `celeryconfig.py`, with a reason on each line. The guarantees depend on them, so change them
only together with the tests. Flower reads its own variables, such as `FLOWER_ADDRESS` and `FLOWER_BASIC_AUTH`.
`tokentrail flower` starts it on loopback by default, docker-compose.yml with a password. Without a password its API is
closed, unless you set `FLOWER_UNAUTHENTICATED_API`. See [access](operating.md#access).

---
`python docs/configuration.py > docs/configuration.md` writes this page; a test checks that it is current.
"""


def page() -> str:
    """The whole page."""
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
    lower = f"more than {bounds[Gt].gt}" if Gt in bounds else f"{bounds[Ge].ge:,}"
    return f"{kind}, {lower} to {bounds[Le].le:,}"


if __name__ == "__main__":
    sys.stdout.write(page())
