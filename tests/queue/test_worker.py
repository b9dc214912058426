"""A real worker between a real Redis and a real PostgreSQL: what becomes of messages, and what Flower sees of them."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from contextlib import closing, contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psycopg
import pytest
from celery import Celery

from schema.publisher import Publisher
from tests.kit.brokers import Broker, Sentinel, cut_connections, eventually, free_port
from tests.kit.stage import Stage, Watcher, accrual, burn
from worker.ledger.apply import apply_batch
from worker.ledger.deliveries import Delivery

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def stage(database_url, broker_url, tmp_path) -> Iterator[Stage]:
    stage = Stage(database_url, broker_url, tmp_path)
    yield stage
    stage.close()


@pytest.fixture
def watcher(broker_url) -> Iterator[Watcher]:
    watcher = Watcher(broker_url)
    yield watcher
    watcher.close()


def test_each_single_event_shows_in_flower_with_arguments_success_and_its_result(stage, watcher):
    stage.start()

    ids = stage.publisher.publish(accrual("ann", "10", "a1")), stage.publisher.publish(accrual("ann", 5, "a2"))
    eventually(lambda: all("task-succeeded" in watcher.types(task_id) for task_id in ids))

    assert [watcher.types(task_id) for task_id in ids] == [["task-received", "task-started", "task-succeeded"]] * 2
    assert [watcher.last(task_id, "result") for task_id in ids] == ["applied #1: 0 → 10", "applied #2: 10 → 15"]
    assert "ann" in watcher.events[ids[0]][0]["kwargs"]
    assert stage.in_redis() == 0


def test_a_repeated_delivery_and_a_rejection_say_so_in_a_line(stage, watcher):
    stage.start(burn_patience=0)

    first = stage.publisher.publish(accrual("ann", "3", "a"))
    again = stage.publisher.publish(accrual("ann", "3.00", "a"))
    refused = stage.publisher.publish(burn("ann", 5, "b"))
    eventually(lambda: all("task-succeeded" in watcher.types(task_id) for task_id in (first, again, refused)))

    assert watcher.last(again, "result") == "applied #1: 0 → 3 (again)"
    assert watcher.last(refused, "result") == "rejected: insufficient tokens, 3 held, 5 asked"


def test_a_bulk_message_says_how_many_and_fails_only_when_nothing_was_decided(stage, watcher):
    stage.start(burn_patience=0)

    mixed = stage.publisher.publish_bulk(
        [*(accrual("ann", 1, f"a{n}") for n in range(7)), burn("ann", 100, "b1"), accrual("ann", 2, "a0")]
    )
    eventually(lambda: "task-succeeded" in watcher.types(mixed))
    hopeless = stage.publisher.publish_bulk([accrual("ann", 9, "a0"), accrual("ann", 9, "a1")])
    eventually(lambda: "task-failed" in watcher.types(hopeless))

    assert watcher.last(mixed, "result") == "7 applied, 1 rejected, 1 dead-lettered"
    assert watcher.last(hopeless, "exception").startswith("2 dead-lettered, the first: dead letter (conflict)")
    assert stage.count("dead_letter") == 3


def test_a_producers_send_task_with_decimal_and_datetime_arrives(stage):
    stage.start()
    producer = Celery(broker=stage.broker_url)

    with producer.connection_for_write() as connection:
        producer.send_task(
            "tokens.accrue",
            kwargs={
                "user_id": "ann",
                "amount": Decimal("1.500000000000000001"),
                "idempotency_key": "a",
                "source": "purchase",
                "metadata": {"ratio": 0.1},
            },
            queue="tokens",
            connection=connection,
        )
    eventually(lambda: stage.count("transaction_record") == 1)

    assert stage.rows("SELECT amount, metadata::text FROM transaction_record") == [
        (Decimal("1.500000000000000001"), '{"ratio":0.1}')
    ]


def test_a_burn_ahead_of_its_accrual_waits_for_it(stage):
    stage.start(burn_patience=20)

    stage.publisher.publish(burn("ann", 4, "b"))
    eventually(lambda: stage.redis.hlen("unacked") == 1)
    time.sleep(0.5)
    assert stage.count("rejected_event") == 0, "nothing is written about a burn that waits"
    stage.publisher.publish(accrual("ann", 10, "a"))
    eventually(lambda: stage.balance("ann") == 6, 5)

    assert stage.rows("SELECT sequence, type FROM transaction_record ORDER BY 1") == [(1, "accrual"), (2, "burn")]
    eventually(lambda: stage.in_redis() == 0)


def test_no_patience_passes_while_the_database_is_away(stage):
    """The accrual is published meanwhile, and could not be fetched in time: "not now" is no answer."""
    stage.start(burn_patience=1)
    stage.publisher.publish(burn("ann", 4, "b"))
    eventually(lambda: stage.redis.hlen("unacked") == 1)

    with refusing_writes(stage):
        stage.publisher.publish(accrual("bob", 1, "another's"))
        eventually(lambda: "database not available" in stage.log())
        stage.publisher.publish(accrual("ann", 10, "a"))
        time.sleep(2)
    eventually(lambda: stage.balance("bob") == 1, 20)

    eventually(lambda: stage.balance("ann") == 6, 5)
    assert stage.count("rejected_event") == 0


@contextmanager
def refusing_writes(stage):
    """As a primary that became a standby does."""
    name = urlsplit(stage.database_url).path[1:]

    def read_only(value):
        with psycopg.connect(stage.database_url, autocommit=True) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    read_only("on")
    yield
    read_only("off")


def test_a_burn_hears_of_an_accrual_that_another_worker_applied(stage):
    stage.start(burn_patience=20)

    stage.publisher.publish(burn("ann", 4, "b"))
    eventually(lambda: stage.redis.hlen("unacked") == 1)
    with psycopg.connect(stage.database_url, autocommit=True) as connection:
        apply_batch(connection, [Delivery.of(accrual("ann", 10, "a"))], stripe=2)

    eventually(lambda: stage.balance("ann") == 6, 5)


def test_a_burn_without_accrual_is_refused_when_its_patience_is_over(stage):
    stage.start(burn_patience=1)

    began = time.monotonic()
    stage.publisher.publish(burn("ann", 4, "b"))
    eventually(lambda: stage.count("rejected_event") == 1)

    assert time.monotonic() - began >= 1, "it was refused before its patience was over"
    assert stage.rows("SELECT reason, balance FROM rejected_event") == [("insufficient_tokens", Decimal(0))]


def test_waiting_burns_do_not_keep_their_accruals_out(stage):
    """More burns than prefetch allows wait; were they to count, the accruals behind them would never be fetched."""
    stage.start(burn_patience=60, batch_size=50)

    stage.publisher.publish_all(burn(f"user-{n}", 1, "b") for n in range(1_500))
    stage.publisher.publish_all(accrual(f"user-{n}", 1, "a") for n in range(1_500))
    eventually(lambda: stage.count("transaction_record") == 3_000, 30)

    assert stage.count("rejected_event") == 0
    eventually(lambda: stage.in_redis() == 0)
    assert stage.broken() == []


LOCKED = "accounts locked by another session, their events wait and all others go on"
UNLOCKED = "no account is locked by another session any more"


@contextmanager
def account_locked(stage, user_id):
    """By somebody who is in no hurry, as with a forgotten BEGIN in psql."""
    with psycopg.connect(stage.database_url) as connection:
        connection.execute("INSERT INTO account (user_id) VALUES (%s) ON CONFLICT DO NOTHING", (user_id,))
        connection.commit()
        connection.execute("SELECT FROM account WHERE user_id = %s FOR UPDATE", (user_id,))
        yield
        connection.rollback()


def test_an_account_that_somebody_keeps_locked_holds_up_its_own_events_and_no_others(stage):
    """Also when there are more of them than prefetch allows, and when nothing else is in the batch."""
    stage.start(batch_size=100)

    with account_locked(stage, "ann"):
        stage.publisher.publish(accrual("ann", 1, "first"))
        eventually(lambda: LOCKED in stage.log())
        stage.publisher.publish_all(accrual("ann", 1, f"a{n}") for n in range(1_500))
        stage.publisher.publish_all(accrual(f"user-{n}", 1, "a") for n in range(500))
        eventually(lambda: stage.count("transaction_record") == 500)
        eventually(lambda: stage.redis.llen("tokens") == 0)
        time.sleep(2.5)  # some looks, none of which is to the worker's or the log's harm
        assert stage.redis.hlen("unacked") == 1_501
        assert stage.balance("ann") == 0
    eventually(lambda: stage.balance("ann") == 1_501, 20)

    keys = [
        key
        for (key,) in stage.rows(
            "SELECT idempotency_key FROM transaction_record WHERE user_id = 'ann' ORDER BY sequence"
        )
    ]
    assert keys == ["first", *(f"a{n}" for n in range(1_500))], "its events kept their order"
    eventually(lambda: stage.in_redis() == 0 and UNLOCKED in stage.log())
    assert (stage.log().count(LOCKED), stage.log().count(UNLOCKED)) == (1, 1)
    assert "database not available" not in stage.log()
    assert stage.broken() == []


def test_of_a_bulk_message_only_what_is_locked_waits(stage):
    stage.start(lock_timeout=0.2)
    events = [accrual("ann", 5, "a"), accrual("bob", 5, "a"), burn("ann", 2, "b"), burn("bob", 2, "b")]

    with account_locked(stage, "ann"):
        stage.publisher.publish_bulk(events)
        eventually(lambda: stage.balance("bob") == 3 and LOCKED in stage.log())
        # Known to be locked now: the next is cut before anything is tried, and its dead letter is written once.
        again = [event.model_dump(mode="json") for event in [accrual("ann", 5, "a2"), accrual("bob", 5, "a2")]]
        with closing(Celery(broker=stage.broker_url)) as celery:
            half = {"events": [again[0], {"type": "accrual", "user_id": "ann"}, again[1]]}
            celery.send_task("tokens.apply_many", kwargs=half, queue="tokens")
        eventually(lambda: stage.balance("bob") == 8)
        eventually(lambda: stage.count("dead_letter") == 1)
        time.sleep(1.5)
        assert stage.redis.hlen("unacked") == 2, "neither is acknowledged while a part of it is undecided"
        assert stage.balance("ann") == 0
    eventually(lambda: stage.balance("ann") == 8)

    eventually(lambda: stage.in_redis() == 0)
    assert stage.count("dead_letter") == 1
    assert stage.broken() == []


def test_no_patience_passes_while_the_account_is_locked(stage):
    """Its accrual is published meanwhile and cannot be applied: "not now" is no answer."""
    stage.start(burn_patience=1, lock_timeout=0.2)
    stage.publisher.publish(burn("ann", 4, "b"))
    eventually(lambda: stage.count("account") == 1)

    with account_locked(stage, "ann"):
        eventually(lambda: LOCKED in stage.log())  # its patience was over, and this was the final try
    time.sleep(0.1)
    assert stage.count("rejected_event") == 0
    stage.publisher.publish(accrual("ann", 10, "a"))

    eventually(lambda: stage.balance("ann") == 6)
    assert stage.count("rejected_event") == 0


def test_a_burn_is_not_refused_at_the_moment_its_account_comes_free(stage):
    """Its patience was over, and its final try stood in line: so may have its accrual, in another worker."""
    stage.start(burn_patience=1, lock_timeout=20)
    stage.publisher.publish(burn("ann", 4, "b"))
    eventually(lambda: stage.count("account") == 1)

    with account_locked(stage, "ann"):
        eventually(lambda: stage.rows(STANDING_IN_LINE))
        time.sleep(1)
    time.sleep(0.5)
    assert stage.count("rejected_event") == 0
    stage.publisher.publish(accrual("ann", 10, "a"))

    eventually(lambda: stage.balance("ann") == 6)
    assert stage.count("rejected_event") == 0


#: The worker's session, while it waits for a lock.
STANDING_IN_LINE = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    " AND starts_with(application_name, 'tokentrail')"
)


def test_no_patience_passes_while_a_batch_waits_and_nothing_more_can_be_fetched(stage):
    """Somebody locks the table, the worker's hands fill up, and the accrual is published behind all that."""
    stage.start(burn_patience=3, lock_timeout=20, batch_size=10)
    stage.publisher.publish(burn("ann", 4, "b"))
    eventually(lambda: stage.count("account") == 1)
    time.sleep(0.5)

    with psycopg.connect(stage.database_url) as stranger:
        stranger.execute("LOCK TABLE account IN EXCLUSIVE MODE")
        stage.publisher.publish_all(accrual(f"user-{n}", 1, "a") for n in range(600))  # a moment's work after it
        eventually(lambda: stage.rows(STANDING_IN_LINE))
        stage.publisher.publish(accrual("ann", 10, "a"))
        time.sleep(5)
        assert stage.redis.llen("tokens") > 0, "its accrual is not fetched"
        stranger.rollback()

    eventually(lambda: stage.balance("ann") == 6, 30)
    assert stage.count("rejected_event") == 0


