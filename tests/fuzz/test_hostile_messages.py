"""Hostile messages through a real worker: each gets its outcome, and no other event is affected."""

from __future__ import annotations

import base64
import json
import os
import random
import time
from collections import Counter
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
from celery import Celery

from tests.kit.events import accrual, burn
from tests.kit.messages import PRIORITY_STEPS, key
from tests.kit.stage import Stage
from tests.kit.wait import eventually
from worker.read.connection import read_once
from worker.read.pages import RECORDS, read_page

from . import hostile
from .expected import Expected

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LONG = os.environ.get("TOKENTRAIL_FUZZ") == "long"

#: Read before the tests' environment is cleared of settings.
SEED = int(os.environ.get("TOKENTRAIL_FUZZ_SEED") or random.SystemRandom().randrange(10**6))

#: Generated messages, and how many of them are sent between two measurements of the worker's memory.
MESSAGES, PORTION = (200_000, 10_000) if LONG else (900, 300)
HUGE, FLOODS = (6, 40) if LONG else (1, 4)

#: Bytes by which the worker may grow after the first portion; the largest messages come before that.
MAX_GROWTH = 48 << 20

#: Seconds without progress after which the worker counts as stuck.
STUCK_SECONDS = 120

USERS = [f"regular {number}" for number in range(20)]


class Traffic:
    """Pushes hostile messages and regular events between them, while at most 20,000 are in Redis."""

    def __init__(self, stage: Stage, worker: Any, expected: Expected) -> None:
        self.stage, self.worker, self.expected = stage, worker, expected
        self.chance = random.Random(SEED)
        self.process = psutil.Process(worker.pid)
        self.regular: list[tuple[str, str]] = []
        self.balances: Counter[str] = Counter()
        self._lists = [key("tokens", step) for step in PRIORITY_STEPS]

    def send(self, messages: Sequence[bytes]) -> None:
        for start in range(0, len(messages), 250):
            portion = messages[start : start + 250]
            self.expected.add(portion)
            with self.stage.redis.pipeline(transaction=False) as pipeline:
                for raw in portion:
                    pipeline.lpush(self.chance.choice(self._lists), raw)
                pipeline.execute()
            self._send_regular()
            self._wait(max_left=20_000)

    def _send_regular(self) -> None:
        user, name = self.chance.choice(USERS), f"r{len(self.regular)}"
        amount = self.chance.randint(1, 100)
        self.stage.publisher.publish_bulk([accrual(user, 2 * amount, f"{name}+"), burn(user, amount, f"{name}-")])
        self.regular += [(user, f"{name}+"), (user, f"{name}-")]
        self.balances[user] += amount

    def drain(self) -> None:
        self._wait(max_left=0)

    def _wait(self, max_left: int) -> None:
        """Wait until at most `max_left` messages are in Redis."""
        before, deadline = None, time.monotonic() + STUCK_SECONDS
        while (left := self._left()) > max_left:
            assert self.worker.alive, f"the worker ended:\n{self.stage.log()[-3000:]}"
            if left != before:
                before, deadline = left, time.monotonic() + STUCK_SECONDS
            assert time.monotonic() < deadline, f"{left} messages are stuck:\n{self.stage.log()[-3000:]}"
            time.sleep(0.05)

    def _left(self) -> int:
        return sum(self.stage.redis.llen(name) for name in self._lists) + self.stage.redis.hlen("unacked")

    def memory(self) -> int:
        return self.process.memory_info().rss


@pytest.fixture
def expected(stage) -> Iterator[Expected]:
    expected = Expected(stage.broker_url, stage.database_url)
    yield expected
    expected.close()


@pytest.fixture
def traffic(stage, expected) -> Traffic:
    print(f"seed {SEED}: TOKENTRAIL_FUZZ_SEED={SEED} sends the same again")
    worker = stage.start(burn_patience=0.2, log_format="json")
    return Traffic(stage, worker, expected)


