"""Every message that a person can meet when something is not as it should be: tried for real, one sentence each.

A sentence says what is the case and what to do. The table is the specification: situation, command, exit code, words.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from schema.broker import connect
from schema.events import Accrual
from schema.publisher import Publisher
from schema.urls import UNREADABLE, mask_secrets
from tests.kit.cli import Result, assert_one_line
from tests.kit.proxy import OldPostgreSQL, OldRedis
from tests.kit.servers import Broker, free_port
from tests.kit.wait import eventually
from worker import config
from worker.config import ROOT
from worker.local.embedded import PostgresServer, discard

PUBLISH = ("publish", "--type", "accrual", "--user", "alice", "--amount", "1", "--source", "shop", "--key", "k")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DATABASE_URL", "mysql://u:hush@h/d", "DATABASE_URL is not usable: must start with postgresql://"),
        ("BROKER_URL", "http://:hush@h", "BROKER_URL is not usable: must start with redis://"),
        (
            "TOKENTRAIL_BATCH_SIZE",
            "0",
            "TOKENTRAIL_BATCH_SIZE is not usable: Input should be greater than or equal to 1",
        ),
        (
            "TOKENTRAIL_ALLOWED_HOSTS",
            "api, https://ledger.example",
            "must be names separated by commas, without port or *, and 'https://ledger.example' is none",
        ),
        ("TOKENTRAIL_TRANSPORT", "magic", "TOKENTRAIL_TRANSPORT is not usable: Input should be 'atomic' or 'stock'"),
        (
            "TOKENTRAIL_LOG_LEVEL",
            "loud",
            "TOKENTRAIL_LOG_LEVEL is not usable: Input should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'",
        ),
        (
            "TOKENTRAIL_LOG_FORMAT",
            "xml",
            "TOKENTRAIL_LOG_FORMAT is not usable: Input should be 'auto', 'json' or 'console'",
        ),
    ],
)
def test_setting_that_is_wrong(tokentrail, servers, variable, value, words):
    given = {"DATABASE_URL": servers.database_url, "BROKER_URL": servers.broker_url}
    assert_one_line(tokentrail("api", **given | {variable: value}), 2, words)


@pytest.mark.parametrize("limits", [("2.0", "2"), ("2.0", "1"), ("30", "")])
@pytest.mark.parametrize("command", [("worker",), ("settings",)])
def test_lock_timeout_that_never_comes_to_pass(tokentrail, servers, command, limits):
    given = {"DATABASE_URL": servers.database_url, "BROKER_URL": servers.broker_url}
    named = dict(zip(("TOKENTRAIL_LOCK_TIMEOUT", "TOKENTRAIL_STATEMENT_TIMEOUT"), limits, strict=True))
    lock, statement = (float(limit or 30) for limit in limits)
    assert_one_line(
        tokentrail(*command, **given, **named),
        2,
        "TOKENTRAIL_LOCK_TIMEOUT is not usable: must be less than TOKENTRAIL_STATEMENT_TIMEOUT, which is"
        f" {statement} (it is {lock}).",
    )


@pytest.mark.parametrize("command", [("supply",), ("migrate",), ("worker",), ("settings",)])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hu%zzsh@127.0.0.1:1/d",
        "postgresql://u:hu sh@127.0.0.1:1/d",
        "postgresql://u:p@hush@127.0.0.1:1/d",
        "postgresql://u:hu/sh@127.0.0.1:1/d",
        "postgresql://u:12/hush@127.0.0.1:1/d",
        "postgresql://u:hush@127.0.0.1:port/d",
        "postgresql://u:hush@127.0.0.1:1/d?hush=1",
        "postgresql://u:hu\nsh@127.0.0.1:1/d",
        "postgresql://localhost:1/2#hush@127.0.0.1:1/d",
    ],
)
def test_database_url_that_cannot_be_read(tokentrail, broker_url, command, url):
    """Whatever of it the parsers take for host, port or option may be the password's."""
    said = tokentrail(*command, DATABASE_URL=url, BROKER_URL=broker_url)
    assert said == (2, "", f"tokentrail: DATABASE_URL is not usable: {UNREADABLE}.\n")