def test_a_quiet_worker_finds_the_database_again_after_redis_was_away_too(stage):
    """What it would have asked the database about went back with the connection: nothing is left to meet it."""
    stage.start(lock_timeout=0.2)
    with account_locked(stage, "ann"):
        stage.publisher.publish(accrual("ann", 1, "a"))
        eventually(lambda: LOCKED in stage.log())
        name = urlsplit(stage.database_url).path[1:]
        server = stage.database_url.rpartition("/")[0] + "/postgres"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = %s AND application_name LIKE 'tokentrail%%'",
                (name,),
            )
            eventually(lambda: "database not available" in stage.log())
            cut_connections(stage.redis)
            eventually(lambda: stage.redis.llen("tokens") == 1 and stage.redis.hlen("unacked") == 0)
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    eventually(lambda: stage.balance("ann") == 1)
    eventually(lambda: stage.in_redis() == 0)


def test_what_waits_for_a_locked_account_waits_once_however_often_it_is_delivered(stage):
    """A lost connection puts it back; what is left of it in the worker must not fill the room of what comes again."""
    stage.start()
    with account_locked(stage, "ann"):
        stage.publisher.publish_all(accrual("ann", 1, f"a{n}") for n in range(5_500))
        eventually(lambda: LOCKED in stage.log() and stage.redis.hlen("unacked") == 5_500)
        cut_connections(stage.redis)
        eventually(lambda: "Connection to broker lost" in stage.log())
        eventually(lambda: stage.redis.hlen("unacked") == 5_500 and stage.redis.llen("tokens") == 0, 30)
        with closing(Publisher(stage.broker_url)) as publisher:
            publisher.publish(accrual("bob", 1, "b"))
        eventually(lambda: stage.balance("bob") == 1)
    eventually(lambda: stage.balance("ann") == 5_500, 30)
    eventually(lambda: stage.in_redis() == 0)
    assert stage.broken() == []


