"""Durable servers, a fresh database for each run, workers, and waiting until all events are applied."""

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
from worker.migration import migrate
from worker.processes import Child, Family

RUN_TIMEOUT: Final = 300.0  # seconds
START_TIMEOUT: Final = 60.0  # seconds
STOP_TIMEOUT: Final = 30.0  # seconds
_POLL_INTERVAL: Final = 0.01  # seconds


class BenchmarkError(Exception):
    """A run did not end, a worker failed or an invariant is broken: there are no figures."""


@dataclass(frozen=True)
class Stage:
    """A PostgreSQL that syncs each commit and a Valkey that syncs each write."""

    server_url: str
    broker_url: str
    template: str
    logs: Path

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Self]:
        """Start servers, and remove them with their data afterwards."""
        with (
            embedded.servers(durable=True) as servers,
            tempfile.TemporaryDirectory(prefix="tokentrail-bench-") as logs,
            cls.using(servers.database_url, servers.broker_url, Path(logs)) as stage,
        ):
            yield stage

    @classmethod
    @contextlib.contextmanager
    def using(cls, server_url: str, broker_url: str, logs: Path) -> Iterator[Self]:
        """Use running servers: creates databases on PostgreSQL and flushes the Redis database."""
        template = _create(server_url, "template1")
        try:
            migrate(_named(server_url, template))
            yield cls(server_url, broker_url, template, logs)
        finally:
            _drop(server_url, template)

    @contextlib.contextmanager
    def run(self) -> Iterator[Run]:
        """A migrated, empty database and an empty broker."""
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
    """The database and the broker of one measurement."""

    stage: Stage
    database_url: str
    redis: redis.Redis
    owner: psycopg.Connection[Any]

    def settings(self) -> Settings:
        """The settings of this run's workers."""
        return Settings(DATABASE_URL=self.database_url, BROKER_URL=self.stage.broker_url)

    def ledger_connection(self) -> psycopg.Connection[Any]:
        """A connection with the worker's session settings."""
        return connect(self.database_url, self.settings())

    @contextlib.contextmanager
    def workers(self, *commands: Sequence[str], consumers: int, **settings: str) -> Iterator[list[int]]:
        """Run these commands while the block runs; yields their pids once `consumers` workers are connected."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TOKENTRAIL_")}
        environment |= {
            "DATABASE_URL": self.database_url,
            "BROKER_URL": self.stage.broker_url,
            "TOKENTRAIL_HOME": str(self.stage.logs),  # else the servers of a running `tokentrail up` would be used
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
            self._await(lambda: self._consumers() >= consumers, children, START_TIMEOUT)
            yield [child.pid for child in children]
            for child in children:
                if not child.running:
                    raise BenchmarkError(child.ending)
        finally:
            family.stop(children, grace=STOP_TIMEOUT)

    def _consumers(self) -> int:
        # Each worker subscribes to remote control.
        return sum(client["psub"] != "0" for client in self.redis.client_list())

    def _await(
        self, condition: Callable[[], bool], children: Sequence[Child] = (), timeout: float = RUN_TIMEOUT
    ) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            for child in children:
                if not child.running:
                    raise BenchmarkError(child.ending)
            if time.monotonic() > deadline:
                raise BenchmarkError(f"A run did not end within {timeout:.0f} s; logs are in {self.stage.logs}.")
            time.sleep(_POLL_INTERVAL)

    def records(self) -> int:
        """The number of applied events."""
        row = self.owner.execute("SELECT count(*) FROM transaction_record").fetchone()
        assert row is not None
        return int(row[0])

    def await_applied(self, records: int, queues: Sequence[str] = ("tokens",)) -> None:
        """Wait until `records` records are committed and Redis holds no message, queued or in flight."""

        def done() -> bool:
            with self.redis.pipeline(transaction=False) as pipe:
                for queue in queues:
                    pipe.llen(queue)
                pipe.hlen("unacked")
                # With kombu's own transport a message is in neither for a moment, hence the records too.
                return not any(pipe.execute()) and self.records() == records

        self._await(done)

    def verify(self) -> None:
        """Raise BenchmarkError unless every invariant of the ledger holds."""
        if broken := check(self.owner):
            raise BenchmarkError(f"The run broke an invariant: {broken[0].sentence} {broken[0].rows[:1]}")


def tokentrail_worker(*arguments: str) -> list[str]:
    """The command line of a tokentrail worker."""
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
