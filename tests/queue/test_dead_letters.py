"""What cannot be applied is kept: each reason through a real worker, once a message, and Flower says why."""

from __future__ import annotations

import base64
import json
from hashlib import sha1
from uuid import uuid4

import psycopg
import pytest
from celery import Celery
from kombu.compression import compress

from schema.reasons import DEAD_LETTER_REASONS
from tests.kit.events import accrual, burn
from tests.kit.messages import message
from tests.kit.wait import eventually

FIELDS = {"user_id": "ann", "amount": "1", "idempotency_key": "k", "source": "payroll"}


class Letters:
    """Pushes messages and waits for their letters."""

    def __init__(self, stage, watcher):
        self._stage, self._watcher = stage, watcher

    def of(self, task_id):
        return self._stage.rows(
            """
            SELECT reason, detail, user_id, idempotency_key, deliveries, state, event::text, body, event_index
            FROM dead_letter WHERE message_id = %s ORDER BY event_index
            """,
            task_id,
        )

    def push(self, *raw):
        self._stage.redis.lpush("tokens", *raw)

    def one(self, raw, task_id):
        """The only letter of the message, after Flower saw FAILURE with its sentence and Redis forgot the message."""
        self.push(raw)
        eventually(lambda: "task-failed" in self._watcher.types(task_id))
        (letter,) = self.of(task_id)
        assert self._watcher.types(task_id)[-1] == "task-failed"
        assert self._watcher.last(task_id, "exception") == f"dead letter ({letter[0]}): {letter[1]}"
        eventually(lambda: self._stage.in_redis() == 0)
        assert letter[1].rstrip().endswith(".") or letter[0] == "refused_by_database"
        assert letter[4:6] == (1, "open")
        return letter


@pytest.fixture
def letters(shared_stage, shared_watcher):
    return Letters(shared_stage, shared_watcher)


def call(user, *, task="tokens.accrue", body=None, kwargs=None, headers=None, **changes):
    """A message and its id."""
    task_id = str(uuid4())
    if body is None:
        body = json.dumps([[], FIELDS | {"user_id": user} | (kwargs or {}), {}])
    return message(body=body, headers={"task": task, "id": task_id} | (headers or {}), **changes), task_id


@pytest.mark.parametrize(
    ("changes", "reason", "sentence"),
    [
        ({"task": "tokens.acrue"}, "unknown_task", "There is no task 'tokens.acrue' here: tokens.accrue, "),
        ({"task": None}, "unknown_task", "There is no task null here"),
        ({"content-type": "application/x-python-serialize"}, "undecodable", "The content type is 'application/x-py"),
        ({"content-type": "application/x-yaml"}, "undecodable", "only application/json is read."),
        ({"content-encoding": "utf-16"}, "undecodable", "The content encoding is 'utf-16'; only utf-8 is read."),
        ({"content-encoding": "binary"}, "undecodable", "only utf-8 is read."),
        ({"body": "no json"}, "undecodable", "The body is not JSON"),
        ({"body": "[" * 100_000}, "undecodable", "The body is not JSON: maximum recursion depth exceeded"),
        ({"body": '{"a": 1}'}, "undecodable", "The body is not a call"),
        ({"body": json.dumps([[1], FIELDS, {}])}, "invalid_arguments", "tokens.accrue takes keyword arguments only"),
        ({"body": json.dumps([[], [], {}])}, "invalid_arguments", "takes keyword arguments as a JSON object."),
        ({"body": '[[], {"amount": "1", "amount": "2"}, {}]'}, "invalid_arguments", "'amount' is given twice."),
        ({"task": "tokens.apply_many"}, "invalid_arguments", "takes events and nothing else: a list of 1 to 1000."),
        ({"kwargs": {"amount": "-1"}}, "invalid_event", "amount is '-1': must be digits"),
        ({"kwargs": {"amount": 0.1}}, "invalid_event", "other numbers lose digits on their way."),
        ({"kwargs": {"colour": "red"}}, "invalid_event", "'colour' is not a field of this event."),
        ({"kwargs": {"occurred_at": "2999-01-01T00:00:00Z"}}, "invalid_event", "check the producer's clock"),
        ({"headers": {"expires": "2020-01-01T00:00:00+00:00"}}, "expired", "The message expired at '2020-01-01T00"),
        ({"headers": {"expires": "soon"}}, "expired", "expires is 'soon', which is no date and time"),
        ({"headers": {"eta": "2020-01-01T00:00:00+00:00"}}, "scheduled", "The message has an eta"),
        ({"body": " " * (16 * 2**20 + 1)}, "oversized", "The message is 16777217 bytes long: at most 16777216"),
    ],
)
def test_message_that_cannot_be_applied_is_kept_with_its_reason(letters, user, changes, reason, sentence):
    raw, task_id = call(user, **changes)
    letter = letters.one(raw, task_id)
    assert letter[0] == reason
    assert sentence in letter[1]
    assert reason in DEAD_LETTER_REASONS


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "tokens.acrue"},
        {"kwargs": {"amount": "-1"}},
        {"headers": {"expires": "2020-01-01T00:00:00+00:00"}},
        {"headers": {"eta": "2020-01-01T00:00:00+00:00"}},
    ],
)
def test_refused_message_is_filed_under_its_user_and_key_and_kept_whole(letters, user, changes):
    raw, task_id = call(user, **changes)
    letter = letters.one(raw, task_id)
    assert letter[2:4] == (user, "k")
    assert json.loads(letter[6])["amount"] in {"1", "-1"}
    assert letter[7] == json.loads(raw)["body"].encode()


