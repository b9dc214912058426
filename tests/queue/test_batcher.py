"""The Batcher's transitions: what makes a batch, what is parked, when fetching stops, and what a stop leaves behind."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from decimal import Decimal
from urllib.parse import urlsplit

import psycopg
import pytest
from structlog.testing import capture_logs

from tests.kit.events import accrual, burn
from tests.kit.servers import Broker
from tests.kit.wait import eventually
from tests.queue.in_process import in_process
from worker.ledger.apply import apply_batch
from worker.ledger.deliveries import Delivery
from worker.queue import parking
from worker.queue.batcher import Polling, Pressure, Probing, Settling

LOCKED = "accounts locked by another session: their events are parked, all others continue"
UNLOCKED = "no account is locked by another session any more"
UNAVAILABLE = "database not available, keeping messages and trying again"
AVAILABLE = "database available again"


@pytest.fixture
def start(monkeypatch, database_url, broker_url):
    """`start(burn_patience=2)`: a worker in this process."""
    with in_process(monkeypatch, database_url, broker_url) as start:
        yield start


@pytest.fixture
def logs():
    with capture_logs() as entries:
        yield lambda event: [entry["log_level"] for entry in entries if entry["event"] == event]


@contextmanager
def locked(worker, statement):
    """Another session holds a lock, as a forgotten BEGIN in psql does."""
    with psycopg.connect(worker.settings.database()) as session:
        session.execute(statement)
        yield
        session.rollback()


def ann_locked(worker):
    worker.rows("INSERT INTO account (user_id) VALUES ('ann') ON CONFLICT DO NOTHING RETURNING 1")
    return locked(worker, "SELECT FROM account WHERE user_id = 'ann' FOR UPDATE")


def ledger_blocked(worker):
    """Every batch waits, and no account counts as locked."""
    return locked(worker, "LOCK TABLE account IN EXCLUSIVE MODE")


@contextmanager
def read_only(worker):
    """PostgreSQL refuses every write, as a primary that became a standby does."""
    name = urlsplit(worker.settings.database()).path[1:]

    def set_read_only(value):
        worker.database.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}")
        worker.database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    set_read_only("on")
    yield
    set_read_only("off")


def in_line(worker, seconds=0.0):
    """Whether the ledger's session has been waiting for a lock for so long."""
    return worker.rows(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        " AND starts_with(application_name, 'tokentrail')"
        " AND clock_timestamp() - query_start >= make_interval(secs => %s)",
        seconds,
    )


def transactions(worker):
    """How many wrote the records there are."""
    return worker.rows("SELECT count(DISTINCT xmin::text) FROM transaction_record")[0][0]


def suspects(worker, *keys):
    """Make the queued messages with these idempotency keys look as if two workers had died with each in flight."""
    for raw in worker.redis.lrange("tokens", 0, -1):
        if any(f"'{key}'".encode() in raw for key in keys):
            worker.redis.hset("unacked_restores", hashlib.sha1(raw, usedforsecurity=False).hexdigest(), 2)


# Batches


def test_what_arrives_while_a_batch_commits_is_the_next_batch_and_nothing_is_acknowledged_before_its_commit(start):
    worker = start()
    with ledger_blocked(worker):
        worker.publish(accrual("ann", 1, "first"))
        worker.until(lambda: isinstance(worker.batcher._job, Settling))
        worker.publish(*(accrual("ann", 1, f"k{n}") for n in range(5)))
        worker.until(lambda: len(worker.batcher._queue) == 5)
        assert len(worker.batcher._job.parts) == 1
        assert worker.in_flight() == 6
    worker.rest()
    assert worker.keys("ann") == ["first", *(f"k{n}" for n in range(5))]
    assert transactions(worker) == 2
    assert worker.in_flight() == 0


def test_many_events_share_few_transactions(start):
    worker = start(batch_size=500)
    worker.publish(*(accrual(f"user-{n % 10}", 1, f"k{n}") for n in range(2_000)))
    worker.rest()
    assert worker.count("transaction_record") == 2_000
    assert transactions(worker) <= 8


def test_a_suspect_is_applied_alone_and_counted_before(start):
    worker = start()
    worker.publish(*(accrual("ann", 1, key) for key in ("before", "suspect", "after")))
    suspects(worker, "suspect")
    worker.rest()
    assert worker.keys("ann") == ["before", "suspect", "after"]
    assert transactions(worker) == 3
    assert worker.redis.exists("unacked_restores") == 0


