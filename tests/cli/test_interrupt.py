"""Ctrl-C in each kind of command, while it is at something: what it says, its exit code, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from psycopg.waiting import Wait

from schema.events import event_json
from schema.messages import ACCRUE
from schema.publisher import connect
from tests.kit.brokers import Broker, eventually
from tests.kit.stage import accrual
from worker.cli.worker import CELERY
from worker.config import ROOT, Settings
from worker.db import connect as connect_database
from worker.ledger.deliveries import Origin
from worker.ledger.settle import Ledger
from worker.queue.parsing import letter_of
from worker.schema_version import migrate

TOKENTRAIL = (sys.executable, "-m", "worker.cli")
INTERRUPTED = "tokentrail: Interrupted: "

WAITING = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.fixture(autouse=True)
def let_ctrl_c_through():
    """Whoever runs the tests in the background has SIGINT ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def running(environment, *command):
    """The command; killed in the end if it has not ended by then."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ctrl_c(process):
    """Exit code, standard output and standard error."""
    assert process.poll() is None, "it is at something"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


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
def test_what_waits_for_a_server_that_says_nothing_ends_without_a_word(command):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(60)
        port = mute.getsockname()[1]
        servers = {"DATABASE_URL": f"postgresql://u@127.0.0.1:{port}/d", "BROKER_URL": f"redis://127.0.0.1:{port}/0"}
        with running(servers, *TOKENTRAIL, *command) as process:
            connection, _ = mute.accept()
            with connection:
                assert connection.recv(1), "it has asked"
                assert ctrl_c(process) == (130, "", "")


def test_publish_says_how_much_of_a_file_was_published_and_that_all_of_it_may_be_again(tmp_path):
    """On a broker of its own: others' writes would wait too."""
    file = tmp_path / "events"
    file.write_text("".join(f"{event_json(accrual('ann', 1, f'k-{n}'))}\n" for n in range(1_500)))
    command = (*TOKENTRAIL, "publish", str(file))
    again = "publishing the whole file again is safe, for each counts once."
    with Broker(tmp_path / "broker") as given, given.client as broker:
        broker.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
        with running({"BROKER_URL": given.url}, *command) as process:
            eventually(lambda: int(broker.info("clients")["blocked_clients"]) > 0, 60)
            said = ctrl_c(process)
        assert said == (130, "", f"{INTERRUPTED}at least 0 of 1,500 events were published; {again}\n")
        broker.execute_command("CLIENT", "UNPAUSE")
        with running({"BROKER_URL": given.url}, *command) as process:
            assert process.communicate(timeout=60) == ("Published 1,500 events to the queue tokens.\n", "")


def test_migrate_goes_on_where_it_was_interrupted(empty_database_url):
    migrate(empty_database_url, "0001")
    servers = {"DATABASE_URL": empty_database_url}
    with (
        psycopg.connect(empty_database_url, autocommit=True) as watcher,
        psycopg.connect(empty_database_url) as reader,
    ):
        reader.execute("SELECT FROM burned_credit")
        with running(servers, *TOKENTRAIL, "migrate") as process:
            eventually(lambda: watcher.execute(WAITING).fetchall() or process.poll() is not None, 60)
            said = ctrl_c(process)
    goes_on = "`tokentrail migrate` goes on from where this one came to, and workers run on meanwhile."
    assert said == (130, "", f"{INTERRUPTED}{goes_on}\n")
    with running(servers, *TOKENTRAIL, "migrate") as process:
        assert process.communicate(timeout=60) == ("Migrated the schema from 0001 to 0002.\n", "")