@pytest.mark.parametrize("raw", [b"\xff\x00 no message", b"[]", b'{"headers": {}}', b'{"body": {}}', b"9" * 5000])
def test_bytes_that_are_no_message_are_kept_as_they_came(shared_stage, letters, raw):
    letters.push(raw, raw)
    find = "SELECT reason, state, sum(deliveries) FROM dead_letter WHERE body = %s GROUP BY 1, 2"
    eventually(lambda: shared_stage.rows(find, raw) == [("undecodable", "open", 2)])
    eventually(lambda: shared_stage.in_redis() == 0)


def test_compressed_message_is_kept_as_it_came(shared_stage, letters, user):
    body, kind = compress(json.dumps([[], FIELDS | {"user_id": user}, {}]).encode(), "gzip")
    packed = json.loads(call(user, body=base64.b64encode(body).decode(), headers={"compression": kind})[0])
    packed["properties"]["body_encoding"] = "base64"
    raw = json.dumps(packed).encode()
    letters.push(raw)
    find = "SELECT reason, state, deliveries FROM dead_letter WHERE body = %s AND detail LIKE '%%compressed%%'"
    eventually(lambda: shared_stage.rows(find, raw) == [("undecodable", "open", 1)])


def test_revoked_message_is_kept(shared_stage, shared_watcher, letters, user):
    raw, task_id = call(user)
    with Celery(broker=shared_stage.broker_url) as operator:
        operator.control.revoke(task_id, reply=True, timeout=10, limit=1)
    letter = letters.one(raw, task_id)
    assert (letter[0], letter[2]) == ("revoked", user)


def test_message_that_workers_died_of_is_kept(shared_stage, letters, user):
    """What the transport notes when workers die is written by hand; tests/chaos really kills them."""
    raw, task_id = call(user)
    name = sha1(raw).hexdigest()
    shared_stage.redis.hset("unacked_restores", mapping={name: 7, f"alone:{name}": 5})
    letter = letters.one(raw, task_id)
    assert letter[:4] == ("poison", "5 workers died while this was their only message in flight.", user, "k")
    assert shared_stage.redis.hlen("unacked_restores") == 0


def test_conflict_names_the_fields_that_differ_and_moves_nothing(shared_stage, letters, user):
    shared_stage.publisher.publish(accrual(user, 5, "k"))
    eventually(lambda: shared_stage.balance(user) == 5)

    raw, task_id = call(user, kwargs={"amount": "6", "source": "elsewhere", "metadata": {"a": 1}})
    letter = letters.one(raw, task_id)

    assert letter[0] == "conflict"
    assert 'amount is 6, was 5; source is elsewhere, was payroll; metadata is {"a":1}, was absent' in letter[1]
    assert letter[2:4] == (user, "k")
    assert shared_stage.balance(user) == 5


def test_event_that_alone_makes_the_database_refuse_is_kept_and_its_neighbours_are_applied(shared_stage, letters, user):
    with psycopg.connect(shared_stage.database_url, autocommit=True) as owner:
        owner.execute(
            "ALTER TABLE transaction_record ADD CONSTRAINT no_curse CHECK (idempotency_key <> 'curse') NOT VALID"
        )
    raw, task_id = call(user, kwargs={"idempotency_key": "curse"})
    for n in range(20):
        shared_stage.publisher.publish(accrual(user, 1, f"k{n}"))
    letter = letters.one(raw, task_id)
    shared_stage.publisher.publish(accrual(user, 1, "last"))
    eventually(lambda: shared_stage.balance(user) == 21)
    assert letter[0] == "refused_by_database"
    assert "no_curse" in letter[1]
    assert letter[1].endswith("[23514]")
    assert letter[2:4] == (user, "curse")


@pytest.mark.parametrize("headers", [{"expires": "2020-01-01T00:00:00+00:00"}, {"eta": "2020-01-01T00:00:00+00:00"}])
def test_refused_message_gets_the_outcome_it_had_before(shared_stage, shared_watcher, letters, user, headers):
    """Applied, but its acknowledgement was lost, and it comes again when it is too late."""
    shared_stage.publisher.publish(accrual(user, 1, "k"))
    eventually(lambda: shared_stage.balance(user) == 1)
    raw, task_id = call(user, headers=headers)
    letters.push(raw)
    eventually(lambda: "task-succeeded" in shared_watcher.types(task_id))
    assert shared_watcher.last(task_id, "result") == "applied #1: 0 → 1 (again)"
    assert letters.of(task_id) == []


