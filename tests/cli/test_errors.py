"""Whatever is wrong outside the program ends a command with one line: what is the case, and what to do.

The tests hold the exit code, that it is one line without a traceback or a password, and the noun that it names.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from schema.broker import connect
from schema.publisher import Publisher
from tests.kit.cli import assert_one_line, run, started
from tests.kit.events import accrual
from tests.kit.proxy import OldPostgreSQL, OldRedis
from tests.kit.servers import Broker, free_port
from tests.kit.wait import eventually
from worker import config
from worker.cli.failures import explain
from worker.config import ROOT
from worker.readiness import check_broker

PUBLISH = ("publish", "--type", "accrual", "--user", "ann", "--amount", "1", "--source", "shop", "--key", "order-1")


# Settings


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE_URL", "mysql://u:hush@h/d"),
        ("DATABASE_URL", "postgresql://u:hu/sh@127.0.0.1:1/d"),
        ("BROKER_URL", "http://:hush@h"),
        ("BROKER_URL", "redis://:hu?sh@127.0.0.1:1/0"),
        ("TOKENTRAIL_BATCH_SIZE", "many"),
        ("TOKENTRAIL_TRANSPORT", "magic"),
        ("TOKENTRAIL_LOCK_TIMEOUT", "30"),
        ("TOKENTRAIL_ALLOWED_HOSTS", "api, https://ledger.example"),
    ],
)
@pytest.mark.parametrize("command", [("settings",), ("worker",), PUBLISH], ids=lambda command: command[0])
def test_wrong_setting(tokentrail, own_servers, command, variable, value):
    assert_one_line(tokentrail(*command, **{variable: value}), 2, variable)


@pytest.mark.parametrize("command", [PUBLISH, ("history", "ann"), ("supply",), ("worker",), ("api",), ("migrate",)])
def test_no_servers(tokentrail, command):
    assert_one_line(tokentrail(*command), 2, "tokentrail up")


@pytest.mark.parametrize("command", ["flower", "worker"])
def test_celery_itself_without_a_broker(tmp_path, command):
    """Celery prints a traceback of any other error."""
    celery = (sys.executable, "-m", "celery", "-A", "worker.app")
    assert_one_line(run(command, program=celery, BROKER_URL="", TOKENTRAIL_HOME=str(tmp_path)), 2, "BROKER_URL")


@contextlib.contextmanager
def as_an_ordinary_user():
    """Root may read every file."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(uid)


