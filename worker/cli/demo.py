"""`tokentrail demo`: a small token economy, published, applied and shown."""

from __future__ import annotations

import secrets
from typing import Annotated

import typer

from worker.cli.usage import UsageError
from worker.config import load_settings
from worker.local.demo import Economy, run_demo, run_on_throw_away_servers, show
from worker.output import console

_MAX_RUN_LENGTH = 40  # characters


def demo(
    seed: Annotated[int, typer.Option(help="Another number makes another economy.")] = 1,
    events: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many different events.")] = 5000,
    run: Annotated[
        str | None,
        typer.Option(help="Name of the run, part of every key: the same seed and run again change nothing."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable; amounts are text.")] = False,
) -> None:
    """Publish a believable token economy, wait until every event is decided, and show the books.

    Uses the servers of the settings or of a running `tokentrail up`; without either, it starts throw-away servers and
    a worker.
    """
    if run is not None and not (run.isascii() and run.isalnum() and len(run) <= _MAX_RUN_LENGTH):
        raise UsageError(f"--run must be 1 to {_MAX_RUN_LENGTH} ASCII letters and digits.")
    economy = Economy(seed, run or secrets.token_hex(3), events)
    settings = load_settings()
    screen = console(stderr=as_json)
    if settings.database_url is None and settings.broker_url is None:
        report = run_on_throw_away_servers(settings, economy, screen)
    else:
        report = run_demo(settings, economy, screen)
    if as_json:
        typer.echo(report.json_text())
    else:
        show(report, screen)
    if not report.balanced:
        raise typer.Exit(1)
