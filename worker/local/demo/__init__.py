"""`tokentrail demo`: publish a small token economy, wait until every event is decided, and show the books.

economy.py  the events
report.py   what PostgreSQL holds afterwards, as tables or JSON
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from pydantic import SecretStr

from worker.config import ROOT
from worker.db import connect
from worker.errors import TokentrailError
from worker.local.demo import report
from worker.local.demo.economy import Delivery, Economy
from worker.local.demo.report import Report, show
from worker.local.embedded import servers
from worker.migration import migrate
from worker.output import progress
from worker.processes import Child
from worker.read.connection import read_once
from worker.schema_version import check_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import psycopg
    from rich.console import Console

    from schema.events import Event
    from schema.publisher import Publisher
    from worker.config import Settings

__all__ = ["DemoError", "Economy", "Report", "run_demo", "run_on_throw_away_servers", "show"]

#: Seconds without a further outcome after which the demo gives up.
_MAX_IDLE_SECONDS: Final = 60.0
#: Seconds the demo's own worker has to stop.
_GRACE_SECONDS: Final = 10.0
#: Events published between two updates of the progress bar.
_STEP: Final = 5_000


class DemoError(TokentrailError):
    """The demo cannot finish; the message says why, and what to do."""


def run_on_throw_away_servers(settings: Settings, economy: Economy, console: Console) -> Report:
    """Run the demo on servers and a worker that are started here; nothing of them is left afterwards.

    Raises EmbeddedError when a server fails, and what `run_demo` raises.
    """
    console.print("Starting throw-away servers and a worker …")
    with servers() as running:
        migrate(running.database_url)
        worker = Child(
            "worker",
            [sys.executable, "-m", "worker.cli", "worker", "--name", "demo"],
            env={**os.environ, "DATABASE_URL": running.database_url, "BROKER_URL": running.broker_url},
            cwd=ROOT,
            log=running.logs / "worker.log",
        )

        def check() -> None:
            running.check()
            if not worker.running:
                raise DemoError(f"The demo's {worker.ending}")

        urls = {"database_url": SecretStr(running.database_url), "broker_url": SecretStr(running.broker_url)}
        worker.start()
        try:
            return run_demo(settings.model_copy(update=urls), economy, console, check)
        finally:
            worker.stop(signal.SIGTERM, _GRACE_SECONDS)


def run_demo(
    settings: Settings, economy: Economy, console: Console, check: Callable[[], None] = lambda: None
) -> Report:
    """Publish the economy, wait until every event has an outcome, and read the books. Progress goes to the console.

    A worker must be running elsewhere; `check` is called while waiting for it, and may raise. Raises ConfigError or
    SchemaError before anything is published, PublishError when Redis does not accept an event, and DemoError when no
    further event is decided for a minute.
    """
    deliveries = list(economy.deliveries())
    published = sum(len(delivery.events) for delivery in deliveries)
    with connect(settings.database(), settings, name="tokentrail demo") as connection:
        if warning := check_schema(connection):
            console.print(warning)
        with settings.publisher() as publisher:
            console.print(
                f"Publishing {economy.size:,} events of {len(economy.users)} users,"
                f" {published - economy.size:,} of them twice …"
            )
            began = time.monotonic()
            _publish(publisher, deliveries, published, console)
        _wait(connection, economy, console, check)
        seconds = time.monotonic() - began
        console.print(f"All decided {seconds:.1f} s after the first was published.")
        console.print()
    read = partial(report.read, economy=economy, published=published)
    return read_once(settings.database(), read, application_name="tokentrail demo")


def _publish(publisher: Publisher, deliveries: Iterable[Delivery], total: int, console: Console) -> None:
    singles: list[Event] = []
    with progress("publishing", total, console) as advance:

        def send() -> None:
            publisher.publish_all(singles)
            advance(len(singles))
            singles.clear()

        for delivery in deliveries:
            if delivery.bulk:
                send()
                publisher.publish_bulk(delivery.events)
                advance(len(delivery.events))
            else:
                singles.extend(delivery.events)
            if len(singles) >= _STEP:
                send()
        send()


def _wait(connection: psycopg.Connection, economy: Economy, console: Console, check: Callable[[], None]) -> None:
    with progress("applying", economy.size, console) as advance:
        decided, last_progress = 0, time.monotonic()
        while decided < economy.size:
            check()
            count = report.count_decided(connection, economy)
            if count > decided:
                advance(count - decided)
                decided, last_progress = count, time.monotonic()
            elif time.monotonic() - last_progress > _MAX_IDLE_SECONDS:
                raise DemoError(
                    f"{economy.size - decided:,} of {economy.size:,} events have no outcome, and none was decided in"
                    f" the last {_MAX_IDLE_SECONDS:.0f} s: is a worker running? Start one with `tokentrail worker`."
                )
            else:
                time.sleep(0.2)