def test_servers_of_another_user(tokentrail, own_servers, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HOME", tmp_path)
    file = tmp_path / "servers.json"
    file.write_text("{}")
    file.chmod(0)
    with as_an_ordinary_user():
        assert tokentrail("settings").code == 0
        assert_one_line(tokentrail("supply", DATABASE_URL=None), 2, str(file), "another user", "DATABASE_URL")


def test_worker_uses_the_servers_of_the_folder_it_is_started_in(database_url, broker_url, tmp_path):
    """An empty TOKENTRAIL_HOME counts as not set. Celery runs in ROOT, where .tokentrail is another folder."""
    (tmp_path / ".tokentrail").mkdir()
    urls = {"database_url": database_url, "broker_url": broker_url, "pid": os.getpid()}
    servers = tmp_path / ".tokentrail" / "servers.json"
    servers.touch(0o600)
    servers.write_text(json.dumps(urls))
    with (
        started("worker", cwd=tmp_path, output=subprocess.DEVNULL, TOKENTRAIL_HOME="", PYTHONPATH=str(ROOT)),
        Publisher(broker_url) as publisher,
        psycopg.connect(database_url, autocommit=True) as connection,
    ):
        publisher.publish(accrual("ann", 1, "k"))
        eventually(lambda: connection.execute("SELECT balance FROM account").fetchall() == [(1,)])


# PostgreSQL


def with_parts(url, *, host=None, port=None, password=None, database=None):
    parts = urlsplit(url)
    location = f"{parts.username}:{password or parts.password}@{host or parts.hostname}:{port or parts.port}"
    return f"postgresql://{location}/{database or parts.path[1:]}"


@pytest.mark.parametrize(
    ("change", "noun"),
    [
        ({"port": "closed"}, "refused"),
        ({"password": "hush"}, "password"),
        ({"database": "no_such"}, "no_such"),
        ({"host": "no-such-host.invalid"}, "no-such-host.invalid"),
    ],
)
@pytest.mark.parametrize("command", [("supply",), ("worker",), ("migrate",), ("dead-letters", "list")])
def test_postgresql_that_cannot_be_used(tokentrail, own_servers, command, change, noun):
    change = {name: free_port() if value == "closed" else value for name, value in change.items()}
    assert_one_line(tokentrail(*command, DATABASE_URL=with_parts(own_servers, **change)), 1, noun, "DATABASE_URL")


def test_postgresql_without_a_free_connection(tokentrail, database_url):
    role = f"crowded_{secrets.token_hex(4)}"
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'hush' CONNECTION LIMIT 0")
        try:
            credentials = urlsplit(database_url).netloc.rpartition("@")[0]
            result = tokentrail("supply", DATABASE_URL=database_url.replace(credentials, f"{role}:hush", 1))
        finally:
            owner.execute(f"DROP ROLE {role}")
    assert_one_line(result, 1, "too many connections")


@pytest.mark.parametrize("command", [("worker",), ("migrate",), ("migrate", "status"), ("demo",), ("supply",)])
def test_postgresql_that_is_too_old(tokentrail, own_servers, command):
    with OldPostgreSQL(own_servers) as old:
        assert_one_line(tokentrail(*command, DATABASE_URL=old.url), 1, "PostgreSQL 14", "15 or newer")


@pytest.mark.parametrize("command", [("supply",), ("worker",), ("demo",), ("dead-letters", "list")])
def test_database_without_a_schema(tokentrail, empty_database_url, broker_url, command):
    result = tokentrail(*command, DATABASE_URL=empty_database_url, BROKER_URL=broker_url)
    assert_one_line(result, 1, "tokentrail migrate")
    with connect(broker_url) as broker:
        assert broker.dbsize() == 0, "the demo publishes nothing"


def test_newer_schema_is_used_and_that_of_other_software_is_not(tokentrail, own_servers):
    with psycopg.connect(own_servers, autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        assert tokentrail("supply").code == 0
        assert tokentrail("dead-letters", "list").code == 0
        connection.execute("ALTER TABLE transaction_record RENAME TO hidden")
    assert_one_line(tokentrail("worker"), 1, "9999", "a database of its own")


def test_worker_warns_of_a_newer_schema_and_works(own_servers, broker_url, tmp_path):
    log = tmp_path / "log"
    with psycopg.connect(own_servers, autocommit=True) as connection, log.open("w") as output:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        with started("worker", output=output), Publisher(broker_url) as publisher:
            publisher.publish(accrual("ann", 1, "k"))
            eventually(lambda: connection.execute("SELECT balance FROM account").fetchall() == [(1,)])
    assert "9999" in log.read_text().splitlines()[0]


@pytest.mark.parametrize("damage", ["RENAME TO hidden", "RENAME user_id TO hidden"])
def test_schema_that_lost_something(tokentrail, database_url, damage):
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute(f"ALTER TABLE transaction_record {damage}")
    assert_one_line(tokentrail("receipt", "ann", "k", DATABASE_URL=database_url), 1, "tokentrail migrate")


def test_statement_that_takes_too_long(tokentrail, database_url):
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute("ALTER TABLE global_token_balance RENAME TO hidden")
        owner.execute("CREATE VIEW global_token_balance AS SELECT hidden.* FROM hidden, pg_sleep(60)")
    limits = {"TOKENTRAIL_LOCK_TIMEOUT": "0.05", "TOKENTRAIL_STATEMENT_TIMEOUT": "0.1"}
    assert_one_line(tokentrail("supply", DATABASE_URL=database_url, **limits), 1, "TOKENTRAIL_STATEMENT_TIMEOUT")


def test_database_that_is_read_only(tokentrail, database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET default_transaction_read_only = on")
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    assert_one_line(tokentrail("migrate", DATABASE_URL=database_url), 1, "standby", "DATABASE_URL")


def test_statement_that_is_refused_for_another_reason(tokentrail, database_url):
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not today'; END$$;"
            "CREATE TRIGGER refuse BEFORE UPDATE ON dead_letter FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
        )
    result = tokentrail("dead-letters", "discard", "1", "--reason", "tried", DATABASE_URL=database_url)
    assert_one_line(result, 1, "not today", "log")


def test_pooler_in_transaction_mode(database_url):
    """There a statement that was prepared on another connection does not exist."""
    with psycopg.connect(database_url) as connection, pytest.raises(psycopg.Error) as raised:
        connection.execute("EXECUTE prepared_elsewhere")
    sentence, code = explain(raised.value)
    assert (code, "session mode" in sentence) == (1, True)


# Redis


class AnyBroker(Broker):
    """Also one that refuses our commands."""

    def _answers(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@pytest.mark.parametrize(
    ("options", "noun"),
    [
        (["--maxmemory-policy", "allkeys-lru"], "maxmemory-policy"),
        (["--requirepass", "other"], "BROKER_URL"),
        (["--rename-command", "PING", ""], "PING"),
        (["--rename-command", "AUTH", ""], "AUTH"),
    ],
)
def test_redis_that_cannot_be_used(tokentrail, database_url, tmp_path, options, noun):
    with AnyBroker(tmp_path, *options) as broker:
        password = ":hush@" if {"--requirepass", "AUTH"} & {*options} else ""
        url = f"redis://{password}127.0.0.1:{broker.port}/0"
        result = tokentrail("worker", DATABASE_URL=database_url, BROKER_URL=url)
    assert_one_line(result, 1, f"Redis at 127.0.0.1:{broker.port}/0", noun)


def test_redis_that_is_unreachable(tokentrail, database_url):
    port = free_port()
    given = {"DATABASE_URL": database_url, "BROKER_URL": f"redis://:hush@127.0.0.1:{port}/0"}
    assert_one_line(tokentrail("worker", **given), 1, f"127.0.0.1:{port}", "BROKER_URL")
    assert_one_line(tokentrail(*PUBLISH, **given), 1, f"127.0.0.1:{port}", "not published", "--key order-1")


def test_redis_that_is_too_old(tokentrail, database_url, broker_url):
    with OldRedis(broker_url) as old:
        result = tokentrail("worker", DATABASE_URL=database_url, BROKER_URL=old.url)
    assert_one_line(result, 1, "version 6.", "7.0 or newer")


def test_redis_that_is_full(tokentrail, tmp_path):
    with Broker(tmp_path, "--maxmemory", "1") as broker:
        result = tokentrail(*PUBLISH, BROKER_URL=broker.url)
    assert_one_line(result, 1, f"127.0.0.1:{broker.port}", "not published", "--key order-1")


@pytest.mark.parametrize(
    ("options", "noun"),
    [
        (["--maxmemory-policy", "volatile-lru", "--appendonly", "yes", "--appendfsync", "always"], "maxmemory-policy"),
        (["--appendonly", "no"], "appendonly"),
        (["--appendonly", "yes", "--appendfsync", "everysec"], "appendfsync"),
        (["--rename-command", "INFO", ""], "settings"),
        (["--appendonly", "yes", "--appendfsync", "always"], None),
    ],
)
def test_warning_of_a_redis_that_may_lose_messages(tmp_path, options, noun):
    with AnyBroker(tmp_path, *options) as broker:
        warnings = check_broker(broker.url)
    assert [noun in warning for warning in warnings] == ([] if noun is None else [True])


# up, flower and api


@pytest.mark.parametrize("home", ["file", "x" * 300])
def test_up_in_a_folder_that_cannot_be_used(tmp_path, home):
    (tmp_path / "file").touch()
    assert_one_line(run("up", TOKENTRAIL_HOME=str(tmp_path / home)), 1, str(tmp_path / home), "TOKENTRAIL_HOME")


def test_up_with_servers_that_are_too_old(database_url, broker_url, tmp_path):
    with OldPostgreSQL(database_url) as old:
        result = run("up", DATABASE_URL=old.url, BROKER_URL=broker_url, TOKENTRAIL_HOME=str(tmp_path))
    assert_one_line(result, 1, "PostgreSQL 14")
    with OldRedis(broker_url) as old:
        result = run("up", DATABASE_URL=database_url, BROKER_URL=old.url, TOKENTRAIL_HOME=str(tmp_path))
    assert_one_line(result, 1, "version 6.")


def test_up_leaves_a_newer_schema_as_it_is_and_refuses_that_of_other_software(own_servers, tmp_path):
    given = {"TOKENTRAIL_HOME": str(tmp_path), "TOKENTRAIL_API_HOST": "192.0.2.1"}  # no machine has this address
    with psycopg.connect(own_servers, autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        result = run("up", **given)
        assert_one_line(result, 1, "192.0.2.1")
        assert "9999" in result.out
        connection.execute("ALTER TABLE transaction_record RENAME TO hidden")
    assert_one_line(run("up", **given), 1, "9999", "a database of its own")


def test_api_on_a_port_that_is_taken(tokentrail, database_url):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(tokentrail("api", "--port", str(port), DATABASE_URL=database_url), 1, f"port {port}")


@pytest.mark.parametrize(
    ("variables", "options", "code", "noun"),
    [
        ({"BROKER_URL": ""}, (), 2, "BROKER_URL"),
        ({"FLOWER_PORT": "x"}, (), 2, "FLOWER_PORT"),
        ({"FLOWER_PERSISTENT": "x"}, (), 2, "FLOWER_"),
        ({}, ("--max-tasks=x",), 2, "flower -- --help"),
        ({}, ("--max",), 2, "--max"),
        ({}, ("--port=1",), 2, "--port"),
        ({"FLOWER_ADDRESS": "192.0.2.1"}, (), 1, "192.0.2.1"),
    ],
)
def test_flower_that_cannot_start(tmp_path, variables, options, code, noun):
    environment = {"BROKER_URL": "redis://127.0.0.1:1/0", "TOKENTRAIL_HOME": str(tmp_path)} | variables
    assert_one_line(run("flower", "--", *options, **environment), code, noun)


# Input and output


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--user", ("list", "--user", "\udcff")),
        ("--by", ("discard", "1", "--reason", "tried", "--by", "\udcff")),
        ("--reason", ("discard", "1", "--reason", "\udcff")),
    ],
)
def test_argument_that_is_not_utf_8(tokentrail, own_servers, option, arguments):
    assert_one_line(tokentrail("dead-letters", *arguments), 2, option, "UTF-8")


def test_revision_that_does_not_exist(tokentrail, database_url):
    assert_one_line(tokentrail("migrate", "--from", "zzz", "--sql"), 2, "zzz", "migrate status")
    assert_one_line(tokentrail("migrate", "--from", "0001", DATABASE_URL=database_url), 2, "--from")


def tokentrail_with_output(*arguments, stdout, **options):
    """Exit code and standard error."""
    environment = {**os.environ, **options.pop("environment", {})}
    environment.pop("PYTHONUNBUFFERED", None)  # else nothing is left to be written at the end
    process = subprocess.run(
        [sys.executable, "-m", "worker.cli", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
        **options,
    )
    return process.returncode, process.stderr


@pytest.mark.parametrize("command", [("settings",), ("settings", "--json"), ("migrate", "--sql")])
def test_output_to_a_full_disk(command):
    with Path("/dev/full").open("w") as full:
        code, error = tokentrail_with_output(*command, stdout=full)
    assert (code, error.count("\n")) == (1, 1)
    assert "No space left on device" in error


def test_output_that_lacks_a_character(database_url):
    latin = {"DATABASE_URL": database_url, "PYTHONIOENCODING": "latin-1"}
    assert tokentrail_with_output("history", "Σ", stdout=subprocess.DEVNULL, environment=latin) == (0, "")
    code, error = tokentrail_with_output("publish", "Σ", stdout=subprocess.DEVNULL, environment=latin)
    assert (code, r"\u03a3" in error) == (2, True)


def test_output_that_is_closed():
    close = lambda: os.close(1)  # noqa: E731
    assert tokentrail_with_output("settings", "--json", stdout=None, preexec_fn=close) == (0, "")


def test_output_to_a_pipe_that_is_closed_ends_silently():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert tokentrail_with_output("migrate", "--sql", stdout=writing) == (1, "")
    finally:
        os.close(writing)
