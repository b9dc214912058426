"""Servers that crash, refuse and fill up: the worker keeps its messages, says so once, and goes on by itself."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress

import psycopg
import pytest
import redis

from tests.kit.wait import eventually

from .ground import Stream, sized

#: What the worker says when it can not write, and when it can again.
AWAY, BACK = "database not available", "database available again"

#: Messages of a run, and how often its server goes away.
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
            last_flowed = stream.flows
    ground.drain(books).assert_nothing_lost(f"{crashes} crashes of Redis, under load to the last: {last_flowed}")
    assert [worker.alive for worker in workers] == [True, True]


def test_nothing_is_lost_and_no_worker_ends_when_postgresql_crashes(ground, books):
    """Stopped in immediate mode, which is a crash, while some worker is in a transaction."""
    ground.open(books)
    ground.publish(books.hopeless(3))
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
    told = f"{crashes} crashes of PostgreSQL, {in_transaction} of them seen to be in a transaction"
    ground.drain(books).assert_nothing_lost(told)
    assert [worker.alive for worker in workers] == [True, True]
    # Each of the two says it once an outage, however often it tried.
    assert max(worker.logged(AWAY) for worker in workers) <= crashes
    assert all(worker.logged(BACK) == worker.logged(AWAY) for worker in workers)


def test_a_full_redis_is_drained_without_an_operator(ground, books):
    ground.open(books)
    with ground.redis() as client:
        ground.publish(books.messages_for(sized(2000, 20_000)))
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 100_000)
        with pytest.raises(redis.OutOfMemoryError):
            client.lpush("elsewhere", "x")
        workers = [ground.work() for _ in range(2)]
        eventually(lambda: ground.queued() + ground.held() == 0)
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

    away_and_back(ground, books, worker, lambda: read_only("on"), lambda: read_only("off"))


def test_a_worker_keeps_its_messages_while_postgresql_has_no_connection_left(ground, books):
    ground.open(books)
    worker = ground.work(batch_size=100)
    with ExitStack() as held:

        def take_all():
            """Take every connection there is, the worker's too."""
            breaker = take_free_ones()
            workers = "FROM pg_stat_activity WHERE application_name = 'tokentrail worker'"
            breaker.execute(f"SELECT pg_terminate_backend(pid) {workers}")
            eventually(lambda: breaker.execute(f"SELECT {workers}").rowcount == 0)
            take_free_ones()

        def take_free_ones():
            """Take connections until there is none left; the first of all those taken."""
            with suppress(psycopg.OperationalError):
                while True:
                    taken.append(held.enter_context(ground.connect()))
            return taken[0]

        taken: list[psycopg.Connection] = []
        away_and_back(ground, books, worker, take_all, held.close)


def away_and_back(ground, books, worker, leave, come_back):
    """While PostgreSQL is away: keep what is in hand, fetch no more, say so once, go on alone."""
    leave()
    ground.publish(books.messages_for(100))
    eventually(lambda: worker.logged(AWAY) == 1)
    ground.publish(books.messages_for(1500))
    time.sleep(2)  # several tries, and a visibility timeout: this is the outage
    held, queued = ground.held(), ground.queued()
    print(f"{held} messages in hand, {queued} left in the queue during the outage")
    assert held > 0, "it has let go of what it had in hand"
    assert queued >= 1000, "it goes on fetching what it cannot decide"
    assert worker.logged("their worker sent no heartbeat") == 0, "another worker's heartbeats have stopped"
    come_back()
    ground.drain(books).assert_nothing_lost("PostgreSQL was away")
    assert worker.alive
    assert (worker.logged(AWAY), worker.logged(BACK)) == (1, 1)
