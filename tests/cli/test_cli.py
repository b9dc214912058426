"""The command line: what it prints, its exit codes, and that bad input is one sentence and changes nothing."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import tomllib

import psycopg
import pytest
import redis

from schema.events import Accrual, Burn, event_json
from schema.messages import APPLY_MANY
from worker import config
from worker.cli import main
from worker.config import ROOT, settings
from worker.ledger.deliveries import Origin
from worker.ledger.settle import Ledger
from worker.local.embedded.process import free_port
from worker.queue.parsing import read_work
from worker.schema_version import known_revision


@pytest.fixture
def tokentrail(monkeypatch, capsys):
    """`tokentrail("history", "alice")`: exit code, standard output, standard error."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["tokentrail", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        config.settings.cache_clear()
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    return run


@pytest.fixture
def queue(broker_url, monkeypatch):
    """The queue `tokens` of the broker that BROKER_URL names."""
    monkeypatch.setenv("BROKER_URL", broker_url)
    with redis.Redis.from_url(broker_url, decode_responses=True) as client:
        yield lambda: [json.loads(each) for each in reversed(client.lrange("tokens", 0, -1))]


@pytest.fixture
def books(database_url, monkeypatch):
    """`books(event, …)`: apply these to the database that DATABASE_URL names."""
    monkeypatch.setenv("DATABASE_URL", database_url)

    def apply(*events):
        config.settings.cache_clear()
        kwargs = {"events": [json.loads(event_json(event)) for event in events]}
        work = read_work(APPLY_MANY, (), kwargs, Origin(task=APPLY_MANY), max_amount=settings().max_amount)
        ledger = Ledger(settings(), stripe=1)
        ledger.settle(work.deliveries, work.letters)
        ledger.close()

    return apply


ONE = ("publish", "--type", "accrual", "--user", "alice", "--amount", "12.5", "--source", "shop")


def lines(*events):
    return "".join(f"{event_json(event)}\n" for event in events).encode()


def accrual(n):
    return Accrual(user_id="alice", amount=1, idempotency_key=f"order-{n}", source="shop")


def test_help_names_every_command(tokentrail):
    code, out, _ = tokentrail("--help")
    assert code == 0
    for command in (
        "up",
        "demo",
        "migrate",
        "worker",
        "api",
        "flower",
        "publish",
        "history",
        "receipt",
        "dead-letters",
        "supply",
        "settings",
    ):
        assert f" {command} " in out


def test_version_says_what_to_name_in_a_report(tokentrail):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = ".".join(map(str, sys.version_info[:3]))
    said = f"tokentrail {project['version']}, schema {known_revision()}, Python {python}\n"
    assert tokentrail("--version") == (0, said, "")


def test_publish_sends_one_event(tokentrail, queue):
    code, out, err = tokentrail(*ONE, "--key", "order-1", "--metadata", '{"price": 0.10}')
    assert (code, err) == (0, "")
    (message,) = queue()
    assert out == f"Published accrual with the key order-1 (message {message['headers']['id']}).\n"


def test_publish_shows_the_key_it_made_up(tokentrail, queue):
    code, out, _ = tokentrail(*ONE)
    assert code == 0
    key = out.split("the key ")[1].split()[0]
    assert key in queue()[0]["headers"]["kwargsrepr"]