def test_every_hostile_message_gets_its_outcome_and_no_other_event_is_affected(traffic, stage, expected, tmp_path):
    marker = tmp_path / "loaded"
    killers = list(hostile.killers(marker))
    expected.remember(killer.raw for killer in killers)
    traffic.send([killer.raw for killer in killers])
    traffic.send([conflicting(action) for action in ("\u202e\n", "\x9f" * 200)])
    traffic.send([huge(number) for number in range(HUGE)])
    traffic.send([hostile.message(hostile.call({"events": [number] * 1000}), hostile.BULK) for number in range(FLOODS)])
    traffic.drain()

    measured: list[int] = []  # bytes
    for portion in hostile.generated(MESSAGES, SEED, portion=PORTION):
        traffic.send(portion)
        traffic.drain()
        measured.append(traffic.memory())
        if LONG:
            print(f"{expected.messages:,} messages, worker at {measured[-1] >> 20} MiB", flush=True)

    reasons = dict(stage.rows("SELECT reason, sum(deliveries)::bigint FROM dead_letter GROUP BY 1 ORDER BY 1"))
    decided = {table: stage.count(table) for table in ("transaction_record", "rejected_event")}
    print(f"{expected.messages:,} messages, {expected.total:,} events: {decided}, dead letters {reasons}")
    print(f"memory in MiB, after every {PORTION:,}: {[each >> 20 for each in measured]}")

    assert traffic.worker.alive, "the process that began is the one that is there"
    assert len(stage.workers) == 1
    with psycopg.connect(stage.database_url, autocommit=True) as connection:
        assert expected.differences(connection, traffic.regular) == []
        assert_known(connection, expected, killers)
        assert_histories_can_be_read(stage.database_url, connection)
    assert not marker.exists(), "a pickle or YAML was loaded"
    assert {user: stage.balance(user) for user in traffic.balances} == {
        user: Decimal(balance) for user, balance in traffic.balances.items()
    }
    assert stage.broken() == []
    assert_every_letter_says_why(stage)
    assert_log_is_calm(stage)
    assert measured[-1] - measured[0] < MAX_GROWTH, "memory grows"


def conflicting(action: str) -> bytes:
    """One of two that have the same key, whichever is first."""
    return hostile.message(hostile.call(hostile.FIELDS | {"idempotency_key": "conflict", "action": action}))


def huge(number: int) -> bytes:
    """A message whose body is about as long as one may be: below the limit, or above."""
    most = 16 << 20
    fields = hostile.FIELDS | {"idempotency_key": f"huge {number}", "action": "x" * (most - 300 + 300 * (number % 2))}
    return hostile.message(hostile.call(fields))


def assert_known(connection: psycopg.Connection[Any], expected: Expected, killers: list[hostile.Killer]) -> None:
    reasons = dict(connection.execute("SELECT fingerprint, reason FROM dead_letter").fetchall())
    assert len({killer.raw for killer in killers}) == len(killers)
    wrong = []
    for killer in killers:
        actual = [reasons.get(fingerprint) for fingerprint in expected.fingerprints[killer.raw]]
        if actual != [killer.reason]:
            wrong.append(f"{killer.name}: {actual} instead of {killer.reason}")
    assert wrong == []


