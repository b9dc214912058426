"""Servers that a test may break, publishing to them, and the verdict at the end."""

from __future__ import annotations

import itertools
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from schema.publisher import Publisher, PublishError
from tests.kit.messages import PRIORITY_STEPS, key
from tests.kit.wait import eventually
from tests.kit.workers import Worker
from worker.ledger.invariants import check

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from schema.events import Event
    from worker.local.embedded import PostgresServer, ValkeyServer

    from .books import Books

LONG = os.environ.get("TOKENTRAIL_CHAOS") == "long"

#: Seconds without a heartbeat after which the messages of a worker are restored.
VISIBILITY_TIMEOUT = 1

#: Seconds a burn is parked for its accrual. An accrual in flight in a worker that dies is restored after the visibility
#: timeout plus the interval of the check, half of it; patience is longer than two such restores.
BURN_PATIENCE = 4

#: Seconds for which queue and `unacked` must be empty before a key without an outcome counts as lost.
GRACE_SECONDS = 2

LISTS = [key("tokens", step) for step in PRIORITY_STEPS]

_OUTCOMES = """
    SELECT user_id, idempotency_key, 'transaction_record' FROM transaction_record
    UNION ALL SELECT user_id, idempotency_key, 'rejected_event' FROM rejected_event
    UNION ALL SELECT user_id, idempotency_key, 'dead_letter' FROM dead_letter WHERE state = 'open'
"""


def sized(short: int, long: int) -> int:
    """`short` for `make test`, `long` for `make chaos`."""
    return long if LONG else short


class Ground:
    """The database, broker and workers of one test, which may break the servers."""

    def __init__(self, postgres: PostgresServer, valkey: ValkeyServer, database: str, folder: Path) -> None:
        self.postgres = postgres
        self.valkey = valkey
        self.database_url = urlsplit(postgres.url)._replace(path=f"/{database}").geturl()
        self.broker_url = valkey.url
        self.folder = folder
        self.workers: list[Worker] = []
        self._names = itertools.count(1)

    # Workers

    def start(
        self, *, database_url: str = "", broker_url: str = "", poison: str = "", quit_at: str = "", **settings: Any
    ) -> Worker:
        """Start a worker, without waiting for it. `settings` are fields of worker.config.Settings."""
        settings = {"visibility_timeout": VISIBILITY_TIMEOUT, "burn_patience": BURN_PATIENCE, **settings}
        environment = {f"TOKENTRAIL_{name.upper()}": str(value) for name, value in settings.items()}
        environment |= {
            "DATABASE_URL": database_url or self.database_url,
            "BROKER_URL": broker_url or self.broker_url,
        }
        worker = Worker(f"w{next(self._names)}", self.folder, environment, poison=poison, quit_at=quit_at)
        self.workers.append(worker)
        return worker

    def work(self, **settings: Any) -> Worker:
        """Start a worker and wait until it consumes."""
        return self.start(**settings).ready()

    # Redis

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.broker_url, socket_timeout=5, retry=Retry(NoBackoff(), 0))

    def queued(self) -> int:
        with self.redis() as client:
            return sum(client.llen(name) for name in LISTS)

    def in_flight(self) -> int:
        with self.redis() as client:
            return max(client.hlen("unacked"), client.zcard("unacked_index"))

    def publish(self, events: Sequence[Event], seconds: float = 60) -> None:
        """Publish until everything is acknowledged: like a producer, send again what may not have arrived."""
        deadline = time.monotonic() + seconds
        with Publisher(self.broker_url, timeout=2) as publisher:
            while events:
                try:
                    publisher.publish_all(events)
                except PublishError as error:
                    if time.monotonic() > deadline:
                        raise
                    events = error.events
                    time.sleep(0.05)
                else:
                    return

    def publish_bulk(self, events: Sequence[Event]) -> None:
        with Publisher(self.broker_url) as publisher:
            publisher.publish_bulk(events)

    def open(self, books: Books, *, worker_of: dict[str, Any] | None = None) -> None:
        """Give the shared accounts their opening balances, with a worker that then stops."""
        books.messages += 1
        self.publish_bulk(books.opening())
        funder = self.work(**(worker_of or {}))
        eventually(lambda: self.decided() == len(books.expected))
        assert funder.stop() == 0, funder.log_end()

    # PostgreSQL

    def decided(self) -> int:
        """How many outcomes there are; 0 while PostgreSQL is unavailable."""
        with suppress(psycopg.OperationalError), self.connect() as connection:
            row = connection.execute(f"SELECT count(*) FROM ({_OUTCOMES})").fetchone()
            return row[0] if row else 0
        return 0

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.database_url, autocommit=True, connect_timeout=5)

    def holds_locks(self) -> bool:
        """Whether a worker is in a transaction now."""
        with self.connect() as connection:
            transactions = connection.execute(
                "SELECT FROM pg_stat_activity WHERE application_name = 'tokentrail worker' AND xact_start IS NOT NULL"
            )
            return transactions.rowcount > 0

    # Verdict

    def drain(self, books: Books, seconds: float = 90) -> Verdict:
        """Wait until queue and `unacked` are empty and every key has an outcome, and return the verdict.

        If some keys have none, wait GRACE_SECONDS more. After `seconds` return the verdict in any case.
        """
        deadline = time.monotonic() + seconds
        empty_since = None
        while time.monotonic() < deadline:
            if self.queued() + self.in_flight():
                empty_since = None
            else:
                now = time.monotonic()
                empty_since = empty_since or now
                if self.decided() >= len(books.expected) or now - empty_since > GRACE_SECONDS:
                    break
            time.sleep(0.1)
        return Verdict(self, books)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()


