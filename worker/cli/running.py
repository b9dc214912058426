"""`tokentrail up` and `tokentrail demo`: all of it on this machine."""

from __future__ import annotations

import os
import secrets
import sys
from typing import Annotated

import typer
from pydantic import SecretStr
from rich.console import Console

from worker.cli.usage import Misused
from worker.config import ROOT, Settings, settings
from worker.local import up as running
from worker.local.demo import DemoError, Economy, Report, run_demo, show
from worker.local.embedded import servers
from worker.output import console
from worker.processes import Child, Family
from worker.readiness import look_at_broker
from worker.schema_version import migrate

#: Seconds that the demo's own worker gets to end.
_GRACE = 10.0


def up(
    demo: Annotated[bool, typer.Option("--demo", help="Publish the demo economy once everything runs.")] = False,
) -> None:
    """Run PostgreSQL, Valkey, a worker, the API and Flower here, until Ctrl-C.

    With DATABASE_URL or BROKER_URL set, those servers are used instead of embedded ones.
    """
    running.up(with_demo=demo, look_at_broker=look_at_broker)


def demo(
    seed: Annotated[int, typer.Option(help="Another number, another economy.")] = 1,
    events: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many different events.")] = 5000,
    run: Annotated[
        str | None,
        typer.Option(help="Name of the run, part of every key: the same seed and run again change nothing."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable; amounts are text.")] = False,
) -> None:
    """Publish a believable token economy, wait until all of it is decided, and show the books.

    Uses the servers of the settings or of a running `tokentrail up`; with neither, throw-away ones and a worker
    of its own.
    """
    if run is not None and not (run.isascii() and run.isalnum() and len(run) <= 40):  # noqa: PLR2004 - the sentence says it
        raise Misused("--run must be 1 to 40 ASCII letters and digits.")
    economy = Economy(seed, run or secrets.token_hex(3), events)
    found = settings()
    progress = console(stderr=as_json)
    if found.database_url is None and found.broker_url is None:
        report = on_throw_away_servers(found, economy, progress)
    else:
        report = run_demo(found, economy, progress)
    if as_json:
        typer.echo(report.json_text())
    else:
        show(report, progress)
    if not report.balanced:
        raise typer.Exit(1)


def on_throw_away_servers(found: Settings, economy: Economy, progress: Console) -> Report:
    """The demo on servers and a worker of its own, of which nothing is left afterwards."""
    progress.print("Starting throw-away servers and a worker …")
    with servers() as pair:
        migrate(pair.database_url)
        family = Family()
        worker = Child(
            "worker",
            [sys.executable, "-m", "worker.cli", "worker", "--name", "demo"],
            env={**os.environ, "DATABASE_URL": pair.database_url, "BROKER_URL": pair.broker_url},
            cwd=ROOT,
            log=pair.logs / "worker.log",
        )

        def check() -> None:
            pair.check()
            if not worker.running:
                raise DemoError(f"The demo's worker {worker.last_words}")

        addresses = {"database_url": SecretStr(pair.database_url), "broker_url": SecretStr(pair.broker_url)}
        family.add(worker)
        try:
            return run_demo(found.model_copy(update=addresses), economy, progress, check)
        finally:
            family.stop([worker], _GRACE)