def test_a_stopped_worker_puts_back_in_order_what_waits_for_a_locked_account(stage):
    worker = stage.start(lock_timeout=0.2)
    with account_locked(stage, "ann"):
        stage.publisher.publish_all(accrual("ann", 1, f"a{n}") for n in range(20))
        eventually(lambda: LOCKED in stage.log())
        stage.publisher.publish_all(accrual("ann", 1, f"b{n}") for n in range(20))
        eventually(lambda: stage.redis.hlen("unacked") == 40)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0, stage.log()
        assert stage.redis.llen("tokens") == 40
        assert stage.redis.exists("unacked", "unacked_restores") == 0, "a clean hand-back is no death"

    stage.start()
    eventually(lambda: stage.balance("ann") == 40)
    assert [key for (key,) in stage.rows("SELECT idempotency_key FROM transaction_record ORDER BY sequence")] == [
        f"{name}{n}" for name in "ab" for n in range(20)
    ]


def test_a_stopped_worker_puts_waiting_burns_back_and_does_not_refuse_them(stage):
    worker = stage.start(burn_patience=60)

    stage.publisher.publish_all([burn("ann", 1, "b1"), burn("ann", 2, "b2"), accrual("bob", 1, "a")])
    eventually(lambda: stage.count("transaction_record") == 1 and stage.redis.hlen("unacked") == 2)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0, stage.log()

    assert stage.redis.llen("tokens") == 2
    assert stage.redis.hlen("unacked") == 0
    assert stage.redis.exists("unacked_restores") == 0, "a clean hand-back is no death"
    assert stage.count("rejected_event") == 0

    stage.publisher.publish(accrual("ann", 5, "a2"))
    stage.start(burn_patience=60)
    eventually(lambda: stage.balance("ann") == 2)