def test_publish_sends_a_file_in_order(tokentrail, queue, tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_bytes(lines(*map(accrual, range(3))) + b"\n   \n" + lines(accrual(3)))
    assert tokentrail("publish", str(file)) == (0, "Published 4 events to the queue tokens.\n", "")
    assert [f"order-{n}" in each["headers"]["kwargsrepr"] for n, each in enumerate(queue())] == [True] * 4


def test_one_of_something_is_not_several(tokentrail, queue, books):
    books(accrual(1))
    said = tokentrail("publish", "-", "--lanes", "1", stdin=lines(accrual(2)))
    assert said == (0, "Published 1 event to 1 lane of the queue tokens.\n", "")
    assert "page 1 of 1, 1 record " in tokentrail("history", "alice")[1]


def test_publish_reads_standard_input_and_sends_bulks(tokentrail, queue):
    code, out, _ = tokentrail("publish", "-", "--bulk", stdin=lines(*map(accrual, range(1100))))
    assert (code, out) == (0, "Published 1,100 events to the queue tokens.\n")
    assert [each["headers"]["task"] for each in queue()] == ["tokens.apply_many"] * 3


def test_publish_of_a_file_with_a_wrong_line_sends_nothing(tokentrail, queue):
    wrong = [b"no json", b'{"type":"accrual"}', b'{"a":1,"a":2}', b"\xff\xfe", b"[" * 100_000]
    code, out, err = tokentrail("publish", "-", stdin=lines(accrual(1)) + b"\n".join(wrong) + b"\n{}" * 8)
    assert (code, out) == (2, "")
    assert "Nothing was sent: 13 lines are no events:" in err
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
        (("publish", "-"), "- holds no events."),
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
def test_bad_input_is_one_sentence_and_exit_code_2(tokentrail, queue, books, arguments, sentence):
    code, out, err = tokentrail(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tokentrail: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert queue() == []


@pytest.mark.parametrize("command", ["publish", "history", "supply", "worker", "api", "migrate"])
def test_without_servers_every_command_says_what_to_do(tokentrail, command):
    arguments = {"publish": ONE, "history": ("history", "alice")}.get(command, (command,))
    code, out, err = tokentrail(*arguments)
    assert (code, out) == (2, "")
    assert "tokentrail up" in err


def test_publish_says_when_redis_is_away_and_names_the_key(tokentrail, monkeypatch):
    monkeypatch.setenv("BROKER_URL", f"redis://:secret@127.0.0.1:{free_port()}/0")
    code, out, err = tokentrail(*ONE, "--key", "order-1")
    assert (code, out) == (1, "")
    assert err.startswith("tokentrail: Redis at 127.0.0.1:")
    assert err.endswith(
        "1 event not published. When that is mended, publish it again with --key order-1: it counts once.\n"
    )
    assert "secret" not in err


@pytest.mark.parametrize("url", ["http://localhost", "redis://localhost:port/0", "sentinel://localhost:1/0"])
def test_unusable_broker_url_is_a_sentence(tokentrail, monkeypatch, url):
    monkeypatch.setenv("BROKER_URL", url)
    code, _, err = tokentrail(*ONE)
    assert code == 2
    assert err.startswith("tokentrail: BROKER_URL is not usable: ")


def test_history_shows_records_newest_first(tokentrail, books):
    books(accrual(1), Burn(user_id="alice", amount="0.000777", idempotency_key="call", action="chat\x1b[31m"))
    code, out, _ = tokentrail("history", "alice")
    assert code == 0
    assert "page 1 of 1, 2 records " in out
    burned, accrued = (line.split() for line in out.splitlines() if line.strip()[:1] in {"1", "2"})
    assert burned[-4:] == ["-0.000777", "1", "0.999223", "call"]
    assert accrued[-5:] == ["shop", "+1", "0", "1", "order-1"]
    assert "\x1b" not in out  # a producer's text shall not steer the terminal


def test_history_as_json_is_the_answer_of_the_api(tokentrail, books):
    books(accrual(1), accrual(2))
    code, out, _ = tokentrail("history", "alice", "--limit", "1", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["pagination"] == {"page": 1, "limit": 1, "total": 2, "totalPages": 2}
    assert [each["idempotencyKey"] for each in answer["transactions"]] == ["order-2"]


def test_history_of_a_user_without_records_says_so(tokentrail, books):
    assert tokentrail("history", "[bold]nobody") == (0, "[bold]nobody has no records.\n", "")


def test_supply_is_what_was_issued_and_burned(tokentrail, books):
    books(accrual(1), Burn(user_id="alice", amount="0.000777", idempotency_key="call", action="chat"))
    code, out, _ = tokentrail("supply", "--json")
    assert code == 0
    assert json.loads(out) == {"issued": "1", "burned": "0.000777", "circulating": "0.999223", "legacy": "0"}
    assert "0.999223" in tokentrail("supply")[1]


def test_database_that_is_away_or_not_migrated_is_a_sentence(tokentrail, monkeypatch, empty_database_url, queue):
    monkeypatch.setenv("DATABASE_URL", empty_database_url)
    for command in (("supply",), ("worker",)):
        code, _, err = tokentrail(*command)
        assert (code, err) == (1, "tokentrail: The database has no schema yet: run `tokentrail migrate`.\n")
    monkeypatch.setenv("DATABASE_URL", f"postgresql://u:secret@127.0.0.1:{free_port()}/d")
    for command in (("supply",), ("worker",)):
        code, _, err = tokentrail(*command)
        assert code == 1
        assert "refused" in err
        assert "secret" not in err
        assert err.count("\n") == 1


def test_worker_says_when_redis_is_away(tokentrail, books, monkeypatch):
    monkeypatch.setenv("BROKER_URL", f"redis://:secret@127.0.0.1:{free_port()}/0")
    code, _, err = tokentrail("worker")
    assert code == 1
    assert "cannot be used" in err
    assert "secret" not in err


def test_settings_shows_where_values_come_from_and_no_secret(tokentrail, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hush@db.example/tokens?sslpassword=hush")
    monkeypatch.setenv("TOKENTRAIL_BATCH_SIZE", "7")
    (config.HOME / "servers.json").touch(0o600)
    (config.HOME / "servers.json").write_text(
        json.dumps({"broker_url": "redis://:hush@127.0.0.1:1/0", "pid": os.getpid()})
    )
    try:
        code, out, _ = tokentrail("settings", "--json")
        found = json.loads(out)
        assert code == 0
        assert "hush" not in out + tokentrail("settings")[1]
    finally:
        (config.HOME / "servers.json").unlink()
    shown = {name: (each["value"], each["from"]) for name, each in found.items()}
    assert shown["DATABASE_URL"] == ("postgresql://me:********@db.example/tokens?********", "environment")
    assert shown["BROKER_URL"] == ("redis://:********@127.0.0.1:1/0", "tokentrail up")
    assert shown["TOKENTRAIL_BATCH_SIZE"] == (7, "environment")
    assert shown["TOKENTRAIL_QUEUE"] == ("tokens", "default")


def test_wrong_setting_is_a_sentence_and_exit_code_2(tokentrail, monkeypatch):
    monkeypatch.setenv("TOKENTRAIL_BATCH_SIZE", "many")
    code, _, err = tokentrail("settings")
    assert code == 2
    assert err.startswith("tokentrail: TOKENTRAIL_BATCH_SIZE is not usable")


def test_publish_with_standard_input_closed_says_so(broker_url):
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


def test_nothing_of_a_refused_command_reaches_the_database(tokentrail, books, database_url, queue):
    tokentrail("publish", "-", stdin=lines(accrual(1)) + b"{}")
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM account").fetchone() == (0,)
    assert queue() == []