def test_a_worker_that_dies_with_a_suspect_has_counted_the_attempt_and_acknowledged_what_came_before(start):
    worker = start(lock_timeout=20)
    worker.publish(accrual("bob", 1, "before"), accrual("ann", 1, "suspect"))
    suspects(worker, "suspect")
    with ann_locked(worker):
        worker.until(lambda: in_line(worker))
        counts = worker.redis.hgetall("unacked_restores")
        assert [count for name, count in counts.items() if name.startswith(b"alone:")] == [b"1"]
        assert worker.in_flight() == 1
    worker.rest()
    assert worker.balance("ann") == 1
    assert worker.redis.exists("unacked_restores") == 0


def test_a_suspect_is_applied_though_redis_does_not_count_the_attempt(start, logs):
    worker = start()
    worker.publish(accrual("ann", 4, "suspect"))
    suspects(worker, "suspect")
    (fingerprint,) = worker.redis.hkeys("unacked_restores")
    worker.redis.hset("unacked_restores", b"alone:" + fingerprint, "no number")
    worker.rest()
    assert worker.balance("ann") == 4
    assert logs("could not record a solo attempt at a suspect message") == ["warning"]


# Parked for a balance


def test_a_burn_ahead_of_its_accrual_is_parked_and_nothing_is_written_about_it(start):
    worker = start(burn_patience=20)
    worker.publish(burn("ann", 4, "b"))
    worker.rest()
    worker.pass_seconds(2)
    assert (worker.parked, worker.in_flight(), worker.count("rejected_event")) == (1, 1, 0)

    worker.publish(accrual("ann", 10, "a"))
    worker.rest()

    assert worker.keys("ann") == ["a", "b"]
    assert (worker.parked, worker.in_flight()) == (0, 0)


def test_a_poll_finds_an_accrual_that_another_worker_applied(start):
    worker = start(burn_patience=20)
    worker.publish(burn("ann", 4, "b"))
    worker.rest()
    apply_batch(worker.database, [Delivery.of(accrual("ann", 10, "a"))], stripe=2)
    worker.clock.now += parking.POLL_SECONDS
    worker.batcher.on_tick()
    assert isinstance(worker.batcher._job, Polling)
    worker.rest()
    assert worker.balance("ann") == 6


def test_a_burn_without_accrual_is_rejected_when_its_patience_is_over_and_not_before(start):
    worker = start(burn_patience=3)
    worker.publish(burn("ann", 4, "b"))
    worker.rest()
    worker.pass_seconds(2.5)
    assert worker.count("rejected_event") == 0
    worker.pass_seconds(1)
    assert worker.rows("SELECT reason, balance FROM rejected_event") == [("insufficient_tokens", Decimal(0))]
    assert (worker.parked, worker.in_flight()) == (0, 0)


def test_the_last_try_of_a_burn_comes_behind_everything_that_was_fetched_by_then(start):
    worker = start(burn_patience=1)
    worker.publish(burn("ann", 4, "b"))
    worker.rest()
    worker.pass_seconds(0.75)
    worker.publish(accrual("ann", 10, "a"))
    worker.clock.now += 0.75
    with ledger_blocked(worker):
        worker.until(lambda: isinstance(worker.batcher._job, Settling))
        worker.batcher.on_tick()
        assert worker.parked == 0
    worker.rest()
    assert worker.keys("ann") == ["a", "b"]
    assert worker.count("rejected_event") == 0


def test_patience_starts_again_after_missed_ticks(start):
    """A frozen process, or one without a connection, could not have fetched the accrual."""
    worker = start(burn_patience=1)
    worker.publish(burn("ann", 4, "b"))
    worker.rest()
    worker.clock.now += 30
    worker.batcher.on_tick()
    worker.rest()
    assert (worker.parked, worker.count("rejected_event")) == (1, 0)
    worker.pass_seconds(1.25)
    assert worker.count("rejected_event") == 1


def test_no_patience_passes_while_the_ledger_waits(start):
    """Its accrual lies behind what the worker can fetch meanwhile."""
    worker = start(burn_patience=3, lock_timeout=20)
    worker.publish(burn("ann", 4, "b"))
    worker.rest()
    with ledger_blocked(worker):
        worker.publish(accrual("bob", 1, "a"))
        worker.until(lambda: in_line(worker))
        worker.pass_seconds(10, rest=False)
        assert worker.parked == 1
    worker.rest()
    assert worker.balance("bob") == 1
    worker.pass_seconds(2)
    assert (worker.parked, worker.count("rejected_event")) == (1, 0)