def test_many_events_share_few_transactions(stage):
    stage.publisher.publish_all(accrual(f"user-{n % 10}", 1, f"k{n}") for n in range(2_000))
    before = stage.rows("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")[0][0]

    stage.start()
    eventually(lambda: stage.count("transaction_record") == 2_000, 30)
    eventually(lambda: stage.in_redis() == 0)
    stage.workers[0].send_signal(signal.SIGTERM)  # what it counted is written when its session ends
    stage.workers[0].wait(30)

    def commits() -> int:
        return stage.rows("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")[0][0] - before

    eventually(lambda: commits() > 4)
    print(f"2,000 events in at most {commits()} transactions, those of this test's questions included")
    assert commits() < 200
    assert stage.broken() == []


def test_of_many_bulk_messages_a_worker_takes_few_ahead_and_puts_them_back_in_order_when_stopped(stage):
    """What one worker cannot decide for minutes is for others to fetch, and takes no memory here."""
    messages = 60
    for number in range(messages):
        stage.publisher.publish_bulk([accrual(f"user-{n % 50}", 1, f"{number}-{n}") for n in range(500)])
    waiting = stage.redis.lrange("tokens", 0, -1)
    with psycopg.connect(stage.database_url) as connection:  # in whose transaction nobody else writes a record
        connection.execute("LOCK TABLE transaction_record IN SHARE MODE")
        worker = stage.start()
        eventually(lambda: stage.redis.hlen("unacked") > 0)
        time.sleep(2)

        in_hand = stage.redis.hlen("unacked")
        print(f"{in_hand} of {messages} messages in hand")
        assert 3 <= in_hand <= 20
        worker.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        connection.rollback()
    assert worker.wait(30) == 0, stage.log()

    left = stage.redis.lrange("tokens", 0, -1)
    assert left == waiting[: len(left)]
    assert stage.redis.exists("unacked", "unacked_restores") == 0
    assert stage.count("transaction_record") == 500 * (messages - len(left))
    stage.start("-n", "another@test")
    stage.start()
    eventually(lambda: stage.count("transaction_record") == 500 * messages, 60)
    eventually(lambda: stage.in_redis() == 0)
    assert stage.broken() == []


