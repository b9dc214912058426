"""Commands as a user runs them: what they print and change, and that bad input is refused."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib

import psycopg
import pytest
import redis

from schema.events import event_json
from tests.kit.events import accrual, burn
from worker.cli import COMMANDS
from worker.config import ROOT, Settings
from worker.ledger.dead_letters import NewDeadLetter
from worker.ledger.deliveries import Delivery, Origin
from worker.ledger.settle import Ledger
from worker.schema_version import known_revision


@pytest.fixture
def queue(broker_url, monkeypatch):
    """The queue `tokens` of the broker that BROKER_URL names."""
    monkeypatch.setenv("BROKER_URL", broker_url)
    with redis.Redis.from_url(broker_url, decode_responses=True) as client:
        yield lambda: [json.loads(each) for each in reversed(client.lrange("tokens", 0, -1))]


@pytest.fixture
def settle(database_url, monkeypatch):
    """`settle(event, …)`: apply these to the database that DATABASE_URL names."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    ledger = Ledger(Settings(DATABASE_URL=database_url), stripe=1)
    yield lambda *events, letters=(): ledger.settle([Delivery.of(event) for event in events], list(letters))
    ledger.close()


ONE = ("publish", "--type", "accrual", "--user", "alice", "--amount", "12.5", "--source", "shop")


def lines(*events):
    return "".join(f"{event_json(event)}\n" for event in events).encode()


def order(n):
    return accrual("alice", 1, f"order-{n}", source="shop")


def test_help_names_every_command(tokentrail):
    code, out, _ = tokentrail("--help")
    assert code == 0
    for command, summary in COMMANDS.items():
        assert f" {command} " in out
        assert summary.split()[0] in out


def test_version(tokentrail):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = ".".join(map(str, sys.version_info[:3]))
    assert tokentrail("--version") == (
        0,
        f"tokentrail {project['version']}, schema {known_revision()}, Python {python}\n",
        "",
    )


def test_publish_sends_one_event(tokentrail, queue):
    code, out, err = tokentrail(*ONE, "--key", "order-1", "--metadata", '{"price": 0.10}')
    assert (code, err) == (0, "")
    (message,) = queue()
    assert out == f"Published accrual with the key order-1 (message {message['headers']['id']}).\n"


def test_publish_prints_a_new_key(tokentrail, queue):
    code, out, _ = tokentrail(*ONE)
    assert code == 0
    key = out.split("the key ")[1].split()[0]
    assert key in queue()[0]["headers"]["kwargsrepr"]


