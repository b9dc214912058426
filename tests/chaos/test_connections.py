"""Connections to either server that are cut, stall, or become half-open."""

from __future__ import annotations

import time

import pytest

from tests.kit.proxy import Proxy
from tests.kit.wait import eventually

from .ground import LONG, Stream, sized

CUTS = sized(10, 60)


@pytest.fixture
def proxies(ground):
    with Proxy(ground.database_url) as to_postgres, Proxy(ground.broker_url) as to_redis:
        yield to_postgres, to_redis


def test_cut_connections_lose_nothing_and_leave_nothing_open(ground, books, proxies):
    ground.open(books)
    to_postgres, to_redis = proxies
    worker = ground.work(database_url=to_postgres.url, broker_url=to_redis.url, batch_size=100)
    before = worker.files(), worker.memory()
    cut = 0
    with Stream(ground, books, sized(2000, 20_000), pause=0.1):
        for number in range(CUTS):
            time.sleep(books.random.uniform(0.05, 0.3))
            cut += proxies[number % 2].cut()
            if number % 10 == 9:  # let it connect again: a cut while it connects is another case
                decided = ground.decided()
                eventually(lambda: ground.decided() > decided or not ground.queued())  # noqa: B023
    ground.drain(books).assert_nothing_lost(f"{cut} connections cut in {CUTS} cuts")
    assert worker.alive
    after = worker.files(), worker.memory()
    print(f"open files: {before[0]} before, {after[0]} after; memory: {before[1] >> 20} and {after[1] >> 20} MiB")
    assert after[0] <= before[0] + 8, "each reconnect leaves a file open"
    assert after[1] <= before[1] + (64 << 20), "each reconnect uses more memory"


def test_stalled_connections_are_waited_out(ground, books, proxies):
    ground.open(books)
    to_postgres, to_redis = proxies
    worker = ground.work(database_url=to_postgres.url, broker_url=to_redis.url, batch_size=100)
    stalls = sized(2, 8)
    with Stream(ground, books, sized(1000, 10_000)):
        for number in range(stalls):
            time.sleep(books.random.uniform(0.05, 0.3))
            proxy = proxies[number % 2]
            proxy.stall()
            time.sleep(books.random.uniform(1, 2))
            proxy.flow()
    ground.drain(books).assert_nothing_lost(f"{stalls} stalls")
    assert worker.alive


@pytest.mark.parametrize(
    "which",
    [
        "postgresql",
        pytest.param("redis", marks=pytest.mark.skipif(not LONG, reason="takes a minute: `make chaos` runs it")),
    ],
)
def test_a_half_open_connection_is_noticed_and_replaced(ground, books, proxies, which):
    """No bytes arrive and neither side closes: only a timeout of the worker notices it."""
    ground.open(books)
    to_postgres, to_redis = proxies
    settings = {"lock_timeout": 0.5, "statement_timeout": 1, "idle_in_transaction_timeout": 1, "batch_size": 100}
    worker = ground.work(database_url=to_postgres.url, broker_url=to_redis.url, **settings)
    for _ in range(sized(1, 3)):
        ground.publish(books.messages_for(300))
        eventually(lambda: ground.queued() + ground.in_flight() == 0)
        proxy = to_postgres if which == "postgresql" else to_redis
        assert proxy.half_open()
        began = time.monotonic()
        ground.publish(books.messages_for(300))
        verdict = ground.drain(books, 120)
        print(f"noticed and caught up after {time.monotonic() - began:.1f} s")
    verdict.assert_nothing_lost(f"half-open connections to {which}")
    assert worker.alive