@pytest.mark.parametrize("command", [PUBLISH, ("worker",), ("settings",)])
@pytest.mark.parametrize(
    "url",
    [
        "redis://:hu;sh@127.0.0.1:1/0",
        "redis://:12;hush@127.0.0.1:1/0",
        "redis://:hu/sh@127.0.0.1:1/0",
        "redis://:12/hush@127.0.0.1:1/0",
        "redis://:hu?sh@127.0.0.1:1/0",
        "redis://:12?hush@127.0.0.1:1/0",
        "redis://:12#hush@127.0.0.1:1/0",
        "redis://:hush@127.0.0.1:port/0",
        "redis://:hu\nsh@127.0.0.1:1/0",
        "redis://:12?hush=1@127.0.0.1:1/0",
        "redis://:hush@127.0.0.1:1/zero",
    ],
)
def test_broker_url_that_cannot_be_read(tokentrail, database_url, command, url):
    said = tokentrail(*command, DATABASE_URL=database_url, BROKER_URL=url)
    assert said == (2, "", f"tokentrail: BROKER_URL is not usable: {UNREADABLE}.\n")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p%40%2F@h/d",
        "postgresql://u:p#?;[]:@h/d",
        "postgresql:///d?host=/run/postgresql",
        "postgresql:///d?host=%40abstract",
        "postgresql://u@[::1]:5432/d?sslmode=require",
        "postgres://u:p@h1:1,h2:2/d?target_session_attrs=primary&application_name=a@b",
        "postgresql://h",
        "postgresql://u:p@h/d\n",
    ],
)
def test_database_url_that_can_be_read(monkeypatch, url):
    monkeypatch.setenv("DATABASE_URL", url)
    assert config.load_settings().database() == url.strip()


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://h",
        "redis://:p%40%2F%3B@h:6379/15",
        "redis://u:p@ss@[::1]:6379",
        "rediss://u:p@h:1/0?ssl_cert_reqs=CERT_REQUIRED",
        "sentinel://a:1;sentinel://:p@b/0?master_name=x",
        "redis://h:1/0\n",
    ],
)
def test_broker_url_that_can_be_read(monkeypatch, url):
    monkeypatch.setenv("BROKER_URL", url)
    assert config.load_settings().broker() == url.strip()
    connect(url.strip()).close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:hush@h:1/d", "postgresql://me:***@h:1/d"),
        ("postgresql://me:h#u;s?h@h:1/d", "postgresql://me:***@h:1/d"),
        ("postgresql://me:12@h:1/d?sslpassword=hush", "postgresql://me:***@h:1/d?***"),
        ("redis://:hu@sh@h:1/0", "redis://:***@h:1/0"),
        ("sentinel://a:1;sentinel://:hush@b:2/0?master_name=x", "sentinel://a:1;sentinel://:***@b:2/0?master_name=x"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("postgresql://u:hu\nsh@h:1/d", "postgresql://u:***@h:1/d"),
    ],
)
def test_address_is_shown_without_its_password(url, shown):
    assert mask_secrets(url, "***") == shown