def test_refused_bulk_message_keeps_each_event_under_its_own_key(shared_stage, shared_watcher, letters, user):
    shared_stage.publisher.publish(accrual(user, 1, "k0"))
    eventually(lambda: shared_stage.balance(user) == 1)
    events = [{"type": "accrual"} | FIELDS | {"user_id": user, "idempotency_key": f"k{n}"} for n in range(4)]
    events[3]["amount"] = "none"
    body = json.dumps([[], {"events": events}, {}])
    raw, task_id = call(user, task="tokens.apply_many", body=body, headers={"expires": "2020-01-01T00:00:00Z"})
    letters.push(raw)
    eventually(lambda: "task-succeeded" in shared_watcher.types(task_id))
    assert shared_watcher.last(task_id, "result") == "1 applied, 3 dead-lettered"
    kept = [(row[0], row[3], row[8]) for row in letters.of(task_id)]
    assert kept == [("expired", "k1", 1), ("expired", "k2", 2), ("invalid_event", "k3", 3)]
    assert shared_stage.balance(user) == 1


def test_bulk_message_keeps_each_bad_event_by_itself(shared_stage, shared_watcher, letters, user):
    events = [{"type": "accrual"} | FIELDS | {"user_id": user, "idempotency_key": f"k{n}"} for n in range(4)]
    events[1]["amount"] = "none"
    events[3] = "no object"
    raw, task_id = call(user, task="tokens.apply_many", body=json.dumps([[], {"events": events}, {}]))
    letters.push(raw)
    eventually(lambda: "task-succeeded" in shared_watcher.types(task_id))

    assert shared_watcher.last(task_id, "result") == "2 applied, 2 dead-lettered"
    assert [(row[0], row[2], row[3], row[8]) for row in letters.of(task_id)] == [
        ("invalid_event", user, "k1", 1),
        ("invalid_event", None, None, 3),
    ]
    assert shared_stage.balance(user) == 2


def test_message_delivered_again_counts_up_and_adds_no_row(shared_stage, letters, user):
    raw, task_id = call(user, kwargs={"amount": "-1"})
    letters.push(raw, raw, raw)
    eventually(lambda: [row[4] for row in letters.of(task_id)] == [3])
    letters.push(raw)
    eventually(lambda: [row[4] for row in letters.of(task_id)] == [4])
    eventually(lambda: shared_stage.in_redis() == 0)


def test_dead_lettered_key_freezes_nothing(shared_stage, letters, user):
    raw, task_id = call(user, kwargs={"amount": "-1"})
    assert letters.one(raw, task_id)[0] == "invalid_event"
    shared_stage.publisher.publish(accrual(user, 1, "k"))
    eventually(lambda: shared_stage.balance(user) == 1)


def test_replay_header_is_believed_only_of_the_very_same_event(shared_stage, letters, user):
    first, first_id = call(user, kwargs={"amount": "-1"})
    letters.one(first, first_id)
    ((number,),) = shared_stage.rows("SELECT id FROM dead_letter WHERE message_id = %s", first_id)

    same, same_id = call(user, kwargs={"amount": "-1"}, headers={"tokentrail_dead_letter": number})
    other, other_id = call(user, kwargs={"amount": "-2"}, headers={"tokentrail_dead_letter": number})
    letters.push(same)
    eventually(lambda: [row[4] for row in letters.of(first_id)] == [2])
    assert letters.of(same_id) == []
    letters.push(other)
    eventually(lambda: len(letters.of(other_id)) == 1)
    assert [row[4] for row in letters.of(first_id)] == [2]


def test_rejection_is_the_answer_for_good_whatever_the_balance_becomes(shared_stage, shared_watcher, user):
    refused = shared_stage.publisher.publish(burn(user, 5, "burn"))
    eventually(lambda: "task-succeeded" in shared_watcher.types(refused))
    shared_stage.publisher.publish(accrual(user, 100, "fund"))
    eventually(lambda: shared_stage.balance(user) == 100)
    again = shared_stage.publisher.publish(burn(user, 5, "burn"))
    eventually(lambda: "task-succeeded" in shared_watcher.types(again))

    assert shared_watcher.last(refused, "result") == "rejected: insufficient tokens, 0 held, 5 asked"
    assert shared_watcher.last(again, "result") == "rejected: insufficient tokens, 0 held, 5 asked (again)"
    assert shared_stage.balance(user) == 100
    assert shared_stage.rows("SELECT number, reason, balance FROM rejected_event WHERE user_id = %s", user) == [
        (1, "insufficient_tokens", 0)
    ]


def test_letter_whose_commit_kills_the_database_connection_is_written_again_and_once(shared_stage, letters, user):
    with psycopg.connect(shared_stage.database_url, autocommit=True) as owner:
        owner.execute(
            """
            CREATE OR REPLACE FUNCTION die_after() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF NEW.deliveries = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER die_after AFTER INSERT ON dead_letter DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW EXECUTE FUNCTION die_after()
            """
        )
        raw, task_id = call(user, kwargs={"amount": "-1"})
        letters.push(raw)
        eventually(lambda: "keeping messages" in shared_stage.log())
        owner.execute("DROP TRIGGER die_after ON dead_letter")
    eventually(lambda: len(letters.of(task_id)) == 1)
    eventually(lambda: shared_stage.in_redis() == 0)
