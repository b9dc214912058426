"""`tokentrail dead-letters`: list, replay so that each event counts once whatever is killed, discard, purge."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys

import psycopg
import pytest
import redis

from schema.events import parse_event
from schema.messages import ACCRUE, APPLY_MANY, TYPES
from schema.publisher import Publisher, PublishError
from schema.reasons import DEAD_LETTER_REASONS
from tests.kit.events import accrual
from tests.kit.stage import Stage
from tests.kit.wait import eventually
from worker.config import Settings
from worker.ledger.deliveries import Origin
from worker.ledger.settle import Ledger
from worker.queue.parsing import letter_for, parse_call, read_body
from worker.queue.replay import replay

#: Letters that are replayed while workers are killed; TOKENTRAIL_CHAOS=long takes the full number.
MANY = 10_000 if os.environ.get("TOKENTRAIL_CHAOS") == "long" else 2_000


@pytest.fixture
def letters(tokentrail, own_servers):
    """`letters("replay", 1)`: exit code, standard output, standard error."""
    return lambda *arguments: tokentrail("dead-letters", *arguments)


@pytest.fixture
def listed(letters):
    """`listed("--user", "ann")`: the letters that are listed, as JSON says them."""

    def run(*arguments):
        code, out, err = letters("list", "--json", *arguments)
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


class Desk:
    """A ledger that applies queued messages as a worker does, one at a time and when `work` is called."""

    def __init__(self, database_url, broker_url):
        self._url = database_url
        self.redis = redis.Redis.from_url(broker_url)
        self.ledger = Ledger(Settings(DATABASE_URL=database_url), stripe=1)
        self._ids = 0

    def rows(self, query, *parameters):
        with psycopg.connect(self._url, autocommit=True) as connection:
            return connection.execute(query, parameters).fetchall()

    def state(self, number):
        return self.rows("SELECT state, reason, replays, deliveries FROM dead_letter WHERE id = %s", number)[0]

    def refuse(self, kwargs, reason, *, task=ACCRUE, body=None, event=True):
        """Write the dead letter of a call, as a worker does; returns its number."""
        self._ids += 1
        body = json.dumps([[], kwargs, {}]).encode() if body is None else body
        origin = Origin(task, f"id-{self._ids}", body, {"headers": {}})
        letter = letter_for(kwargs if event else None, reason, "As it is.", origin, type_=TYPES.get(task))
        self.ledger.settle([], [letter])
        return self.rows("SELECT max(id) FROM dead_letter")[0][0]

    def queued(self):
        return [json.loads(raw) for raw in reversed(self.redis.lrange("tokens", 0, -1))]

    def work(self, max_amount=10**12):
        """Decide what is queued."""
        while raw := self.redis.rpop("tokens"):
            sent = json.loads(raw)
            body = base64.b64decode(sent["body"])
            headers = sent["headers"]
            origin = Origin(headers["task"], headers["id"], body, headers, replay_of=headers["tokentrail_dead_letter"])
            _, kwargs, _ = read_body(body)
            parsed = parse_call(headers["task"], [], kwargs, origin, max_amount=max_amount)
            self.ledger.settle(parsed.deliveries, parsed.letters)

    def history(self, user):
        return self.rows(
            "SELECT idempotency_key, amount FROM transaction_record WHERE user_id = %s ORDER BY sequence", user
        )


@pytest.fixture
def desk(database_url, broker_url):
    desk = Desk(database_url, broker_url)
    yield desk
    desk.ledger.close()
    desk.redis.close()


def fields(key="k", user="ann", amount="5", **more):
    return {"user_id": user, "amount": amount, "idempotency_key": key, "source": "shop"} | more


# List and show


def test_list_is_newest_first_and_pages_by_number(desk, letters, listed):
    numbers = [desk.refuse(fields(f"k{n}"), "expired") for n in range(5)]
    assert [kept["id"] for kept in listed()] == numbers[::-1]
    assert [kept["id"] for kept in listed("--limit", 2)] == numbers[:2:-1]
    assert [kept["id"] for kept in listed("--limit", 2, "--before", numbers[3])] == [numbers[2], numbers[1]]
    code, out, _ = letters("list", "--limit", 2)
    assert code == 0
    assert f"--before {numbers[3]}" in out
    assert "expired" in out
    assert "ann" in out


def test_list_filters_by_reason_user_state_and_time(desk, letters, listed):
    expired = desk.refuse(fields(user="ann"), "expired")
    revoked = desk.refuse(fields(user="bob"), "revoked")
    assert [kept["id"] for kept in listed("--reason", "expired")] == [expired]
    assert [kept["id"] for kept in listed("--reason", "expired", "--reason", "revoked")] == [revoked, expired]
    assert [kept["id"] for kept in listed("--user", "bob")] == [revoked]
    desk.rows("UPDATE dead_letter SET last_seen_at = now() - interval '2 days' WHERE id = %s RETURNING id", expired)
    assert [kept["id"] for kept in listed("--since", "1d")] == [revoked]
    assert [kept["id"] for kept in listed("--since", "2020-01-01T00:00:00Z")] == [revoked, expired]
    letters("discard", expired, "--reason", "a test")
    assert [kept["id"] for kept in listed()] == [revoked]
    assert [kept["id"] for kept in listed("--state", "discarded")] == [expired]
    assert [kept["id"] for kept in listed("--state", "all")] == [revoked, expired]
    assert letters("list", "--user", "nobody") == (0, "There are no such dead letters.\n", "")


def test_show_has_all_that_is_kept_and_says_whether_it_can_be_replayed(desk, letters):
    good = desk.refuse(fields(note="\x1b[31m", metadata={"a": 1}), "expired")
    bad = desk.refuse(None, "undecodable", body=b"\xff\x00", event=False)
    code, out, _ = letters("show", good)
    assert code == 0
    assert " ".join(DEAD_LETTER_REASONS["expired"].split()[:6]) in out
    assert "not possible: it holds no valid event: 'note' is not a field of this event." in " ".join(out.split())
    assert "\x1b" not in out
    code, out, _ = letters("show", bad, "--json")
    shown = json.loads(out)
    assert (shown["body_base64"], shown["event"], shown["reason"]) == ("/wA=", None, "undecodable")
    assert "cannot be read" in shown["cannot_replay"]


@pytest.mark.parametrize(
    ("arguments", "noun"),
    [
        (("show", 1), "dead letter 1"),
        (("list", "--reason", "bad"), "--reason"),
        (("list", "--state", "closed"), "--state"),
        (("list", "--since", "yesterday"), "--since"),
        (("list", "--user", "a\x00"), "--user"),
        (("replay",), "--reason"),
        (("replay", 1, "--reason", "expired"), "--reason"),
        (("replay", 1, "--by", " "), "--by"),
        (("discard", 1), "--reason"),
        (("discard", 1, "--reason", " "), "--reason"),
        (("purge",), "--older-than"),
        (("purge", "--older-than", "old"), "--older-than"),
    ],
)
def test_wrong_command_is_one_line_and_exit_code_2(letters, arguments, noun):
    code, out, err = letters(*arguments)
    assert (code, out) == (2, "")
    assert noun in err
    assert err.count("\n") == 1


# Replay


def test_replay_publishes_the_same_event_and_records_who_and_when(desk, letters, listed):
    number = desk.refuse(fields(amount="5.10", metadata={"price": 0.5}), "expired")

    code, out, err = letters("replay", number, "--by", "carol")

    assert (code, err) == (0, "")
    assert out == "Published 1 event of 1 dead letter to the queue tokens.\n"
    (sent,) = desk.queued()
    assert sent["headers"]["task"] == ACCRUE
    assert sent["headers"]["tokentrail_dead_letter"] == number
    (kept,) = listed("--state", "all")
    assert (kept["state"], kept["state_changed_by"], kept["replays"]) == ("replayed", "carol", 1)
    assert kept["state_changed_at"] is not None
    desk.work()
    assert desk.history("ann") == [("k", parse_event(fields(amount="5.1"), type_="accrual").amount)]
    assert desk.state(number)[0] == "replayed"


def test_replay_twice_applies_once(desk, letters):
    number = desk.refuse(fields(), "expired")
    assert letters("replay", number)[0] == 0
    desk.work()
    code, _, err = letters("replay", number)
    assert code == 1
    assert f"{number}: it was replayed by " in err
    assert "add --again." in err
    assert letters("replay", number, "--again")[0] == 0
    desk.work()
    assert desk.history("ann") == [("k", 5)]
    assert desk.state(number)[2] == 2


def test_replay_that_fails_opens_its_row_again_with_the_new_reason(desk, letters):
    with psycopg.connect(desk._url, autocommit=True) as owner:
        owner.execute("ALTER TABLE transaction_record ADD CONSTRAINT curse CHECK (user_id <> 'ann') NOT VALID")
        number = desk.refuse(fields(), "expired")
        for tries in (1, 2):
            assert letters("replay", number)[0] == 0
            assert desk.state(number) == ("replayed", "expired" if tries == 1 else "refused_by_database", tries, tries)
            desk.work()
            assert desk.state(number) == ("open", "refused_by_database", tries, tries + 1)
        assert desk.rows("SELECT count(*) FROM dead_letter") == [(1,)]
        owner.execute("ALTER TABLE transaction_record DROP CONSTRAINT curse")
    assert letters("replay", "--reason", "refused_by_database")[0] == 0
    desk.work()
    assert desk.history("ann") == [("k", 5)]
    assert desk.state(number)[0] == "replayed"


def test_replay_that_meets_another_event_under_its_key_becomes_a_conflict_that_cannot_be_replayed(desk, letters):
    number = desk.refuse(fields(), "expired")
    better = desk.refuse(fields(amount="6"), "expired")
    letters("replay", better)
    desk.work()
    letters("replay", number)
    desk.work()
    assert desk.state(number)[:2] == ("open", "conflict")
    code, out, err = letters("replay", number)
    assert (code, out) == (1, "Published 0 events of 0 dead letters to the queue tokens.\n")
    assert "its key stands for another event, now and for ever: discard it, and send a new key." in err
    assert desk.history("ann") == [("k", 6)]


def test_bulk_letter_is_replayed_event_by_event_and_its_bad_events_get_letters_of_their_own(desk, letters, listed):
    events = [fields(f"k{n}") | {"type": "accrual"} for n in range(5)]
    events[1]["amount"] = "none"
    number = desk.refuse({"events": events}, "expired", task=APPLY_MANY)

    code, out, _ = letters("replay", number)
    assert (code, out) == (0, "Published 4 events of 1 dead letter to the queue tokens.\n")
    (kept,) = listed()
    assert (kept["reason"], kept["idempotency_key"], kept["event_index"]) == ("invalid_event", "k1", 1)
    desk.work()
    assert [key for key, _ in desk.history("ann")] == ["k0", "k2", "k3", "k4"]

    letters("replay", number, "--again")
    desk.work()
    assert len(desk.history("ann")) == 4
    assert desk.rows("SELECT count(*) FROM dead_letter") == [(2,)]


def test_event_of_a_replayed_bulk_letter_that_fails_is_one_letter_however_often_it_is_replayed(desk, letters, listed):
    desk.refuse(fields("k0", amount="9"), "expired")
    letters("replay", 1)
    desk.work()
    number = desk.refuse(
        {"events": [fields(f"k{n}") | {"type": "accrual"} for n in range(2)]}, "expired", task=APPLY_MANY
    )
    for _ in range(3):
        letters("replay", number, "--again")
        desk.work()
    (conflict,) = listed()
    assert (conflict["reason"], conflict["idempotency_key"], conflict["deliveries"]) == ("conflict", "k0", 3)


@pytest.mark.parametrize(
    ("kwargs", "more", "sentence"),
    [
        (fields(amount="-1"), {}, "it holds no valid event: amount is '-1': must be digits"),
        (fields(), {"task": "tokens.acrue"}, "it holds no valid event: type is missing: must be accrual or burn."),
        (None, {"body": b"no json"}, "it cannot be read: The body is not JSON"),
        (None, {"body": b"5"}, "it holds no valid event: An event must be a JSON object"),
        ({"events": []}, {"task": APPLY_MANY}, "it holds no events: tokens.apply_many takes"),
        ({"events": [5]}, {"task": APPLY_MANY}, "none of its events is valid, the first: An event must be"),
    ],
)
def test_letter_without_a_valid_event_cannot_be_replayed_and_says_why(desk, letters, kwargs, more, sentence):
    number = desk.refuse(kwargs, "expired", event=kwargs is not None, **more)
    code, _, err = letters("replay", number)
    assert code == 1
    assert f"  {number}: {sentence}" in err
    assert "discard it." in err.lower()
    assert desk.queued() == []
    assert desk.state(number)[0] == "open"


def test_letter_without_stored_event_is_replayed_from_its_body(desk, letters):
    tagged = fields(amount={"__type__": "decimal", "__value__": "5"})
    by_body = desk.refuse(tagged, "expired", event=False)
    call = {"task": ACCRUE, "id": "old", "args": [], "kwargs": fields("k2")}
    by_protocol_1 = desk.refuse(None, "expired", body=json.dumps(call).encode(), event=False)
    assert letters("replay", by_body, by_protocol_1)[0] == 0
    desk.work()
    assert desk.history("ann") == [("k", 5), ("k2", 5)]


def test_replay_goes_on_behind_letters_that_cannot_be_and_names_them(desk, letters):
    bad = [desk.refuse(fields(f"b{n}", amount="-1"), "expired") for n in range(12)]
    desk.refuse(fields(), "expired")
    code, out, err = letters("replay", "--reason", "expired")
    assert code == 1
    assert out == "Published 1 event of 1 dead letter to the queue tokens.\n"
    assert "12 dead letters cannot be replayed:" in err
    assert f"  {bad[0]}: " in err
    assert "and 2 more" in err
    assert letters("replay", 10**6)[2].endswith("  1000000: there is no such dead letter.\n")


def test_invalid_event_can_be_replayed_once_the_rule_allows_it(desk, letters, monkeypatch):
    number = desk.refuse(fields(amount="2000000000000"), "invalid_event")
    assert "at most 1000000000000" in letters("replay", number)[2]
    monkeypatch.setenv("TOKENTRAIL_MAX_AMOUNT", "5000000000000")
    assert letters("replay", number)[0] == 0
    desk.work(max_amount=10**12)  # a worker that has not heard of it yet
    assert desk.state(number) == ("open", "invalid_event", 1, 2)
    assert letters("replay", number)[0] == 0
    desk.work(max_amount=5 * 10**12)
    assert desk.history("ann") == [("k", 2 * 10**12)]


def test_letter_is_not_replayed_when_redis_does_not_take_it(desk, letters, monkeypatch, database_url):
    number = desk.refuse(fields(), "expired")
    monkeypatch.setenv("BROKER_URL", "redis://127.0.0.1:1/0")
    code, _, err = letters("replay", number)
    assert code == 1
    assert "0 letters were replayed before that; replaying again is safe." in err
    assert desk.state(number)[0] == "open"


def test_replay_that_fails_before_it_is_noted_stays_open(desk, database_url, broker_url):
    number = desk.refuse(fields(), "expired")

    class Overtaken(Publisher):
        def publish_named(self, events):
            sent = super().publish_named(events)
            raise PublishError("Killed here.", (), sent)

    with (
        Overtaken(broker_url) as publisher,
        psycopg.connect(database_url, autocommit=True) as connection,
        pytest.raises(PublishError, match="Killed here"),
    ):
        replay(connection, publisher, [number], states=frozenset({"open"}), by="test", max_amount=10**12)
    assert len(desk.queued()) == 1
    assert desk.state(number) == ("open", "expired", 0, 1)
    desk.work()
    assert desk.history("ann") == [("k", 5)]


def test_two_replays_at_once_publish_each_letter_once(desk, database_url, broker_url):
    numbers = [desk.refuse(fields(f"k{n}"), "expired") for n in range(300)]
    command = [sys.executable, "-m", "worker.cli", "dead-letters", "replay", "--reason", "expired"]
    environment = {**os.environ, "DATABASE_URL": database_url, "BROKER_URL": broker_url}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for each in both:
        each.communicate(timeout=60)
    assert len(desk.queued()) == len(numbers)
    assert desk.rows("SELECT state, replays, count(*) FROM dead_letter GROUP BY 1, 2") == [("replayed", 1, 300)]


# Discard and purge


def test_discard_closes_open_letters_for_the_record(desk, letters, listed):
    number = desk.refuse(fields(), "expired")
    assert letters("discard", number, "--reason", "sent by mistake", "--by", "dave") == (
        0,
        "Discarded 1 dead letter.\n",
        "",
    )
    (kept,) = listed("--state", "all")
    assert (kept["state"], kept["state_changed_by"], kept["state_note"]) == ("discarded", "dave", "sent by mistake")
    code, out, err = letters("discard", number, 99, "--reason", "again")
    assert (code, out) == (1, "Discarded 0 dead letters.\n")
    assert [line.split()[0] for line in err.splitlines()] == [str(number), "99"]
    assert "it was discarded by dave on " in letters("replay", number)[2]
    assert "it was discarded by dave on " in letters("replay", number, "--again")[2]
    assert desk.queued() == []


def test_discarded_letter_stays_so_when_its_message_comes_again(desk, letters):
    number = desk.refuse(fields(), "expired")
    letters("discard", number, "--reason", "no need")
    desk._ids -= 1  # the same message
    desk.refuse(fields(), "expired")
    assert desk.state(number) == ("discarded", "expired", 0, 2)


def test_purge_removes_old_bodies_and_nothing_else(desk, letters, listed):
    old = desk.refuse(fields("old"), "expired")
    only = desk.refuse(None, "undecodable", body=b"\xff", event=False)
    new = desk.refuse(fields("new"), "expired")
    desk.rows("UPDATE dead_letter SET last_seen_at = now() - interval '40 days' WHERE id < %s RETURNING id", new)
    before = {kept["id"]: kept for kept in listed()}

    code, out, _ = letters("purge", "--older-than", "30d")

    assert code == 0
    assert out.startswith("Purged the bodies of 1 dead letter.\nKept the bodies of 1 open ones")
    assert desk.rows("SELECT id FROM dead_letter WHERE body IS NULL AND purged_at IS NOT NULL") == [(old,)]
    after = {kept["id"]: kept for kept in listed()}
    changed = {"body_bytes": None, "purged_at": after[old]["purged_at"]}
    assert after == before | {old: before[old] | changed}
    assert letters("replay", old)[0] == 0

    letters("discard", only, "--reason", "noise")
    assert letters("purge", "--older-than", "30d")[1] == "Purged the bodies of 1 dead letter.\n"
    assert letters("purge", "--older-than", "30d")[1] == "Purged the bodies of 0 dead letters.\n"


def test_purge_goes_through_many_batches(desk, letters):
    desk.rows(
        """
        INSERT INTO dead_letter (fingerprint, reason, detail, event, body, first_seen_at, last_seen_at)
        SELECT sha256(n::text::bytea), 'expired', 'x', '{}', 'b', now(), now() FROM generate_series(1, 1201) AS n
        RETURNING id
        """
    )
    assert letters("purge", "--older-than", "0s")[1] == "Purged the bodies of 1,201 dead letters.\n"


# With workers and commands that are killed


def test_replay_of_many_letters_applies_each_once_whatever_is_killed(letters, database_url, broker_url, tmp_path):
    """The cause, a limit too low, is fixed; commands and workers are killed during two replays."""
    stage = Stage(database_url, broker_url, tmp_path)
    try:
        small = stage.start(max_amount=1)
        for start in range(0, MANY, 500):
            stage.publisher.publish_bulk([accrual(f"user {n % 97}", 2, f"k{n}") for n in range(start, start + 500)])
        eventually(lambda: stage.count("dead_letter") == MANY and stage.in_redis() == 0)
        small.kill()

        command = [sys.executable, "-m", "worker.cli", "dead-letters", "replay", "--reason", "invalid_event"]
        environment = {**os.environ, "DATABASE_URL": database_url, "BROKER_URL": broker_url}
        first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(lambda: stage.redis.llen("tokens") >= MANY // 10)
        first.kill()
        first.wait()
        assert stage.redis.llen("tokens") < MANY
        victim = stage.start(visibility_timeout=1, batch_size=50)
        eventually(lambda: stage.count("transaction_record") > 0)
        victim.kill()

        stage.start(visibility_timeout=1, batch_size=50)
        again = [sys.executable, "-m", "worker.cli", "dead-letters", "replay", "--reason", "invalid_event", "--again"]
        second = subprocess.Popen(again, env=environment, stdout=subprocess.DEVNULL)
        eventually(lambda: stage.count("transaction_record") > MANY // 3)
        stage.workers[-1].kill()
        assert second.wait(60) == 0
        stage.start(visibility_timeout=1)

        eventually(lambda: stage.count("transaction_record") == MANY and stage.in_redis() == 0)
        assert stage.rows("SELECT sum(balance) FROM account") == [(2 * MANY,)]
        assert stage.rows("SELECT DISTINCT state FROM dead_letter") == [("replayed",)]
        assert stage.count("dead_letter") == MANY
        assert stage.broken() == []
    finally:
        stage.close()