@pytest.mark.parametrize("command", [("supply",), ("worker",), ("migrate",), ("migrate", "status"), ("history", "a")])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"port": "closed"}, "Connection refused"),
        ({"password": "hush"}, "password authentication failed"),
        ({"database": "no_such"}, 'database "no_such" does not exist'),
        ({"host": "no-such-host.invalid"}, "no-such-host.invalid"),
    ],
    ids=["server away", "wrong password", "no such database", "no such host"],
)
def test_postgresql_that_cannot_be_used(tokentrail, servers, command, change, words):
    _, _, rest = servers.database_url.partition("://")
    credentials, _, place = rest.rpartition("@")
    address, _, database = place.partition("/")
    user, _, password = credentials.partition(":")
    host, _, port = address.partition(":")
    port = str(free_port()) if change.get("port") else port
    host, password = change.get("host", host), change.get("password", password)
    database = change.get("database", database)
    url = f"postgresql://{user}:{password}@{host}:{port}/{database}"
    assert_one_line(
        tokentrail(*command, DATABASE_URL=url, BROKER_URL=servers.broker_url),
        1,
        "PostgreSQL cannot be used (",
        words,
        "check that it runs, and that DATABASE_URL is right",
    )


@pytest.mark.parametrize("command", ["supply", "worker"])
def test_database_that_is_not_migrated(tokentrail, empty_database_url, broker_url, command):
    said = tokentrail(command, DATABASE_URL=empty_database_url, BROKER_URL=broker_url)
    assert_one_line(said, 1, "The database has no schema yet: run `tokentrail migrate`.")


def test_database_with_a_newer_schema_is_worked_with_and_a_stranger_is_not(tokentrail, database_url, broker_url):
    given = {"DATABASE_URL": database_url, "BROKER_URL": broker_url}
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    assert tokentrail("supply", **given)[0] == 0
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE transaction_record RENAME TO hidden")
    assert_one_line(
        tokentrail("worker", **given), 1, "names 9999, which is not a migration of tokentrail", "a database of its own"
    )


def test_up_leaves_a_newer_schema_as_it_is_and_refuses_a_strangers(database_url, broker_url, tmp_path):
    given = {
        "DATABASE_URL": database_url,
        "BROKER_URL": broker_url,
        "TOKENTRAIL_HOME": str(tmp_path),
        "TOKENTRAIL_API_HOST": "192.0.2.1",  # which no machine has, so that this ends once the schema is dealt with
    }
    with psycopg.connect(database_url, autocommit=True) as connection, (tmp_path / "said").open("w+") as output:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        said = ended("up", stdout=output, environment=given)
        assert_one_line(
            said, 1, "of 192.0.2.1: Cannot assign requested address. Choose an address that this machine has."
        )
        output.seek(0)
        assert "up | Left as it is: The schema is at 9999, newer than this code (0002); deploy" in output.read()
        connection.execute("ALTER TABLE transaction_record RENAME TO hidden")
    assert_one_line(ended("up", environment=given), 1, "names 9999, which is not a migration of tokentrail")


def test_demo_looks_at_the_servers_before_it_publishes(tokentrail, database_url, empty_database_url, broker_url):
    said = tokentrail("demo", DATABASE_URL=empty_database_url, BROKER_URL=broker_url)
    assert_one_line(said, 1, "The database has no schema yet: run `tokentrail migrate`.")
    with connect(broker_url) as broker:
        assert broker.dbsize() == 0
    said = tokentrail("demo", DATABASE_URL=database_url, BROKER_URL="sentinel://127.0.0.1:1/0")
    assert_one_line(said, 2, "BROKER_URL is not usable: a sentinel:// URL needs the master's name")


def test_statement_that_took_too_long(tokentrail, database_url):
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute("ALTER TABLE alembic_version RENAME TO hidden")
        owner.execute("CREATE VIEW alembic_version AS SELECT version_num FROM hidden, pg_sleep(60)")
    limits = {"TOKENTRAIL_LOCK_TIMEOUT": "0.05", "TOKENTRAIL_STATEMENT_TIMEOUT": "0.1"}
    said = tokentrail("supply", DATABASE_URL=database_url, **limits)
    assert_one_line(said, 1, "statement timeout): it took too long, so raise TOKENTRAIL_STATEMENT_TIMEOUT.")