def test_no_patience_passes_while_postgresql_is_unavailable(start):
    worker = start(burn_patience=1)
    worker.publish(burn("ann", 4, "b"))
    worker.rest()
    with read_only(worker):
        worker.publish(accrual("bob", 1, "another's"))
        worker.until(lambda: worker.batcher._degraded)
        worker.publish(accrual("ann", 10, "a"))
        worker.pass_seconds(5, rest=False)
    worker.until(lambda: worker.balance("ann") == 6)
    assert worker.count("rejected_event") == 0


def test_parked_burns_do_not_keep_their_accruals_out(start):
    """More burns than the prefetch limit are parked."""
    worker = start(burn_patience=60, batch_size=100)
    worker.publish(*(burn(f"user-{n}", 1, "b") for n in range(1_200)))
    worker.publish(*(accrual(f"user-{n}", 1, "a") for n in range(1_200)))
    worker.rest()
    assert worker.count("transaction_record") == 2_400
    assert worker.count("rejected_event") == 0


# Parked for a row lock


def test_an_account_that_another_session_keeps_locked_holds_up_its_own_events_and_no_others(start, logs):
    worker = start(lock_timeout=0.2)
    with ann_locked(worker):
        worker.publish(accrual("ann", 1, "first"))
        worker.until(lambda: worker.parked)
        worker.publish(*(accrual("ann", 1, f"a{n}") for n in range(1_200)))  # more than the prefetch limit
        worker.publish(*(accrual(f"user-{n}", 1, "a") for n in range(50)))
        worker.until(lambda: worker.count("transaction_record") == 50)
        worker.rest()
        worker.pass_seconds(5)
        assert (worker.parked, worker.in_flight(), worker.balance("ann")) == (1_201, 1_201, 0)
    worker.pass_seconds(1.25)
    worker.rest()
    assert worker.keys("ann") == ["first", *(f"a{n}" for n in range(1_200))]
    assert (logs(LOCKED), logs(UNLOCKED), logs(UNAVAILABLE)) == (["warning"], ["info"], [])


def test_of_a_bulk_message_only_the_events_of_locked_accounts_are_parked(start):
    worker = start(lock_timeout=0.2)
    with ann_locked(worker):
        worker.publisher.publish_bulk(
            [accrual("ann", 5, "a"), accrual("bob", 5, "a"), burn("ann", 2, "b"), burn("bob", 2, "b")]
        )
        worker.until(lambda: worker.balance("bob") == 3)
        # The account is known to be locked now: this message is split before anything is tried.
        worker.publisher.publish_bulk([accrual("ann", 5, "a2"), accrual("bob", 5, "a2")])
        worker.until(lambda: worker.balance("bob") == 8)
        worker.rest()
        assert (worker.parked, worker.in_flight()) == (3, 2), "no message is acknowledged before all of it"
    worker.pass_seconds(1.25)
    worker.rest()
    assert worker.keys("ann") == ["a", "b", "a2"]
    assert worker.in_flight() == 0


def test_patience_starts_again_when_the_account_is_unlocked(start):
    worker = start(burn_patience=1, lock_timeout=0.2)
    worker.publish(burn("ann", 4, "b"))
    worker.rest()
    with ann_locked(worker):
        worker.pass_seconds(1.25, rest=False)  # its last try meets the lock
        worker.until(lambda: len(worker.batcher._parking._locked) == 1)
    worker.pass_seconds(2)
    assert (worker.parked, worker.count("rejected_event")) == (1, 0)
    worker.publish(accrual("ann", 10, "a"))
    worker.rest()
    assert worker.balance("ann") == 6


def test_a_burn_is_not_rejected_by_a_contended_batch_but_by_the_next(start):
    """Its accrual may have waited for the same lock in another worker."""
    worker = start(burn_patience=1, lock_timeout=20)
    worker.publish(burn("ann", 4, "b"))
    worker.rest()
    with ann_locked(worker):
        worker.pass_seconds(1.25, rest=False)
        worker.until(lambda: in_line(worker, 0.6))
    worker.rest()
    assert (worker.parked, worker.count("rejected_event")) == (1, 0)
    worker.pass_seconds(40)
    assert (worker.parked, worker.count("rejected_event")) == (1, 0), "its patience is longer now"
    worker.pass_seconds(4)
    assert worker.count("rejected_event") == 1


