"""Where benchmarks run: durable servers of their own, a fresh database a run, workers, and when all is done."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

import psycopg
import redis

from worker.config import ROOT, Settings
from worker.db import connect
from worker.ledger.invariants import check
from worker.local import embedded
from worker.processes import Child, Family
from worker.schema_version import migrate

#: Seconds after which a run that does not end is given up.
GIVE_UP: Final = 300.0

_POLL: Final = 0.01  # seconds


class BenchmarkError(Exception):
    """A run did not do what it should have; its figures would mean nothing."""


@dataclass(frozen=True)
class Stage:
    """A PostgreSQL that syncs each commit and a Valkey that syncs each write."""

    server_url: str
    broker_url: str
    template: str
    logs: Path

    @classmethod
    @contextlib.contextmanager
    def of_its_own(cls) -> Iterator[Self]:
        """Servers that are thrown away afterwards."""
        with (
            embedded.servers(durable=True) as servers,
            tempfile.TemporaryDirectory(prefix="tokentrail-bench-") as logs,
            cls.on(servers.database_url, servers.broker_url, Path(logs)) as stage,
        ):
            yield stage

    @classmethod
    @contextlib.contextmanager
    def on(cls, server_url: str, broker_url: str, logs: Path) -> Iterator[Self]:
        """Servers that are there: a template with the schema is made on one, and the other is flushed at will."""
        template = _create(server_url, "template1")
        try:
            migrate(_named(server_url, template))
            yield cls(server_url, broker_url, template, logs)
        finally:
            _drop(server_url, template)

    @contextlib.contextmanager
    def run(self) -> Iterator[Run]:
        """A migrated, empty database and an empty broker, for one measurement."""
        name = _create(self.server_url, self.template)
        url = _named(self.server_url, name)
        try:
            with redis.Redis.from_url(self.broker_url) as client, psycopg.connect(url, autocommit=True) as owner:
                client.flushdb()
                yield Run(self, url, client, owner)
        finally:
            _drop(self.server_url, name)


@dataclass(frozen=True)
class Run:
    """One measurement's database, and the broker."""

    stage: Stage
    database_url: str
    redis: redis.Redis
    owner: psycopg.Connection[Any]

    def settings(self) -> Settings:
        """The settings of a worker of this run."""
        return Settings(DATABASE_URL=self.database_url, BROKER_URL=self.stage.broker_url)

    def ledger_connection(self) -> psycopg.Connection[Any]:
        """A connection as the worker has it."""
        return connect(self.database_url, self.settings())

    @contextlib.contextmanager
    def workers(self, *commands: Sequence[str], consumers: int, **settings: str) -> Iterator[list[int]]:
        """Run these programs until the block is left; yields their pids once so many consumers are connected."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TOKENTRAIL_")}
        environment |= {
            "DATABASE_URL": self.database_url,
            "BROKER_URL": self.stage.broker_url,
            "TOKENTRAIL_HOME": str(self.stage.logs),  # no `tokentrail up` of this folder decides what is measured
            **{f"TOKENTRAIL_{name.upper()}": value for name, value in settings.items()},
        }
        family = Family()
        children = [
            Child(f"worker {n}", command, env=environment, cwd=ROOT, log=self.stage.logs / f"worker-{n}.log")
            for n, command in enumerate(commands)
        ]
        try:
            for child in children:
                family.add(child)
            self._await(lambda: self._consumers() >= consumers, children, 60)
            yield [child.pid for child in children]
            for child in children:
                if not child.running:
                    raise BenchmarkError(f"{child.name} {child.last_words}")
        finally:
            family.stop(children, grace=30)

    def _consumers(self) -> int:
        # Each worker listens to remote control.
        return sum(client["psub"] != "0" for client in self.redis.client_list())

    def _await(self, holds: Callable[[], bool], children: Sequence[Child] = (), seconds: float = GIVE_UP) -> None:
        end = time.monotonic() + seconds
        while not holds():
            for child in children:
                if not child.running:
                    raise BenchmarkError(f"{child.name} {child.last_words}")
            if time.monotonic() > end:
                raise BenchmarkError(f"A run did not end within {seconds:.0f} s; logs are in {self.stage.logs}.")
            time.sleep(_POLL)

    def records(self) -> int:
        """How many events are applied."""
        row = self.owner.execute("SELECT count(*) FROM transaction_record").fetchone()
        assert row is not None
        return int(row[0])

    def await_applied(self, records: int, queues: Sequence[str] = ("tokens",)) -> None:
        """Return when so many records are committed and Redis holds no message any more, queued or in hand."""

        def done() -> bool:
            with self.redis.pipeline(transaction=False) as pipe:
                for queue in queues:
                    pipe.llen(queue)
                pipe.hlen("unacked")
                # kombu's own transport has a moment in which a message is in neither.
                return not any(pipe.execute()) and self.records() == records

        self._await(done)

    def verify(self) -> None:
        """Raise BenchmarkError unless every invariant of the ledger holds: what is fast must be right."""
        if broken := check(self.owner):
            raise BenchmarkError(f"After the run this does not hold: {broken[0].sentence} {broken[0].rows[:1]}")


def tokentrail_worker(*arguments: str) -> list[str]:
    """The command of our worker."""
    return [sys.executable, "-m", "worker.cli", "worker", *arguments]


def _create(server_url: str, template: str) -> str:
    name = f"tokentrail_bench_{secrets.token_hex(6)}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
    return name


def _drop(server_url: str, name: str) -> None:
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def _named(server_url: str, name: str) -> str:
    return urlsplit(server_url)._replace(path=f"/{name}").geturl()
