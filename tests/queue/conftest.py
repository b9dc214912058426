"""One worker for the tests of a module that only send it messages; each of them has a user of its own."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

from tests.kit.events import accrual
from tests.kit.stage import Stage, Watcher
from tests.kit.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def shared_stage(request, servers, template, _logical_databases, tmp_path_factory) -> Iterator[Stage]:
    name = f"{template}_{request.module.__name__.rpartition('.')[2]}"
    broker_url = urlsplit(servers.broker_url)._replace(path=f"/{next(_logical_databases)}").geturl()
    with redis.Redis.from_url(broker_url) as client:
        client.flushdb()
    with psycopg.connect(servers.database_url, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        database_url = urlsplit(servers.database_url)._replace(path=f"/{name}").geturl()
        try:
            with Stage(database_url, broker_url, tmp_path_factory.mktemp("shared")) as stage:
                stage.start("--queues", "tokens,tokens.0,tokens.2", burn_patience=0)
                yield stage
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def shared_watcher(shared_stage) -> Iterator[Watcher]:
    with Watcher(shared_stage.broker_url) as watcher:
        # A subscription takes a moment.
        eventually(lambda: watcher.types(shared_stage.publisher.publish(accrual("nobody", 1, "to be seen"))))
        yield watcher


@pytest.fixture
def user() -> str:
    return f"ann {secrets.token_hex(4)}"