def test_publish_sends_a_file_in_order(tokentrail, queue, tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_bytes(lines(*map(order, range(3))) + b"\n   \n" + lines(order(3)))
    assert tokentrail("publish", str(file)) == (0, "Published 4 events to the queue tokens.\n", "")
    assert [f"order-{n}" in each["headers"]["kwargsrepr"] for n, each in enumerate(queue())] == [True] * 4


def test_singular(tokentrail, queue, settle):
    settle(order(1))
    result = tokentrail("publish", "-", "--lanes", "1", stdin=lines(order(2)))
    assert result == (0, "Published 1 event to 1 lane of the queue tokens.\n", "")
    assert "page 1 of 1, 1 record " in tokentrail("history", "alice")[1]


def test_publish_reads_standard_input_and_sends_bulks(tokentrail, queue):
    code, out, _ = tokentrail("publish", "-", "--bulk", stdin=lines(*map(order, range(1100))))
    assert (code, out) == (0, "Published 1,100 events to the queue tokens.\n")
    assert [each["headers"]["task"] for each in queue()] == ["tokens.apply_many"] * 3


def test_publish_of_a_file_with_a_wrong_line_sends_nothing(tokentrail, queue):
    wrong = [b"no json", b'{"type":"accrual"}', b'{"a":1,"a":2}', b"\xff\xfe", b"[" * 100_000]
    code, out, err = tokentrail("publish", "-", stdin=lines(order(1)) + b"\n".join(wrong) + b"\n{}" * 8)
    assert (code, out) == (2, "")
    assert "Nothing was sent: 13 lines" in err
    assert [f"line {number}: " in err for number in range(1, 14)] == [False, *[True] * 10, False, False]
    assert "line 2: This is not JSON" in err
    assert "line 3: user_id is missing" in err
    assert "line 4: The event has the field 'a' twice." in err
    assert "and 3 more" in err
    assert "Traceback" not in err
    assert queue() == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("publish",), "Give either a FILE"),
        (("publish", "-", "--user", "alice"), "Give either a FILE"),
        (("publish", "-"), "contains no events"),
        (("publish", "/no/such/file"), "Cannot read /no/such/file: No such file or directory."),
        (("publish", "/"), "Cannot read /: Is a directory."),
        ((*ONE, "--bulk"), "--bulk is for a FILE"),
        ((*ONE, "--amount", "1e5"), "amount is '1e5': must be digits"),
        ((*ONE, "--amount", "-1"), "amount is '-1'"),
        ((*ONE, "--action", "chat"), "'action' is not a field of this event"),
        ((*ONE, "--type", "gift"), "type is 'gift': must be accrual or burn."),
        ((*ONE, "--metadata", "{"), "--metadata is not JSON"),
        ((*ONE, "--metadata", "[1]"), "metadata is a list: must be a JSON object"),
        ((*ONE, "--occurred-at", "yesterday"), "occurred_at is 'yesterday'"),
        ((*ONE, "--lanes", "-1"), "--lanes"),
        (("history",), "Missing argument"),
        (("history", ""), "USER must be 1 to 128 characters"),
        (("receipt", "", "k"), "USER must be 1 to 128 characters"),
        (("receipt", "u", ""), "KEY must be 1 to 200 characters"),
        (("history", "alice", "--page", "0"), "--page"),
        (("history", "alice", "--limit", "101"), "--limit"),
        (("demo", "--run", "no-dashes"), "--run must be 1 to 40"),
        (("demo", "--events", "0"), "--events"),
        (("worker", "--lanes", "3-1"), "3-1 ends before it begins"),
        (("worker", "--lanes", "a"), "--lanes must be numbers"),
        (("worker", "--processes", "0"), "--processes"),
        (("api", "--port", "70000"), "--port"),
        (("nonsense",), "No such command 'nonsense'"),
        (("supply", "--nonsense"), "No such option"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tokentrail, queue, settle, arguments, sentence):
    code, out, err = tokentrail(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tokentrail: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert queue() == []


def test_history_shows_records_newest_first(tokentrail, settle):
    settle(order(1), burn("alice", "0.000777", "call", action="chat\x1b[31m"))
    code, out, _ = tokentrail("history", "alice")
    assert code == 0
    assert "page 1 of 1, 2 records " in out
    burned, accrued = (line.split() for line in out.splitlines() if line.strip()[:1] in {"1", "2"})
    assert burned[-4:] == ["-0.000777", "1", "0.999223", "call"]
    assert accrued[-5:] == ["shop", "+1", "0", "1", "order-1"]
    assert "\x1b" not in out, "a producer's text must not drive the terminal"


def test_history_as_json_is_the_response_of_the_api(tokentrail, settle):
    settle(order(1), order(2))
    code, out, _ = tokentrail("history", "alice", "--limit", "1", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["pagination"] == {"page": 1, "limit": 1, "total": 2, "totalPages": 2}
    assert [each["idempotencyKey"] for each in answer["transactions"]] == ["order-2"]


def test_history_of_a_user_without_records(tokentrail, settle):
    assert tokentrail("history", "[bold]nobody") == (0, "[bold]nobody has no records.\n", "")


def test_supply(tokentrail, settle):
    settle(order(1), burn("alice", "0.000777", "call"))
    code, out, _ = tokentrail("supply", "--json")
    assert code == 0
    assert json.loads(out) == {"issued": "1", "burned": "0.000777", "circulating": "0.999223", "legacy": "0"}
    assert "0.999223" in tokentrail("supply")[1]


def test_history_shows_rejections(tokentrail, settle):
    settle(burn("ann", 9, "b"))
    code, out, _ = tokentrail("history", "ann", "--rejected")
    assert code == 0
    assert "page 1 of 1, 1 rejection " in out
    assert "insufficient_tokens" in out
    assert json.loads(tokentrail("history", "ann", "--rejected", "--json").out)["pagination"]["total"] == 1
    assert tokentrail("history", "bob", "--rejected") == (0, "bob has no rejections.\n", "")


def test_receipt_shows_what_became_of_an_event(tokentrail, settle):
    letter = NewDeadLetter.of_event("expired", "It is too late.", accrual("ann", 7, "d\x1b[31m"), Origin("x", "m"))
    settle(accrual("ann", "1.5", "a"), burn("ann", 9, "b"), letters=[letter])
    for key, nouns in (
        ("a", ("applied", "1 (accrual)", "0 → 1.5")),
        ("b", ("rejected", "insufficient_tokens", "1.5")),
        ("d\x1b[31m", ("dead-lettered", "expired", "It is too late.", "1, open")),
        ("x", ("unknown", "may still be queued")),
    ):
        code, out, err = tokentrail("receipt", "ann", key)
        assert (code, err) == (0, "")
        assert all(noun in out for noun in nouns), out
        assert "\x1b" not in out
    (receipt,) = json.loads(tokentrail("receipt", "ann", "a", "--json").out)["receipts"]
    assert receipt["status"] == "applied"


def test_publish_with_standard_input_closed(broker_url):
    """As a service manager may start it."""
    ended = subprocess.run(
        f"exec {shlex.quote(sys.executable)} -m worker.cli publish - <&-",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "tokentrail: Cannot read -: it is closed.\n"


def test_nothing_of_a_refused_command_reaches_the_database(tokentrail, settle, database_url, queue):
    tokentrail("publish", "-", stdin=lines(order(1)) + b"{}")
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM account").fetchone() == (0,)
    assert queue() == []
