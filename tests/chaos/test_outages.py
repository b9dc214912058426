"""Servers that crash, refuse or are full: the worker keeps its messages, logs it once, and continues by itself."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress

import psycopg
import pytest
import redis

from tests.kit.wait import eventually

from .ground import Stream, sized

#: What the worker logs when PostgreSQL is unavailable, and when it is available again.
UNAVAILABLE, AVAILABLE = "database not available", "database available again"

#: Messages of a run, and how often its server crashes.
MESSAGES, OUTAGES = sized(2000, 20_000), sized(2, 9)


def test_nothing_is_lost_and_no_worker_ends_when_redis_crashes(ground, books):
    ground.open(books)
    workers = [ground.work(batch_size=100, burn_patience=60) for _ in range(2)]
    with Stream(ground, books, MESSAGES, pause=OUTAGES / (MESSAGES / 100)) as stream:
        crashes = 0
        while crashes < OUTAGES:
            time.sleep(books.random.uniform(0.2, 1.0))
            ground.valkey.kill()
            time.sleep(books.random.uniform(0, 0.5))
            ground.valkey.start()
            crashes += 1
            published_to_the_end = stream.publishing
    ground.drain(books).assert_nothing_lost(
        f"{crashes} crashes of Redis, publishing to the end: {published_to_the_end}"
    )
    assert [worker.alive for worker in workers] == [True, True]


def test_nothing_is_lost_and_no_worker_ends_when_postgresql_crashes(ground, books):
    """Stopped in immediate mode, which is a crash, at instants when a worker may be in a transaction."""
    ground.open(books)
    ground.publish(books.uncovered(3))
    workers = [ground.work(batch_size=100) for _ in range(2)]
    in_transaction = crashes = 0
    with Stream(ground, books, MESSAGES, pause=OUTAGES / (MESSAGES / 100)):
        while crashes < OUTAGES:
            time.sleep(books.random.uniform(0.2, 1.0))
            in_transaction += ground.holds_locks()
            ground.postgres.stop("immediate")
            time.sleep(books.random.uniform(0, 0.5))
            ground.postgres.start()
            crashes += 1
    faults = f"{crashes} crashes of PostgreSQL, {in_transaction} of them seen to be in a transaction"
    ground.drain(books).assert_nothing_lost(faults)
    assert [worker.alive for worker in workers] == [True, True]
    # Each of the two logs it once an outage, however often it tried.
    assert max(worker.logged(UNAVAILABLE) for worker in workers) <= crashes
    assert all(worker.logged(AVAILABLE) == worker.logged(UNAVAILABLE) for worker in workers)


def test_a_full_redis_is_drained_without_an_operator(ground, books):
    ground.open(books)
    with ground.redis() as client:
        ground.publish(books.messages_for(sized(2000, 20_000)))
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 100_000)
        with pytest.raises(redis.OutOfMemoryError):
            client.lpush("elsewhere", "x")
        workers = [ground.work() for _ in range(2)]
        eventually(lambda: ground.queued() + ground.in_flight() == 0)
        client.config_set("maxmemory", 0)
    ground.publish(books.messages_for(100))
    ground.drain(books).assert_nothing_lost("a full Redis")
    assert [worker.alive for worker in workers] == [True, True]


def test_a_worker_keeps_its_messages_while_postgresql_is_read_only(ground, books):
    ground.open(books)
    worker = ground.work(batch_size=100)

    def read_only(value):
        with ground.connect() as connection:
            connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            connection.execute("SELECT pg_reload_conf()")

    interrupt(ground, books, worker, lambda: read_only("on"), lambda: read_only("off"))


def test_a_worker_keeps_its_messages_while_postgresql_has_no_connection_left(ground, books):
    ground.open(books)
    worker = ground.work(batch_size=100)
    with ExitStack() as held:

        def take_all():
            """Take all connections, the worker's too."""
            breaker = take_free_ones()
            workers = "FROM pg_stat_activity WHERE application_name = 'tokentrail worker'"
            breaker.execute(f"SELECT pg_terminate_backend(pid) {workers}")
            eventually(lambda: breaker.execute(f"SELECT {workers}").rowcount == 0)
            take_free_ones()

        def take_free_ones():
            """Take connections until none is left; returns the first of those taken."""
            with suppress(psycopg.OperationalError):
                while True:
                    taken.append(held.enter_context(ground.connect()))
            return taken[0]

        taken: list[psycopg.Connection] = []
        interrupt(ground, books, worker, take_all, held.close)


def interrupt(ground, books, worker, begin_outage, end_outage):
    """In an outage of PostgreSQL the worker keeps its messages, stops fetching, logs it once, and then continues."""
    begin_outage()
    ground.publish(books.messages_for(100))
    eventually(lambda: worker.logged(UNAVAILABLE) == 1)
    ground.publish(books.messages_for(1500))
    time.sleep(2)  # the outage: several attempts, and longer than the visibility timeout
    in_flight, queued = ground.in_flight(), ground.queued()
    print(f"{in_flight} messages in flight, {queued} in the queue during the outage")
    assert in_flight > 0, "it does not keep its messages"
    assert queued >= 1000, "it fetches messages that it cannot decide"
    assert worker.logged("their worker sent no heartbeat") == 0, "another worker's heartbeats have stopped"
    end_outage()
    ground.drain(books).assert_nothing_lost("PostgreSQL was unavailable")
    assert worker.alive
    assert (worker.logged(UNAVAILABLE), worker.logged(AVAILABLE)) == (1, 1)