def test_postgresql_that_has_no_connection_left(tokentrail, database_url):
    role = f"crowded_{secrets.token_hex(4)}"
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'hush' CONNECTION LIMIT 0")
        try:
            credentials = urlsplit(database_url).netloc.rpartition("@")[0]
            said = tokentrail("supply", DATABASE_URL=database_url.replace(credentials, f"{role}:hush", 1))
        finally:
            owner.execute(f"DROP ROLE {role}")
    assert_one_line(
        said, 1, f'too many connections for role "{role}"): raise its limit of connections, or end some of them.'
    )


@pytest.mark.parametrize("harm", ["RENAME TO hidden", "RENAME user_id TO hidden"])
def test_schema_that_lost_something(tokentrail, database_url, harm):
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute(f"ALTER TABLE transaction_record {harm}")
    said = tokentrail("receipt", "alice", "k", DATABASE_URL=database_url)
    assert_one_line(
        said, 1, "PostgreSQL said no (", "): the schema is not as `tokentrail migrate` left it, so bring back what"
    )


def test_postgresql_that_says_what_nobody_expects(tokentrail, database_url):
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not today'; END$$;"
            "CREATE TRIGGER refuse BEFORE UPDATE ON dead_letter FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
        )
    said = tokentrail("dead-letters", "discard", "1", "--reason", "tried", DATABASE_URL=database_url)
    words = "): its log has the statement and more, so mend what that names, and try again."
    assert_one_line(said, 1, "PostgreSQL said no (not today; CONTEXT: ", words)


@pytest.mark.parametrize("command", [("worker",), ("migrate",), ("migrate", "status"), ("demo",), ("supply",), ("up",)])
def test_postgresql_that_is_too_old(tokentrail, database_url, broker_url, command, tmp_path):
    with OldPostgreSQL(database_url) as old:
        given = {"DATABASE_URL": old.url, "BROKER_URL": broker_url, "TOKENTRAIL_HOME": str(tmp_path)}
        said = ended("up", environment=given) if command == ("up",) else tokentrail(*command, **given)
    assert_one_line(said, 1, "PostgreSQL 14 is too old: tokentrail needs 15 or newer.")


def test_worker_on_a_newer_schema_says_so_and_works(database_url, broker_url, tmp_path):
    log = tmp_path / "log"
    with psycopg.connect(database_url, autocommit=True) as connection, log.open("w") as output:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        given = {"DATABASE_URL": database_url, "BROKER_URL": broker_url}
        command = [sys.executable, "-m", "worker.cli", "worker"]
        worker = subprocess.Popen(command, env={**os.environ, **given}, stderr=output)
        try:
            with Publisher(broker_url) as publisher:
                publisher.publish(Accrual(user_id="ann", amount=1, idempotency_key="k", source="test"))
            eventually(lambda: connection.execute("SELECT balance FROM account").fetchall() == [(1,)])
        finally:
            worker.kill()
            worker.wait()
    assert log.read_text().startswith(
        "The schema is at 9999, newer than this code (0002); deploy the newer code soon.\n"
    )


def ended(*arguments, **options):
    """The command in a process of its own: exit code and standard error."""
    options = {"stdout": subprocess.DEVNULL, **options}
    environment = {**os.environ, **options.pop("environment", {})}
    environment.pop("PYTHONUNBUFFERED", None)  # else nothing is left to be written at the end
    process = subprocess.run(
        [sys.executable, "-m", "worker.cli", *arguments],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
        **options,
    )
    return Result(process.returncode, "", process.stderr)


def test_name_of_a_folder_that_is_too_long():
    said = ended("up", environment={"TOKENTRAIL_HOME": "/tmp/" + 300 * "x"})
    assert_one_line(
        said, 1, "Cannot use /tmp/xxx", "(File name too long): choose another place, TOKENTRAIL_HOME names it."
    )


def test_folder_that_cannot_be_used(tmp_path):
    file = tmp_path / "file"
    file.touch()
    said = ended("up", environment={"TOKENTRAIL_HOME": str(file)})
    assert_one_line(
        said, 1, f"Cannot use {file} (File exists): choose a place that is a folder, TOKENTRAIL_HOME names it."
    )


