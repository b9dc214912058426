"""`tokentrail demo`: publish a small token economy, wait until all of it is decided, and show what became of it.

economy.py  the events
report.py   what PostgreSQL says afterwards
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from worker.db import connect
from worker.local.demo import report
from worker.local.demo.economy import Delivery, Economy
from worker.local.demo.report import Report, show
from worker.output import progress
from worker.schema_version import check_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import psycopg
    from rich.console import Console

    from schema.events import Event
    from schema.publisher import Publisher
    from worker.config import Settings

__all__ = ["DemoError", "Economy", "Report", "run_demo", "show"]

#: The demo gives up when so many seconds pass without a further event decided.
_PATIENCE_SECONDS: Final = 60.0

_STEP: Final = 5_000  # events published between two looks of the bar


class DemoError(Exception):
    """The demo did not come to its end; the message says why, and what to do."""


def run_demo(
    settings: Settings, economy: Economy, console: Console, check: Callable[[], None] = lambda: None
) -> Report:
    """Publish the economy, wait until every event has an outcome, and read the books; the console shows how far it is.

    Somebody else runs the worker; `check` is called while we wait for it, and may raise. Raises ConfigError or
    SchemaError, with nothing published, PublishError when Redis does not take it, and DemoError when nothing has
    been decided for a minute.
    """
    deliveries = list(economy.deliveries())
    arriving = sum(len(delivery.events) for delivery in deliveries)
    with connect(settings.database(), settings, name="tokentrail demo") as connection:
        if warning := check_schema(connection):
            console.print(warning)
        with settings.publisher() as publisher:
            console.print(
                f"Publishing {economy.size:,} events of {len(economy.users)} users,"
                f" {arriving - economy.size:,} of them twice …"
            )
            began = time.monotonic()
            _publish(publisher, deliveries, arriving, console)
        _wait(connection, economy, console, check)
        seconds = time.monotonic() - began
        console.print(f"All decided {seconds:.1f} s after the first was published.")
        console.print()
        return report.read(connection, economy, arriving)


def _publish(publisher: Publisher, deliveries: Iterable[Delivery], arriving: int, console: Console) -> None:
    singles: list[Event] = []
    with progress("publishing", arriving, console) as advance:

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
        decided, since = 0, time.monotonic()
        while True:
            check()
            now_decided = report.decided(connection, economy)
            if now_decided > decided:
                advance(now_decided - decided)
                decided, since = now_decided, time.monotonic()
            if decided >= economy.size:
                return
            if time.monotonic() - since > _PATIENCE_SECONDS:
                raise DemoError(
                    f"{economy.size - decided:,} of {economy.size:,} events have no outcome, and none was decided for"
                    f" {_PATIENCE_SECONDS:.0f} s: is a worker running? Start one with `tokentrail worker`."
                )
            time.sleep(0.2)
