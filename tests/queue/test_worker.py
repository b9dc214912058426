"""A real worker process between Redis and PostgreSQL: what Flower sees of messages, and where the worker finds them.

What the worker does with them is tested in one process, in test_batcher.py, and with broken servers, in tests/chaos.
"""

from __future__ import annotations

import json
from contextlib import closing
from decimal import Decimal
from urllib.parse import urlsplit

from celery import Celery

from schema.publisher import Publisher
from tests.kit.events import accrual, burn
from tests.kit.servers import Broker, Sentinel, free_port
from tests.kit.stage import Stage
from tests.kit.wait import eventually


def test_each_single_event_shows_in_flower_with_arguments_success_and_its_result(shared_stage, shared_watcher, user):
    events = accrual(user, "3", "a"), accrual(user, "3.00", "a"), burn(user, 5, "b"), burn(user, 2, "c")
    ids = [shared_stage.publisher.publish(event) for event in events]
    eventually(lambda: all("task-succeeded" in shared_watcher.types(task_id) for task_id in ids))

    assert [shared_watcher.types(id_) for id_ in ids] == [["task-received", "task-started", "task-succeeded"]] * 4
    assert [shared_watcher.last(task_id, "result") for task_id in ids] == [
        "applied #1: 0 → 3",
        "applied #1: 0 → 3 (again)",
        "rejected: insufficient tokens, 3 held, 5 asked",
        "applied #2: 3 → 1",
    ]
    assert user in shared_watcher.events[ids[0]][0]["kwargs"]
    eventually(lambda: shared_stage.in_redis() == 0)


def test_a_bulk_message_shows_how_many_and_fails_only_when_nothing_was_decided(shared_stage, shared_watcher, user):
    mixed = shared_stage.publisher.publish_bulk(
        [*(accrual(user, 1, f"a{n}") for n in range(7)), burn(user, 100, "b1"), accrual(user, 2, "a0")]
    )
    hopeless = shared_stage.publisher.publish_bulk([accrual(user, 9, "a0"), accrual(user, 9, "a1")])
    eventually(lambda: "task-failed" in shared_watcher.types(hopeless))

    assert shared_watcher.types(mixed)[-1] == "task-succeeded"
    assert shared_watcher.last(mixed, "result") == "7 applied, 1 rejected, 1 dead-lettered"
    assert shared_watcher.last(hopeless, "exception").startswith("2 dead-lettered, the first: dead letter (conflict)")
    query = "SELECT count(*) FROM dead_letter WHERE message_id = ANY(%s)"
    assert shared_stage.rows(query, [mixed, hopeless]) == [(3,)]


def test_a_producers_send_task_keeps_every_digit(shared_stage, user):
    fields = {"user_id": user, "amount": Decimal("1.500000000000000001"), "metadata": {"ratio": 0.1}}
    with closing(Celery(broker=shared_stage.broker_url)) as producer:
        producer.send_task(
            "tokens.accrue", kwargs=fields | {"idempotency_key": "a", "source": "purchase"}, queue="tokens"
        )
    query = "SELECT amount, metadata::text FROM transaction_record WHERE user_id = %s"
    assert eventually(lambda: shared_stage.rows(query, user)) == [(Decimal("1.500000000000000001"), '{"ratio":0.1}')]


def test_a_worker_of_some_lanes_takes_these_and_the_queue_itself(shared_stage, user):
    with Publisher(shared_stage.broker_url, lanes=3) as lanes:
        events = [accrual(f"{user} {n}", 1, "a") for n in range(60)]
        lanes.publish_all(events)
        expected = sum(lanes.queue_of(event) != "tokens.1" for event in events)
    shared_stage.publisher.publish(accrual(user, 1, "a"))

    query = "SELECT count(*) FROM transaction_record WHERE starts_with(user_id, %s)"
    eventually(lambda: shared_stage.rows(query, user) == [(expected + 1,)])
    assert shared_stage.redis.llen("tokens.1") == 60 - expected > 0


def test_a_command_without_a_place_for_its_answer_costs_no_connection(shared_stage, user):
    command = {"method": "ping", "arguments": {}, "reply_to": {"nowhere": 1}, "ticket": "t", "destination": None}
    message = {
        "body": json.dumps(command),
        "headers": {},
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {"delivery_tag": "t", "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""}},
    }
    fanout = f"/{urlsplit(shared_stage.broker_url).path[1:]}.celery.pidbox"
    assert shared_stage.redis.publish(fanout, json.dumps(message)) == 1

    eventually(lambda: "remote control command dropped" in shared_stage.log())
    shared_stage.publisher.publish(accrual(user, 4, "a"))
    eventually(lambda: shared_stage.balance(user) == 4)
    assert "onnection to broker lost" not in shared_stage.log()


def test_a_worker_finds_its_broker_through_sentinel_by_the_same_url_as_a_publisher(database_url, tmp_path):
    with Broker(tmp_path / "master") as master, Sentinel(tmp_path / "sentinel") as sentinel:
        sentinel.client.execute_command("SENTINEL", "MONITOR", "tokens-master", "127.0.0.1", master.port, 1)
        url = f"sentinel://127.0.0.1:{sentinel.port}/0?master_name=tokens-master"
        with Stage(database_url, url, tmp_path) as stage:
            stage.start()
            stage.publisher.publish(accrual("ann", 1, "a"))
            eventually(lambda: stage.balance("ann") == 1)


def test_a_redis_that_takes_clients_and_refuses_writes_costs_a_worker_no_connections(database_url, tmp_path):
    """As one that was demoted behind its name does: a worker that leaves sockets behind uses up its connections."""
    with Broker(tmp_path / "broker") as broker, Stage(database_url, broker.url, tmp_path) as stage:
        stage.start()
        stage.redis.replicaof("127.0.0.1", free_port())
        eventually(lambda: stage.log().count("Connection to broker lost") >= 25)
        assert len(stage.redis.client_list()) < 20
        stage.redis.replicaof("NO", "ONE")

        stage.publisher.publish(accrual("ann", 4, "a"))
        eventually(lambda: stage.balance("ann") == 4)