def test_migrate_says_in_a_sentence_that_its_session_was_ended(empty_database_url):
    migrate(empty_database_url, "0001")
    with (
        psycopg.connect(empty_database_url, autocommit=True) as watcher,
        psycopg.connect(empty_database_url) as reader,
    ):
        reader.execute("SELECT FROM burned_credit")
        with running({"DATABASE_URL": empty_database_url}, *TOKENTRAIL, "migrate") as process:
            end = WAITING.replace("SELECT", "SELECT pg_terminate_backend(pid)")
            eventually(lambda: watcher.execute(end).fetchall() or process.poll() is not None, 60)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("tokentrail: PostgreSQL said no (terminating connection due to administrator command")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "says", "done"),
    [
        (("replay", "--since", "1d"), "replaying again is safe, for each event counts once.", "Published 3 events"),
        (("purge", "--older-than", "0s"), "bodies removed by now are gone; purge again for the rest.", "Purged"),
    ],
    ids=["replay", "purge"],
)
def test_dead_letters_say_that_the_same_may_be_done_again(database_url, broker_url, command, says, done):
    events = [accrual("ann", 1, str(n)) for n in range(3)]
    letters = [
        letter_of(json.loads(event_json(event)), "revoked", "It was revoked.", Origin(ACCRUE, event.idempotency_key))
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
        with running(servers, *TOKENTRAIL, "dead-letters", *command) as process:
            eventually(lambda: watcher.execute(WAITING).fetchall() or process.poll() is not None, 60)
            assert ctrl_c(process) == (130, "", f"{INTERRUPTED}{says}\n")
    with running(servers, *TOKENTRAIL, "dead-letters", *command) as process:
        out, err = process.communicate(timeout=60)
    assert (out[: len(done)], err, process.returncode) == (done, "", 0)


@pytest.mark.parametrize(
    "program", [(*TOKENTRAIL, "worker"), (sys.executable, "-m", *CELERY)], ids=["ours", "celery's"]
)
def test_ctrl_c_is_how_a_worker_ends(database_url, broker_url, program):
    with running({"DATABASE_URL": database_url, "BROKER_URL": broker_url}, *program) as process:
        for line in process.stderr:
            if " ready." in line:
                break
        code, out, err = ctrl_c(process)
    assert (code, err) == (1, ""), "as every worker of Celery's"
    assert "Warm shutdown" in out


def test_ctrl_c_ends_a_demo(database_url, broker_url):
    """Which waits for outcomes, and no worker is there to give any."""
    with (
        connect(broker_url) as broker,
        running({"DATABASE_URL": database_url, "BROKER_URL": broker_url}, *TOKENTRAIL, "demo") as process,
    ):
        eventually(lambda: broker.llen("tokens") > 0 or process.poll() is not None, 60)
        code, _, err = ctrl_c(process)
    assert code == 130
    assert "Traceback" not in err


def met_by_ctrl_c(statement, connection):
    """Psycopg's own steps towards an answer; Ctrl-C comes in the midst of one, once the server keeps us waiting."""
    try:
        awaited = next(statement)
        while True:
            sent = connection.pgconn.transaction_status == TransactionStatus.ACTIVE and awaited == Wait.R
            if sent and not select.select([connection.fileno()], [], [], 0.5)[0]:
                raise KeyboardInterrupt
            awaited = statement.send((yield awaited))
    except StopIteration as end:
        return end.value


def test_ctrl_c_within_psycopg_itself_leaves_nothing_to_say(database_url, monkeypatch, caplog):
    """A few of a thousand do: too few to wait for, so this one is made to."""
    wait = psycopg.Connection.wait
    with (
        psycopg.connect(database_url) as stranger,
        connect_database(database_url, Settings(DATABASE_URL=database_url)) as connection,
    ):
        stranger.execute("LOCK TABLE account")
        monkeypatch.setattr(
            psycopg.Connection, "wait", lambda self, steps, *rest: wait(self, met_by_ctrl_c(steps, self), *rest)
        )
        with pytest.raises(KeyboardInterrupt), connection.transaction():
            connection.execute("SELECT FROM account")
        monkeypatch.undo()
        assert connection.closed
    assert caplog.messages == []
