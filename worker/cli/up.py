"""`tokentrail up`: the whole system on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.local import up as system


def up(
    demo: Annotated[bool, typer.Option("--demo", help="Publish the demo economy once everything runs.")] = False,
) -> None:
    """Run PostgreSQL, Valkey, a worker, the API and Flower here, until Ctrl-C.

    With DATABASE_URL or BROKER_URL set, those servers are used instead of embedded ones.
    """
    system.up(with_demo=demo)
