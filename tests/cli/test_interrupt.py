"""Ctrl-C in each kind of command while it waits for a server: exit code 130, one line at most, and safe to repeat."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys

import psycopg
import pytest

from schema.broker import connect
from schema.events import event_json
from schema.messages import ACCRUE
from tests.kit.cli import TOKENTRAIL, Result, started
from tests.kit.events import accrual
from tests.kit.servers import Broker
from tests.kit.wait import eventually
from worker.cli.worker import CELERY
from worker.config import Settings
from worker.ledger.deliveries import Origin
from worker.ledger.settle import Ledger
from worker.migration import migrate
from worker.queue.parsing import letter_for

WAITING = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.fixture(autouse=True)
def _default_sigint():
    """A shell ignores SIGINT in background jobs, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c(process):
    """Exit code, standard output and standard error."""
    assert process.poll() is None, "it has not ended by itself"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return Result(process.returncode, out, err)


def assert_interrupted(result, noun):
    assert (result.code, result.out) == (130, "")
    assert result.err.startswith("tokentrail: Interrupted: ")
    assert result.err.count("\n") == 1
    assert noun in result.err


@pytest.mark.parametrize(
    "command",
    [
        ("history", "ann"),
        ("receipt", "ann", "k"),
        ("supply",),
        ("dead-letters", "list"),
        ("migrate", "status"),
        ("worker",),
        ("publish", "--type", "accrual", "--user", "ann", "--amount", "1", "--source", "s"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_command_that_waits_for_a_silent_server_ends_silently(command):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(60)
        port = mute.getsockname()[1]
        servers = {"DATABASE_URL": f"postgresql://u@127.0.0.1:{port}/d", "BROKER_URL": f"redis://127.0.0.1:{port}/0"}
        with started(*command, **servers) as process:
            connection, _ = mute.accept()
            with connection:
                assert connection.recv(1), "it has sent a request"
                assert ctrl_c(process) == (130, "", "")


def test_publish_reports_how_much_of_a_file_was_published(tmp_path):
    """On a broker of its own, because its pause stops every writer."""
    file = tmp_path / "events"
    file.write_text("".join(f"{event_json(accrual('ann', 1, f'k-{n}'))}\n" for n in range(1_500)))
    command = (*TOKENTRAIL, "publish", str(file))
    with Broker(tmp_path / "broker") as given, given.client as broker:
        broker.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
        with started(program=command, BROKER_URL=given.url) as process:
            eventually(lambda: int(broker.info("clients")["blocked_clients"]) > 0)
            assert_interrupted(ctrl_c(process), "at least 0 of 1,500 events")
        broker.execute_command("CLIENT", "UNPAUSE")
        with started(program=command, BROKER_URL=given.url) as process:
            assert process.communicate(timeout=60) == ("Published 1,500 events to the queue tokens.\n", "")


def test_migrate_goes_on_where_it_was_interrupted(empty_database_url):
    migrate(empty_database_url, "0001")
    servers = {"DATABASE_URL": empty_database_url}
    with (
        psycopg.connect(empty_database_url, autocommit=True) as watcher,
        psycopg.connect(empty_database_url) as reader,
    ):
        reader.execute("SELECT FROM burned_credit")
        with started("migrate", **servers) as process:
            eventually(lambda: watcher.execute(WAITING).fetchall() or process.poll() is not None)
            assert_interrupted(ctrl_c(process), "tokentrail migrate")
    with started("migrate", **servers) as process:
        assert process.communicate(timeout=60) == ("Migrated the schema from 0001 to 0002.\n", "")


@pytest.mark.parametrize(
    ("command", "noun", "done"),
    [
        (("replay", "--since", "1d"), "replaying again", "Published 3 events"),
        (("purge", "--older-than", "0s"), "purge again", "Purged"),
    ],
    ids=["replay", "purge"],
)
def test_dead_letters_command_can_be_repeated(database_url, broker_url, command, noun, done):
    events = [accrual("ann", 1, str(n)) for n in range(3)]
    letters = [
        letter_for(json.loads(event_json(event)), "revoked", "It was revoked.", Origin(ACCRUE, event.idempotency_key))
        for event in events
    ]
    with contextlib.closing(Ledger(Settings(DATABASE_URL=database_url), stripe=1)) as ledger:
        ledger.settle([], letters)
    servers = {"DATABASE_URL": database_url, "BROKER_URL": broker_url}
    with (
        psycopg.connect(database_url, autocommit=True) as watcher,
        psycopg.connect(database_url) as stranger,
    ):
        stranger.execute("SELECT FROM dead_letter FOR UPDATE")
        with started("dead-letters", *command, **servers) as process:
            eventually(lambda: watcher.execute(WAITING).fetchall() or process.poll() is not None)
            assert_interrupted(ctrl_c(process), noun)
    with started("dead-letters", *command, **servers) as process:
        out, err = process.communicate(timeout=60)
    assert (out[: len(done)], err, process.returncode) == (done, "", 0)


@pytest.mark.parametrize(
    "program", [(*TOKENTRAIL, "worker"), (sys.executable, "-m", *CELERY)], ids=["ours", "celery's"]
)
def test_ctrl_c_stops_a_worker(database_url, broker_url, program):
    with started(program=program, DATABASE_URL=database_url, BROKER_URL=broker_url) as process:
        for line in process.stderr:
            if " ready." in line:
                break
        code, out, err = ctrl_c(process)
    assert (code, err) == (1, ""), "as every Celery worker"
    assert "Warm shutdown" in out


def test_ctrl_c_ends_a_demo(database_url, broker_url):
    """Which waits for outcomes, and no worker is there to give any."""
    with (
        connect(broker_url) as broker,
        started("demo", DATABASE_URL=database_url, BROKER_URL=broker_url) as process,
    ):
        eventually(lambda: broker.llen("tokens") > 0 or process.poll() is not None)
        code, _, err = ctrl_c(process)
    assert code == 130
    assert "Traceback" not in err