@contextlib.contextmanager
def as_an_ordinary_user():
    """Root may read everything, so for this long we are not."""
    us = os.geteuid()
    if us == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(us)


def test_addresses_that_are_another_users(tokentrail, servers, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HOME", tmp_path)
    file = tmp_path / "servers.json"
    file.write_text("{}")
    file.chmod(0)
    given = {"DATABASE_URL": servers.database_url, "BROKER_URL": servers.broker_url}
    with as_an_ordinary_user():
        assert_one_line(
            tokentrail("supply"),
            2,
            f"No database: {file} belongs to another user's `tokentrail up`; set DATABASE_URL, or start your own",
        )
        assert tokentrail("settings", **given)[::2] == (0, "")


def test_worker_uses_the_servers_of_the_folder_it_is_started_in(database_url, broker_url, tmp_path):
    """An empty TOKENTRAIL_HOME is none. Celery runs in our own folder, where .tokentrail would be another."""
    (tmp_path / ".tokentrail").mkdir()
    (tmp_path / ".tokentrail" / "servers.json").touch(0o600)
    addresses = {"database_url": database_url, "broker_url": broker_url, "pid": os.getpid()}
    (tmp_path / ".tokentrail" / "servers.json").write_text(json.dumps(addresses))
    worker = subprocess.Popen(
        [sys.executable, "-m", "worker.cli", "worker"],
        cwd=tmp_path,
        env={**os.environ, "TOKENTRAIL_HOME": "", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        with Publisher(broker_url) as publisher, psycopg.connect(database_url, autocommit=True) as connection:
            publisher.publish(Accrual(user_id="ann", amount=1, idempotency_key="k", source="test"))
            applied = lambda: connection.execute("SELECT balance FROM account").fetchall() == [(1,)]  # noqa: E731
            eventually(lambda: applied() or worker.poll() is not None)
            assert applied()
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize("command", [("settings",), ("settings", "--json"), ("migrate", "--sql")])
def test_output_that_cannot_be_written(command):
    with Path("/dev/full").open("w") as full:
        said = ended(*command, stdout=full)
    assert_one_line(said, 1, "Cannot write (No space left on device): free some space there, or choose another place.")


def test_output_that_cannot_say_every_character(database_url):
    latin = {"DATABASE_URL": database_url, "PYTHONIOENCODING": "latin-1"}
    process = {"environment": latin, "stdout": subprocess.DEVNULL}
    assert ended("history", "Σ", **process) == (0, "", "")
    assert_one_line(ended("publish", "Σ", **process), 2, r"Cannot read \u03a3: No such file")


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--user", ("list", "--user", "\udcff")),
        ("--by", ("replay", "--by", "\udcff", "1")),
        ("--by", ("discard", "1", "--reason", "tried", "--by", "\udcff")),
        ("--reason", ("discard", "1", "--reason", "\udcff")),
    ],
)
def test_text_that_is_not_utf_8(tokentrail, database_url, broker_url, option, arguments):
    said = tokentrail("dead-letters", *arguments, DATABASE_URL=database_url, BROKER_URL=broker_url)
    assert_one_line(said, 2, f"{option} must be UTF-8 without NUL characters.")


def test_output_that_is_closed():
    close = lambda: os.close(1)  # noqa: E731
    assert ended("settings", "--json", stdout=None, preexec_fn=close) == (0, "", "")
    said = ended("settings", stdout=None, preexec_fn=close, environment={"TOKENTRAIL_BATCH_SIZE": "0"})
    assert_one_line(said, 2, "TOKENTRAIL_BATCH_SIZE is not usable")


def test_output_that_nobody_reads_any_more():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert ended("migrate", "--sql", stdout=writing) == (1, "", "")
    finally:
        os.close(writing)


def test_revision_that_is_not_there(tokentrail, database_url):
    assert_one_line(tokentrail("migrate", "--from", "zzz", "--sql"), 2, "There is no revision zzz", "migrate status")
    assert_one_line(tokentrail("migrate", "--from", "0001", DATABASE_URL=database_url), 2, "--from is for --sql")


def test_database_that_may_not_be_written(tokentrail, database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    said = tokentrail("migrate", DATABASE_URL=database_url)
    assert_one_line(
        said, 1, "PostgreSQL said no (cannot execute ", ": it is a read-only standby, so name the primary in"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], None),
        (["--maxmemory-policy", "allkeys-lru"], "has maxmemory-policy allkeys-lru, so that it forgets queues"),
        (["--requirepass", "other"], "BROKER_URL is right"),
        (["--rename-command", "PING", ""], "unknown command"),
        (["--rename-command", "AUTH", ""], "unknown command 'AUTH'): check that it runs"),
    ],
    ids=["away", "evicts", "wrong password", "another kind of server", "knows no passwords"],
)
def test_redis_that_cannot_be_used(tokentrail, database_url, tmp_path, options, words):
    with contextlib.ExitStack() as stack:
        if words is None:
            port, words = free_port(), "Connection refused"
        else:
            port = stack.enter_context(_Broker(tmp_path, *options)).port
        url = (
            f"redis://:hush@127.0.0.1:{port}/0"
            if {"--requirepass", "AUTH"} & {*options}
            else f"redis://127.0.0.1:{port}/0"
        )
        said = tokentrail("worker", DATABASE_URL=database_url, BROKER_URL=url)
    assert_one_line(said, 1, f"Redis at 127.0.0.1:{port}/0 ", words)


