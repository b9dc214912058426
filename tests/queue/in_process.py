"""A worker without Celery's process: a Batcher with a real channel, ledger and database, moved turn by turn.

The test's thread is the event loop. For the batcher and what it parks, time passes by `pass_seconds` only, tick by
tick; the ledger thread waits for locks and servers in real time.
"""

from __future__ import annotations

import select
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import kombu
import psycopg
from celery import Celery

from schema.broker import connect
from schema.publisher import Publisher
from tests.kit.consumer import OURS, queue_of
from tests.kit.wait import eventually
from worker.config import Settings
from worker.ledger.invariants import check
from worker.queue import batcher, parking
from worker.queue.batcher import Batcher, Idle
from worker.queue.broker import AtomicBroker, StockBroker
from worker.queue.intake import Intake
from worker.queue.parking import POLL_SECONDS
from worker.queue.parsing import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@cache
def celery_app() -> Celery:
    """What Celery's requests need: our settings, and tasks of our names."""
    app = Celery("in-process", set_as_current=False)
    app.config_from_object("celeryconfig")

    def never_run() -> None:
        raise AssertionError

    for name in TASKS:
        app.task(name=name, shared=False)(never_run)
    return app


class Clock:
    """In place of `time.monotonic()` for batcher and parking: it stands until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0  # seconds

    def __call__(self) -> float:
        return self.now


class InProcessWorker:
    """`worker.publish(…)`, `worker.until(…)`, `worker.pass_seconds(…)`: see the module."""

    def __init__(self, database_url: str, broker_url: str, clock: Clock, **settings: Any) -> None:
        self.settings = Settings(DATABASE_URL=database_url, **settings)
        self.clock = clock
        self.publisher = Publisher(broker_url)
        self.redis = connect(broker_url)
        atomic = self.settings.transport == "atomic"
        self.intake = Intake(self.settings, "in-process")
        self.batcher = Batcher(self.settings, self.intake, AtomicBroker() if atomic else StockBroker())
        self._url, self._transport = broker_url, OURS if atomic else "kombu.transport.redis:Transport"
        self.database = psycopg.connect(database_url, autocommit=True)
        self.connect()

    def connect(self) -> None:
        """Consume through a connection of its own, as after a lost one."""
        self.connection = kombu.Connection(self._url, transport=self._transport)
        self.channel = self.connection.channel()
        self.channel.basic_qos(0, max(2 * self.settings.batch_size, 1000), False)
        self.intake.attach(celery_app(), self.connection.connection_errors, None)
        self.batcher.attach(self.channel)
        kombu.Consumer(self.channel, [queue_of("tokens")], on_message=self.batcher.receive, accept=["json"]).consume()

    def publish(self, *events: Any) -> None:
        self.publisher.publish_all(events)

    def turn(self) -> None:
        """One turn of the event loop: fetch, deliver, and see to a wake-up."""
        with suppress(TimeoutError):
            self.connection.drain_events(timeout=0.01)
        if select.select([self.batcher.wakeup], [], [], 0)[0]:
            self.batcher.advance()

    def turns(self, count: int = 20) -> None:
        """So many turns as any fetch takes that is on its way."""
        for _ in range(count):
            self.turn()

    def until(self, condition: Callable[[], Any], what: str = "the condition holds") -> None:
        def turned() -> Any:
            self.turn()
            return condition()

        eventually(turned, what)

    @property
    def busy(self) -> bool:
        """Whether there is anything that is neither parked nor acknowledged."""
        own = self.batcher
        return not isinstance(own._job, Idle) or bool(own._arrivals or own._queue or own._finished)

    def rest(self) -> None:
        """Until nothing is left to fetch and to apply; parked events may be."""
        self.until(lambda: self.redis.llen("tokens") == 0 and not self.busy, "the worker rests")
        self.turn()  # in which the last acknowledgements reach Redis

    def pass_seconds(self, seconds: float, *, rest: bool = True) -> None:
        """Let time pass tick by tick; with `rest` each tick's job is done before the next."""
        for _ in range(round(seconds / POLL_SECONDS)):
            self.clock.now += POLL_SECONDS
            self.batcher.on_tick()
            self.turn()
            if rest:
                self.until(lambda: not self.busy, "the tick's job is done")

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return self.database.execute(query, parameters).fetchall()

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT count(*) FROM {table}")[0][0])

    def balance(self, user_id: str) -> Any:
        rows = self.rows("SELECT balance FROM account WHERE user_id = %s", user_id)
        return rows[0][0] if rows else None

    def keys(self, user_id: str) -> list[str]:
        """The idempotency keys of an account's records, in their order."""
        query = "SELECT idempotency_key FROM transaction_record WHERE user_id = %s ORDER BY sequence"
        return [key for (key,) in self.rows(query, user_id)]

    def in_flight(self) -> int:
        return int(self.redis.hlen("unacked"))

    @property
    def parked(self) -> int:
        return len(self.batcher._parking._burns) + len(self.batcher._parking._locked)

    def close(self) -> None:
        self.batcher.drain()
        self.connection.release()
        broken = [invariant.sentence for invariant in check(self.database)]
        self.database.close()
        self.publisher.close()
        self.redis.close()
        assert broken == []


@contextmanager
def in_process(monkeypatch: Any, database_url: str, broker_url: str) -> Iterator[Callable[..., InProcessWorker]]:
    """`start(burn_patience=2)` gives a worker; all are closed in the end."""
    clock = Clock()
    monkeypatch.setattr(parking, "monotonic", clock)
    monkeypatch.setattr(batcher, "monotonic", clock)
    workers: list[InProcessWorker] = []

    def start(**settings: Any) -> InProcessWorker:
        workers.append(InProcessWorker(database_url, broker_url, clock, **settings))
        return workers[-1]

    try:
        yield start
    finally:
        for worker in workers:
            worker.close()