# Pressure


def test_while_postgresql_is_unavailable_a_worker_stops_fetching_requeues_what_is_on_its_way_and_logs_once(start, logs):
    worker = start()
    worker.publish(accrual("ann", 1, "first"))
    worker.rest()
    assert worker.batcher._pressure is Pressure.NONE
    with read_only(worker):
        worker.publish(accrual("ann", 1, "second"))
        worker.until(lambda: worker.batcher._pressure is Pressure.REQUEUE)
        worker.publish(*(accrual("ann", 1, f"k{n}") for n in range(50)))
        worker.turns()
        assert worker.redis.llen("tokens") == 50
    worker.until(lambda: worker.balance("ann") == 52)
    worker.rest()
    assert worker.batcher._pressure is Pressure.NONE
    assert (logs(UNAVAILABLE), logs(AVAILABLE)) == (["warning"], ["info"])


def test_a_worker_with_nothing_to_apply_probes_until_postgresql_is_available(start):
    """What would have met PostgreSQL again was requeued with its connection to Redis."""
    worker = start(burn_patience=20)
    worker.publish(burn("ann", 1, "b"))
    worker.rest()
    name = urlsplit(worker.settings.database()).path[1:]
    with psycopg.connect(worker.settings.database().rpartition("/")[0] + "/postgres", autocommit=True) as server:
        server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = %s AND starts_with(application_name, 'tokentrail')",
            (name,),
        )
        worker.pass_seconds(0.5)
        assert worker.batcher._degraded
        worker.connection.release()
        worker.connect()
        worker.turns()
        assert (worker.redis.llen("tokens"), worker.in_flight(), worker.parked) == (1, 0, 0)
        server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    worker.clock.now += 1
    worker.batcher.on_tick()
    assert isinstance(worker.batcher._job, Probing)
    worker.until(lambda: worker.parked == 1)
    assert worker.batcher._pressure is Pressure.NONE


def test_a_worker_stops_fetching_while_too_many_events_are_parked(start, monkeypatch):
    monkeypatch.setattr(parking, "MAX_PARKED", 3)
    worker = start(burn_patience=60)
    worker.publish(*(burn("ann", 1, f"b{n}") for n in range(3)))
    worker.rest()
    assert worker.batcher._pressure is Pressure.NO_FETCH
    worker.turns()  # a fetch that was on its way ends
    worker.publish(accrual("ann", 9, "a"))
    worker.turns()
    assert worker.redis.llen("tokens") == 1
    apply_batch(worker.database, [Delivery.of(accrual("ann", 3, "elsewhere"))], stripe=2)
    worker.pass_seconds(0.5)
    worker.rest()
    assert worker.balance("ann") == 9
    assert worker.batcher._pressure is Pressure.NONE


def test_a_worker_reads_two_batches_ahead_leaves_the_rest_to_others_and_requeues_in_order(start):
    messages = 40
    worker = start(batch_size=500)
    for number in range(messages):
        worker.publisher.publish_bulk([accrual(f"user-{n % 50}", 1, f"{number}-{n}") for n in range(500)])
    queued = worker.redis.lrange("tokens", 0, -1)
    with ledger_blocked(worker):
        worker.until(lambda: worker.batcher._pressure is Pressure.NO_FETCH)
        worker.turns()
        assert 3 <= worker.in_flight() <= 20
        assert worker.batcher._queued_rows == 1_000
    worker.batcher.drain()
    worker.connection.release()
    left = worker.redis.lrange("tokens", 0, -1)
    assert left == queued[: len(left)]
    assert worker.count("transaction_record") == 500 * (messages - len(left))
    assert worker.redis.exists("unacked", "unacked_index", "unacked_restores") == 0


# Connections, stops


def test_parked_events_are_parked_once_however_often_their_connection_is_lost(start):
    worker = start(lock_timeout=0.2)
    with ann_locked(worker):
        worker.publish(*(accrual("ann", 1, f"a{n}") for n in range(20)))
        worker.until(lambda: worker.parked == 20)
        size = worker.batcher._bytes
        for _ in range(2):
            worker.connection.release()
            worker.connect()
            worker.until(lambda: worker.parked == 20)
        assert (worker.batcher._bytes, worker.in_flight()) == (size, 20)
    worker.pass_seconds(1.25)
    worker.rest()
    assert worker.keys("ann") == [f"a{n}" for n in range(20)]
    assert worker.batcher._bytes == 0