class _Broker(Broker):
    """Also one that refuses us."""

    def _answers(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--maxmemory-policy", "volatile-lru", "--appendonly", "yes", "--appendfsync", "always"],
            "maxmemory-policy volatile-lru",
        ),
        (["--appendonly", "no"], "has appendonly no, so that a crash loses messages"),
        (["--appendonly", "yes", "--appendfsync", "everysec"], "has appendfsync everysec, so that the newest messages"),
        (["--rename-command", "INFO", ""], "does not say how it is set up"),
    ],
)
def test_redis_that_may_lose_messages_is_warned_of(database_url, tmp_path, options, words):
    """The worker goes on, so it is a process: it is stopped once it has said so."""
    with _Broker(tmp_path, *options) as broker:
        given = {"DATABASE_URL": database_url, "BROKER_URL": broker.url}
        worker = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "worker"],
            env={**os.environ, **given},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            line = worker.stderr.readline()
        finally:
            worker.kill()
            worker.wait()
            worker.stderr.close()
    assert line.startswith(f"Redis at 127.0.0.1:{broker.port}/0 ")
    assert words in line


TOO_OLD_REDIS = "which is too old: tokentrail needs Redis 7.0 or newer, or Valkey."


def test_redis_that_is_too_old(tokentrail, database_url, broker_url):
    with OldRedis(broker_url) as old:
        said = tokentrail("worker", DATABASE_URL=database_url, BROKER_URL=old.url)
    assert_one_line(said, 1, "Redis at ", " has version 6.", TOO_OLD_REDIS)


def test_redis_that_is_too_old_for_all_that_up_starts(database_url, broker_url, tmp_path):
    with OldRedis(broker_url) as old:
        given = {"DATABASE_URL": database_url, "BROKER_URL": old.url, "TOKENTRAIL_HOME": str(tmp_path)}
        said = ended("up", environment=given)
    assert_one_line(said, 1, "Redis at ", " has version 6.", TOO_OLD_REDIS)


def test_redis_that_is_full(tokentrail, tmp_path):
    with Broker(tmp_path, "--maxmemory", "1") as broker:
        said = tokentrail(*PUBLISH, BROKER_URL=broker.url)
    assert_one_line(
        said,
        1,
        f"Redis at 127.0.0.1:{broker.port}/0 refused the message (",
        "1 event not published.",
        "again with --key k: ",
    )