def assert_histories_can_be_read(database_url: str, connection: psycopg.Connection[Any]) -> None:
    """As the API answers them, first page and last."""
    for user, sequence in connection.execute("SELECT user_id, sequence FROM account").fetchall():
        for page in {1, max(-(-sequence // 100), 1)}:
            read = partial(read_page, pages=RECORDS, user_id=user, page=page, limit=100)
            history = read_once(database_url, read, application_name="tokentrail test")
            assert history.pagination.total == sequence
            json.loads(history.model_dump_json())


def assert_every_letter_says_why(stage: Stage) -> None:
    """One sentence on one line, in which nothing is invisible or turns the line around, short enough for a table."""
    details = [detail for (detail,) in stage.rows("SELECT DISTINCT detail FROM dead_letter")]
    bad = [
        detail
        for detail in details
        if not (10 < len(detail) < 700 and detail.endswith(".") and detail.isprintable() and detail[0] != " ")
    ]
    assert bad == []
    assert any("with other content: action is " in detail for detail in details)
    internal = stage.rows("SELECT detail FROM dead_letter WHERE reason IN ('internal_error', 'refused_by_database')")
    assert internal == []


def assert_log_is_calm(stage: Stage) -> None:
    """No message makes the worker log an error, a traceback, or a line that is not JSON."""
    lines = [line for line in stage.log().splitlines() if line.startswith("{")]
    loud = [line for line in lines if json.loads(line).get("level") in {"error", "critical"}]
    assert loud == []
    assert "Traceback" not in stage.log()


def test_each_message_has_task_events_for_its_arrival_its_end_and_the_reason_of_its_failure(
    traffic, stage, expected, tmp_path
):
    listener = stage.redis.pubsub(ignore_subscribe_messages=True)
    # Of our own database: channels are one namespace for all of a server's.
    listener.psubscribe(f"{urlsplit(stage.broker_url).path}.celeryev/task*")
    while not listener.patterns:
        listener.get_message(timeout=1)
    traffic.send([killer.raw for killer in hostile.killers(tmp_path / "loaded")])
    for portion in hostile.generated(150, SEED):
        traffic.send(portion)
    traffic.drain()
    messages = expected.messages + len(traffic.regular) // 2

    events: dict[str, list[dict[str, Any]]] = {}
    deadline = time.monotonic() + 60
    while len(events.get("task-succeeded", [])) + len(events.get("task-failed", [])) < messages:
        assert time.monotonic() < deadline, {type_: len(list_) for type_, list_ in events.items()}
        if published := listener.get_message(timeout=1):
            for event in json.loads(base64.b64decode(json.loads(published["data"])["body"])):
                events.setdefault(event["type"], []).append(event)
    listener.close()

    assert len(events["task-received"]) == messages
    assert len(events["task-succeeded"]) + len(events["task-failed"]) == messages
    reasons = [event["exception"] for event in events["task-failed"]]
    assert [reason for reason in reasons if "dead letter (" not in reason or not reason.endswith(".")] == []


def test_hostile_broadcasts_neither_end_a_worker_nor_silence_it(traffic, stage):
    database = stage.broker_url.rpartition("/")[2]
    channels = [f"/{database}.celery.pidbox", f"/{database}.celeryev/worker.heartbeat", f"/{database}.celeryev"]
    command = {"method": "ping", "arguments": {}, "destination": None}
    bodies = [
        *(None, [], 5, {}, {"method": []}, {"method": "no such"}, command | {"arguments": [1]}),
        *(command | {"arguments": {"no": "such"}}, command | {"destination": 5}, command | {"reply_to": 5}),
        *(command | {"reply_to": {"exchange": {}}, "ticket": []}, command | {"pattern": "(", "matcher": "pcre"}),
        *({"method": "revoke", "arguments": {"task_id": {"a": []}}}, {"method": "rate_limit", "arguments": {}}),
    ]
    wild = [hostile.message(hostile.dumps(body), {"clock": clock}) for body in bodies for clock in (None, "x", 1e308)]
    wild += [
        hostile.message("", {"clock": hostile.raw("NaN")}),
        hostile.message(hostile.dumps(command), {"clock": [1]}),
    ]
    wild += [b'{"body": {"__type__": "bytes", "__value__": 5}, "no": "UTF-8 \xff"}'] * 3  # one to each channel
    wild += [killer.raw for killer in hostile.killers(stage._folder / "loaded")]
    wild += [raw for portion in hostile.generated(10_000 if LONG else 150, SEED) for raw in portion]
    pubsub = stage.redis.pubsub()
    for number, raw in enumerate(wild):
        stage.redis.publish(channels[number % len(channels)] if number % 3 else channels[0], raw)
    pubsub.close()

    stage.publisher.publish(accrual("ann", 1, "a"))
    eventually(lambda: stage.balance("ann") == 1)
    eventually(lambda: stage.in_redis() == 0)
    assert answers_ping(stage), "it answers remote control commands"
    assert traffic.worker.alive
    assert stage.count("dead_letter") == 0, "what is said on these channels is no event"
    assert not (stage._folder / "loaded").exists()
    loud = [line for line in stage.log().splitlines() if '"level": "critical"' in line]
    assert loud == []
    assert "Traceback" not in stage.log()


def answers_ping(stage: Stage) -> bool:
    with Celery(broker=stage.broker_url) as operator:
        return bool(operator.control.ping(timeout=10, limit=1))
