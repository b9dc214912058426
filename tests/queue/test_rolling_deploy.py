"""Workers of the previous release share queues with this one: what they leave in Redis is frozen here, byte by byte."""

from __future__ import annotations

import base64
import json
import time

import pytest

from schema import messages
from tests.queue.in_process import in_process

SINGLE = (
    b'{"body":"W1tdLHsiYW1vdW50IjoiMTAiLCJpZGVtcG90ZW5jeV9rZXkiOiJrMSIsInNvdXJjZSI6InNob3AiLCJ1c2VyX2lkIjoiYW5uIiwibWV0'
    b'YWRhdGEiOnsibiI6MS41fX0seyJjYWxsYmFja3MiOm51bGwsImVycmJhY2tzIjpudWxsLCJjaGFpbiI6bnVsbCwiY2hvcmQiOm51bGx9XQ==",'
    b'"content-encoding":"utf-8","content-type":"application/json","headers":{"lang":"py","task":"tokens.accrue",'
    b'"id":"3e190099-b36a-4e87-a0de-5b50a76585fb","root_id":"3e190099-b36a-4e87-a0de-5b50a76585fb","parent_id":null,'
    b'"group":null,"retries":0,"timelimit":[null,null],"eta":null,"expires":null,"ignore_result":true,"argsrepr":"()",'
    b"\"kwargsrepr\":\"{'user_id': 'ann', 'amount': '10'}\",\"origin\":\"19117@vm\"},"
    b'"properties":{"correlation_id":"3e190099-b36a-4e87-a0de-5b50a76585fb","reply_to":"","delivery_mode":2,'
    b'"delivery_info":{"exchange":"","routing_key":"tokens"},"priority":0,"body_encoding":"base64",'
    b'"delivery_tag":"3e190099-b36a-4e87-a0de-5b50a76585fb"}}'
)
BULK = (
    b'{"body":"W1tdLHsiZXZlbnRzIjpbeyJhY3Rpb24iOiJyZW5kZXIiLCJhbW91bnQiOiI0IiwiaWRlbXBvdGVuY3lfa2V5IjoiazIiLCJ0eXBlIjoi'
    b"YnVybiIsInVzZXJfaWQiOiJhbm4ifSx7ImFtb3VudCI6IjEiLCJpZGVtcG90ZW5jeV9rZXkiOiJrMyIsInNvdXJjZSI6InNob3AiLCJ0eXBlIjoi"
    b"YWNjcnVhbCIsInVzZXJfaWQiOiJib2IifV19LHsiY2FsbGJhY2tzIjpudWxsLCJlcnJiYWNrcyI6bnVsbCwiY2hhaW4iOm51bGwsImNob3JkIjpu"
    b'dWxsfV0=","content-encoding":"utf-8","content-type":"application/json","headers":{"lang":"py",'
    b'"task":"tokens.apply_many","id":"07ad57de-b123-4c05-87ac-84f5dd084390","retries":0,"eta":null,"expires":null,'
    b'"argsrepr":"()","kwargsrepr":"{\'events\': \'2, of ann, bob\'}","origin":"19117@vm"},'
    b'"properties":{"correlation_id":"07ad57de-b123-4c05-87ac-84f5dd084390","reply_to":"","delivery_mode":2,'
    b'"delivery_info":{"exchange":"","routing_key":"tokens"},"priority":0,"body_encoding":"base64",'
    b'"delivery_tag":"07ad57de-b123-4c05-87ac-84f5dd084390"}}'
)
UNDECODABLE = (
    b'{"headers":{"task":"tokentrail.undecodable","id":"e8c93b06-e813-53e4-99c4-6592a38ac3bf",'
    b'"root_id":"e8c93b06-e813-53e4-99c4-6592a38ac3bf","lang":"py","retries":0,"argsrepr":"","kwargsrepr":"{}",'
    b'"tokentrail_reason":"not readable"},"properties":{"correlation_id":"e8c93b06-e813-53e4-99c4-6592a38ac3bf",'
    b'"delivery_mode":2,"delivery_info":{"exchange":"","routing_key":"tokens"},"priority":0,"body_encoding":"base64",'
    b'"delivery_tag":"e8c93b06-e813-53e4-99c4-6592a38ac3bf"},"content-type":"application/octet-stream",'
    b'"content-encoding":"binary","body":"/yBubyBtZXNzYWdl"}'
)


@pytest.fixture
def worker(monkeypatch, database_url, broker_url):
    with in_process(monkeypatch, database_url, broker_url) as start:
        yield start()


def test_names_on_the_wire_are_those_of_the_previous_release():
    assert (messages.ACCRUE, messages.BURN, messages.APPLY_MANY) == (
        "tokens.accrue",
        "tokens.burn",
        "tokens.apply_many",
    )
    assert (messages.DEFAULT_QUEUE, messages.UNDECODABLE_TASK) == ("tokens", "tokentrail.undecodable")
    assert messages.REPLAY_HEADER == "tokentrail_dead_letter"
    assert (messages.RESTORES_HEADER, messages.SOLO_DEATHS_HEADER) == ("tokentrail_restores", "tokentrail_deaths")
    assert messages.UNDECODABLE_REASON_HEADER == "tokentrail_reason"
    assert (messages.MAX_EVENTS, messages.MAX_BODY_BYTES) == (1_000, 16 * 2**20)


def test_messages_of_a_previous_producer_are_applied(worker):
    worker.redis.lpush("tokens", SINGLE, BULK)
    worker.rest()
    assert worker.keys("ann") == ["k1", "k2"]
    assert (worker.balance("ann"), worker.balance("bob")) == (6, 1)
    assert worker.rows("SELECT metadata::text FROM transaction_record WHERE idempotency_key = 'k1'") == [('{"n":1.5}',)]


def test_what_a_previous_worker_died_with_is_restored_and_applied(worker):
    long_ago = time.time() - 86_400
    for number, message in enumerate((SINGLE, BULK, UNDECODABLE), start=1):
        tag = f"29e8f723738749759ac67bbec4ce3a1a-2-{number}"
        worker.redis.hset("unacked", tag, b"[" + message + b',"","tokens"]')
        worker.redis.zadd("unacked_index", {tag: long_ago + number / 1e6})
    worker.until(lambda: worker.balance("ann") == 6 and worker.count("dead_letter") == 1)
    worker.rest()
    assert worker.redis.exists("unacked", "unacked_index", "unacked_restores") == 0
    assert worker.rows("SELECT reason, body FROM dead_letter") == [("undecodable", b"\xff no message")]


def test_what_this_worker_has_in_flight_is_a_record_that_a_previous_worker_restores(worker):
    worker.redis.lpush("tokens", SINGLE)
    with worker.database.transaction():
        worker.database.execute("LOCK TABLE account IN EXCLUSIVE MODE")
        worker.until(lambda: worker.in_flight() == 1)
        ((tag, record),) = worker.redis.hgetall("unacked").items()
        assert record == b"[" + SINGLE + b',"","tokens"]'
        assert worker.redis.zscore("unacked_index", tag) == pytest.approx(time.time(), abs=60)
        assert json.loads(base64.b64decode(json.loads(record)[0]["body"]))[1]["user_id"] == "ann"
    worker.rest()
    assert worker.balance("ann") == 10