def test_port_that_is_taken(tokentrail, database_url):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = tokentrail("api", "--port", str(port), DATABASE_URL=database_url)
    assert_one_line(said, 1, f"Cannot listen on port {port} of 127.0.0.1: Address already in use")


@pytest.mark.parametrize(
    ("variables", "options", "code", "words"),
    [
        ({"BROKER_URL": "", "FLOWER_PORT": "x"}, (), 2, "No broker: set BROKER_URL, or start the embedded servers"),
        ({"FLOWER_PORT": "x"}, (), 2, "FLOWER_PORT is not usable: must be 1 to 65535 (it is 'x')."),
        ({"FLOWER_PERSISTENT": "x"}, (), 2, "Flower cannot use one of its FLOWER_ variables (invalid truth value 'x')"),
        ({}, ("--max-tasks=x",), 2, "Flower cannot use its options (invalid literal for int() with base 10: 'x'): see"),
        ({}, ("--max",), 2, "--max is no option of Flower: see `tokentrail flower -- --help`."),
        ({}, ("--port=1",), 2, "--port=1 after the --: use --host and --port before it."),
        ({"FLOWER_ADDRESS": "192.0.2.1"}, (), 1, "Cannot listen on port 5555 of 192.0.2.1: "),
    ],
)
def test_flower_that_cannot_start(tmp_path, variables, options, code, words):
    environment = {"BROKER_URL": "redis://127.0.0.1:1/0", "TOKENTRAIL_HOME": str(tmp_path)} | variables
    assert_one_line(ended("flower", "--", *options, environment=environment), code, words)


@pytest.mark.parametrize("command", ["flower", "status", "worker"])
def test_celery_itself_without_a_broker(tmp_path, command):
    """What Celery shows of anything else that goes wrong is a traceback."""
    process = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker.app", command],
        cwd=ROOT,
        env={**os.environ, "BROKER_URL": "", "TOKENTRAIL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert_one_line(
        Result(process.returncode, process.stdout, process.stderr),
        2,
        "No broker: set BROKER_URL, or start the embedded servers with",
    )


@pytest.fixture
def tiny_disk():
    """A file system of 60 MB."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("needs root on Linux, to mount a small file system")
    with tempfile.TemporaryDirectory(prefix="tokentrail-tiny-") as folder:
        Path(folder).chmod(0o755)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder], check=False, capture_output=True
        )
        if mounted.returncode:
            pytest.skip("a file system cannot be mounted here")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder, but=0):
    """Leave so many bytes of its file system."""
    with contextlib.suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
        while shutil.disk_usage(folder).free > but:
            file.write(bytes(min(shutil.disk_usage(folder).free - but, 1 << 16)))


def test_disk_that_is_full_for_postgresql_in_use(tokentrail, tiny_disk):
    server = PostgresServer(tiny_disk / "data", options={"max_wal_size": "32MB", "wal_keep_size": "0"}, durable=False)
    server.start()
    try:
        fill(tiny_disk)
        said = tokentrail("migrate", DATABASE_URL=server.url)
        assert_one_line(said, 1, "PostgreSQL ", "No space left on device", "): free some space on its disk.")
    finally:
        server.kill()
        discard(tiny_disk / "data")


def test_machine_that_has_no_more_to_give(tmp_path, monkeypatch):
    """Its first child cannot be started; a later one that cannot is tried again."""
    for name in ("DATABASE_URL", "BROKER_URL"):
        monkeypatch.delenv(name, raising=False)

    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))

    said = ended("up", preexec_fn=few_files, environment={"TOKENTRAIL_HOME": str(tmp_path / "home")})
    assert said == (1, "", "tokentrail: The machine gives us no more open files: raise the limit (ulimit -n).\n")