def test_a_worker_of_some_lanes_takes_these_and_the_queue_itself(stage):
    stage.start("--queues", "tokens,tokens.0,tokens.2")
    with Publisher(stage.broker_url, lanes=3) as lanes:
        events = [accrual(f"user-{n}", 1, "a") for n in range(60)]
        lanes.publish_all(events)
        expected = sum(lanes.queue_of(event) != "tokens.1" for event in events)
        left = 60 - expected
    stage.publisher.publish(accrual("ann", 1, "a"))

    eventually(lambda: stage.count("transaction_record") == expected + 1)
    assert stage.redis.llen("tokens.1") == left > 0


def test_while_the_database_is_away_a_worker_keeps_its_messages_stops_fetching_and_says_so_once(stage):
    stage.start()
    stage.publisher.publish(accrual("ann", 1, "first"))
    eventually(lambda: stage.count("transaction_record") == 1)
    name = stage.database_url.rpartition("/")[2]
    server = stage.database_url.rpartition("/")[0] + "/postgres"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        stage.publisher.publish(accrual("ann", 1, "second"))
        eventually(lambda: "database not available" in stage.log())
        time.sleep(0.5)
        stage.publisher.publish_all(accrual("ann", 1, f"k{n}") for n in range(50))
        time.sleep(1.5)
        assert stage.redis.llen("tokens") == 50, "it fetched what it could not decide"
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

    eventually(lambda: stage.balance("ann") == 52)
    eventually(lambda: stage.in_redis() == 0)
    assert stage.log().count("database not available") == 1
    assert stage.log().count("database available again") == 1
    assert stage.broken() == []


def test_a_worker_finds_its_broker_through_sentinel_by_the_same_url_as_a_publisher(database_url, tmp_path):
    with Broker(tmp_path / "master") as master, Sentinel(tmp_path / "sentinel") as sentinel:
        sentinel.client.execute_command("SENTINEL", "MONITOR", "tokens-master", "127.0.0.1", master.port, 1)
        url = f"sentinel://127.0.0.1:{sentinel.port}/0?master_name=tokens-master"
        stage = Stage(database_url, url, tmp_path)
        try:
            stage.start()
            stage.publisher.publish(accrual("ann", 1, "a"))
            eventually(lambda: stage.balance("ann") == 1)
        finally:
            stage.close()