def test_a_batch_is_acknowledged_though_its_connection_was_lost_meanwhile(start):
    worker = start()
    with ledger_blocked(worker):
        worker.publish(accrual("ann", 1, "a"))
        worker.until(lambda: isinstance(worker.batcher._job, Settling))
        worker.channel.qos._delivered.restored = True  # the loss requeues nothing: the message stays in flight
        worker.connection.release()
        worker.connect()
    worker.rest()
    assert worker.balance("ann") == 1
    eventually(lambda: worker.turn() or worker.in_flight() == 0)


def test_a_stop_finishes_the_batch_and_requeues_everything_else_in_order_uncounted(start):
    worker = start(lock_timeout=0.2, batch_size=10)
    with ann_locked(worker):
        worker.publish(*(accrual("ann", 1, f"a{n}") for n in range(20)))
        worker.until(lambda: worker.parked == 20)
        worker.publish(burn("bob", 1, "b"), *(accrual("ann", 1, f"c{n}") for n in range(20)))
        worker.until(lambda: worker.parked == 41)
        worker.publish(accrual("carol", 1, "c"))
        worker.until(lambda: worker.balance("carol") == 1)
        worker.batcher.drain()
        worker.batcher.drain()  # Celery may stop the consumer twice
        worker.connection.release()
        assert worker.redis.llen("tokens") == 41
        assert worker.redis.exists("unacked", "unacked_index", "unacked_restores") == 0
    assert worker.count("rejected_event") == 0

    successor = start()
    successor.until(lambda: successor.balance("ann") == 40)
    assert successor.keys("ann") == [f"{name}{n}" for name in "ac" for n in range(20)]


def test_a_batch_that_looks_like_a_bug_suspends_the_worker_which_keeps_nothing(start, logs):
    worker = start()
    worker.database.execute("ALTER TABLE transaction_record ADD CONSTRAINT mistake CHECK (user_id <> 'ann')")
    worker.publisher.publish_bulk([accrual("ann", 1, f"k{n}") for n in range(11)])
    worker.until(lambda: worker.batcher._suspended)
    assert logs("worker suspended: it applies nothing until it is restarted") == ["critical"]
    assert worker.batcher._pressure is Pressure.REQUEUE

    worker.publish(accrual("bob", 1, "k"))
    worker.connection.release()
    worker.connect()  # a new connection changes nothing
    worker.turns()
    worker.pass_seconds(2)

    assert (worker.redis.llen("tokens"), worker.count("transaction_record"), worker.count("dead_letter")) == (2, 0, 0)


def test_what_redis_does_not_take_back_at_a_stop_is_requeued_later(monkeypatch, database_url, tmp_path, logs):
    """As a Redis that lost its replicas, and must not write without them."""
    with Broker(tmp_path / "broker") as broker, in_process(monkeypatch, database_url, broker.url) as start:
        worker = start(burn_patience=60)
        worker.publish(accrual("ann", 3, "a"), burn("ann", 4, "b"))
        worker.rest()
        assert worker.parked == 1
        worker.redis.config_set("min-replicas-to-write", 1)
        worker.batcher.drain()
        worker.connection.release()
        refused = "could not requeue messages: done with the next connection, or after the visibility timeout"
        assert logs(refused) == ["warning"]
        worker.redis.config_set("min-replicas-to-write", 0)

        successor = start(burn_patience=60)
        successor.publish(accrual("ann", 5, "a2"))
        successor.until(lambda: successor.balance("ann") == 4)


def test_with_kombus_own_transport_events_are_applied_parked_and_requeued_all_the_same(start):
    worker = start(transport="stock", burn_patience=60)
    worker.publish(accrual("ann", 3, "a"), burn("bob", 1, "b1"), burn("bob", 1, "b2"))
    worker.until(lambda: worker.balance("ann") == 3 and worker.parked == 2)
    worker.batcher.drain()
    worker.connection.release()
    assert worker.redis.llen("tokens") == 2
    successor = start(burn_patience=60)
    successor.publish(accrual("bob", 2, "a"))
    successor.until(lambda: successor.keys("bob") == ["a", "b1", "b2"])