class Verdict:
    """Whether each key and account is as the books expect, and how many messages are left in Redis."""

    def __init__(self, ground: Ground, books: Books) -> None:
        with ground.connect() as connection:
            wrong = books.wrong_outcomes(connection.execute(_OUTCOMES).fetchall())
            self.balances = books.wrong_balances(connection.execute("SELECT user_id, balance FROM account").fetchall())
            self.broken = check(connection)
        self.lost = wrong.pop("lost")
        self.wrong = {what: names for what, names in wrong.items() if names}
        self.queued, self.in_flight = ground.queued(), ground.in_flight()
        self._books = books
        self._logs = "\n".join(f"--- {worker.name}\n{worker.log_end()}" for worker in ground.workers[-3:])

    def assert_nothing_lost(self, faults: str) -> None:
        """One outcome for each key and the right one, every balance and invariant, nothing left in Redis."""
        print(f"{faults}: {self}")
        problems = []
        if self.lost:
            kind = "undecided" if self.queued or self.in_flight else "lost"
            problems.append(f"{len(self.lost)} of {len(self._books.expected)} {kind}: {', '.join(self.lost[:10])}")
        problems += [f"{len(names)} {what}: {'; '.join(names[:10])}" for what, names in self.wrong.items()]
        if self.balances:
            problems.append(f"balances: {'; '.join(self.balances[:10])}")
        problems += [f"broken: {broken.sentence}: {broken.rows[:3]}" for broken in self.broken]
        if self.queued or self.in_flight:
            problems.append(f"left in Redis: {self.queued} queued, {self.in_flight} unacknowledged")
        assert not problems, "\n".join([*problems, self._logs])

    def __str__(self) -> str:
        twice = len(self.wrong.get("decided twice", ()))
        return (
            f"{self._books.messages} messages of {len(self._books.expected)} events,"
            f" {len(self.lost)} {'undecided' if self.queued or self.in_flight else 'lost'}, {twice} decided twice"
        )


class Stream:
    """A producer that publishes in a thread, a portion at a time, whatever happens to Redis.

    The events are made in advance, so that the same seed publishes the same events.
    """

    def __init__(self, ground: Ground, books: Books, messages: int, *, portion: int = 100, pause: float = 0.02) -> None:
        events = books.messages_for(messages)
        self._portions = [events[start : start + portion] for start in range(0, len(events), portion)]
        self._ground, self._pause = ground, pause
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def _run(self) -> None:
        try:
            for portion in self._portions:
                self._ground.publish(portion)
                time.sleep(self._pause)
        except BaseException as failure:  # noqa: BLE001 - __exit__ raises it in the thread of the test
            self._failure = failure

    @property
    def publishing(self) -> bool:
        return self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive(), "the producer did not finish"
        if self._failure:
            raise self._failure