def test_a_redis_that_takes_clients_and_refuses_writes_costs_a_worker_no_connections(database_url, tmp_path):
    """As one that was demoted behind its name does: a worker that leaves sockets behind uses up its connections."""
    with Broker(tmp_path / "broker") as broker, closing(Stage(database_url, broker.url, tmp_path)) as stage:
        stage.start()
        stage.redis.replicaof("127.0.0.1", free_port())
        eventually(lambda: "Connection to broker lost" in stage.log())
        time.sleep(6)
        assert len(stage.redis.client_list()) < 20
        stage.redis.replicaof("NO", "ONE")

        stage.publisher.publish(accrual("ann", 4, "a"))
        eventually(lambda: stage.balance("ann") == 4, 20)


def test_a_command_without_a_place_for_its_answer_costs_no_connection(stage):
    stage.start()
    command = {"method": "ping", "arguments": {}, "reply_to": {"nowhere": 1}, "ticket": "t", "destination": None}
    fanout = f"/{urlsplit(stage.broker_url).path[1:]}.celery.pidbox"
    properties = {"delivery_tag": "t", "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""}}
    told = {
        "body": json.dumps(command),
        "headers": {},
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": properties,
    }
    assert stage.redis.publish(fanout, json.dumps(told)) == 1

    eventually(lambda: "remote control command dropped" in stage.log())
    stage.publisher.publish(accrual("ann", 4, "a"))
    eventually(lambda: stage.balance("ann") == 4)
    assert "onnection to broker lost" not in stage.log()


def test_a_worker_whose_batch_looks_like_a_bug_takes_no_more_work(stage):
    stage.start()
    refused = "ALTER TABLE transaction_record ADD CONSTRAINT mistake CHECK (user_id <> 'ann')"
    with psycopg.connect(stage.database_url, autocommit=True) as owner:
        owner.execute(refused)
    stage.publisher.publish_bulk([accrual("ann", 1, f"k{n}") for n in range(11)])

    eventually(lambda: "this worker takes no more work" in stage.log())
    assert "refused 11 events" in stage.log()
    eventually(lambda: stage.redis.llen("tokens") == 1)
    stage.publisher.publish(accrual("bob", 1, "k"))
    time.sleep(1)
    assert (stage.redis.llen("tokens"), stage.count("transaction_record"), stage.count("dead_letter")) == (2, 0, 0)
    assert stage.workers[0].poll() is None


def test_a_suspect_is_applied_though_redis_will_not_count_the_attempt(stage):
    stage.publisher.publish(accrual("ann", 4, "a"))
    (raw,) = stage.redis.lrange("tokens", 0, -1)
    fingerprint = hashlib.sha1(raw, usedforsecurity=False).hexdigest()
    stage.redis.hset("unacked_restores", mapping={fingerprint: 2, f"alone:{fingerprint}": "no number"})
    stage.start()
    eventually(lambda: stage.balance("ann") == 4)
    assert "could not count an attempt on a suspicious message" in stage.log()


def test_what_redis_does_not_take_back_from_a_stopped_worker_goes_to_another_later(database_url, tmp_path):
    """As one that lost its replicas, and was told to write nothing without them."""
    with Broker(tmp_path / "broker") as broker, closing(Stage(database_url, broker.url, tmp_path)) as stage:
        worker = stage.start(burn_patience=60)
        stage.publisher.publish(accrual("ann", 3, "a"))
        stage.publisher.publish(burn("ann", 4, "b"))
        eventually(lambda: stage.balance("ann") == 3 and stage.redis.hlen("unacked") == 1)
        stage.redis.config_set("min-replicas-to-write", 1)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0, stage.log()
        said = "could not put messages back: they go when Redis takes them, or after the visibility timeout"
        assert stage.log().count(said) == 1
        stage.redis.config_set("min-replicas-to-write", 0)

        stage.publisher.publish(accrual("ann", 5, "a2"))
        stage.start(visibility_timeout=1)
        eventually(lambda: stage.balance("ann") == 4, 20)
