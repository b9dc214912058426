"""The embedded servers: they start, keep what they acknowledged, and leave nothing running, whatever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from tests.kit.servers import Broker
from tests.kit.wait import eventually
from worker import config
from worker.config import ROOT
from worker.local import embedded
from worker.local.embedded import EmbeddedError, PostgresServer, ValkeyServer, process

#: A program that runs servers and waits to be killed.
PROGRAM = """
import json, sys, time
from pathlib import Path
from worker.local import embedded

with embedded.servers(Path(sys.argv[1]) if len(sys.argv) > 1 else None, durable=False) as running:
    print(json.dumps([running.pids, str(running.logs)]), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def start_program():
    """Starts PROGRAM; returns its process, all processes of its servers, and the folder of their logs."""
    with contextlib.ExitStack() as stack:

        def start(*arguments):
            program = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            stack.enter_context(program)
            stack.callback(program.kill)
            pids, logs = json.loads(program.stdout.readline())
            if not arguments:
                stack.callback(embedded.discard, Path(logs).parent)  # program and guard may both be killed
            processes = [psutil.Process(pid) for pid in pids]
            return program, processes + processes[1].children(), Path(logs)

        yield start


def is_running(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # ended, but its parent has not read its exit code yet
    except psutil.NoSuchProcess:
        return False


def assert_all_end(processes):
    eventually(lambda: not any(map(is_running, processes)), f"all of {processes} end")


def log_named_in(error):
    return Path(str(error.value).rpartition("its log is ")[2].removesuffix("."))


def write(running):
    with psycopg.connect(running.database_url) as connection:
        connection.execute("CREATE TABLE kept (text text)")
        connection.execute("INSERT INTO kept VALUES ('a row')")
    with redis.Redis.from_url(running.broker_url) as client:
        client.lpush("kept", "a message")


def read(running):
    with psycopg.connect(running.database_url) as connection:
        row = connection.execute("SELECT text FROM kept").fetchone()
    with redis.Redis.from_url(running.broker_url) as client:
        return *row, *client.lrange("kept", 0, -1)


def setting(connection, name):
    return connection.execute("SELECT current_setting(%s)", [name]).fetchone()[0]


def test_throw_away_servers_answer_and_leave_nothing_behind():
    with embedded.servers() as running:
        write(running)
        assert read(running) == ("a row", b"a message")
        running.check()
        with psycopg.connect(running.database_url) as connection:
            assert connection.info.dbname == "tokentrail"
            assert setting(connection, "fsync") == "off"
        with embedded.servers() as other:  # two pairs do not disturb each other
            write(other)
        processes = [psutil.Process(pid) for pid in running.pids]

    assert_all_end(processes)
    assert not running.logs.parent.exists()


def test_servers_with_a_folder_keep_what_they_have_acknowledged(server_folder):
    with embedded.servers(server_folder) as running:
        write(running)
    with embedded.servers(server_folder) as running:
        assert read(running) == ("a row", b"a message")
        with psycopg.connect(running.database_url) as connection:
            assert setting(connection, "fsync") == setting(connection, "synchronous_commit") == "on"
            assert setting(connection, "max_connections") == "200"
            assert setting(connection, "shared_preload_libraries") == "pg_stat_statements"
            major = int(setting(connection, "server_version_num")) // 10_000
        with redis.Redis.from_url(running.broker_url) as client:
            assert client.config_get("appendonly", "appendfsync", "maxmemory-policy") == {
                "appendonly": "yes",
                "appendfsync": "always",
                "maxmemory-policy": "noeviction",
            }
    assert (server_folder / f"postgresql-{major}").is_dir() or (server_folder / "postgresql-elsewhere").is_symlink()


def test_servers_require_their_password_and_show_it_to_nobody():
    with embedded.servers() as running:
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(running.database_url.replace("tokentrail:", "tokentrail:not", 1))
        wrong_url = running.broker_url.replace("://:", "://:not", 1)
        with redis.Redis.from_url(wrong_url) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        password = running.logs.parent / "password"
        assert password.stat().st_mode & 0o077 == 0
        assert password.read_text() not in repr(running)
        for pid in running.pids:
            assert password.read_text() not in " ".join(psutil.Process(pid).cmdline())


def test_servers_get_nothing_of_our_environment(monkeypatch):
    """As root PostgreSQL runs as nobody, and every other process of nobody can read its environment."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hush@db.example/tokens")
    monkeypatch.setenv("SOMETHING", "hush")
    monkeypatch.setenv("TZ", "UTC")
    with embedded.servers() as running:
        postgres, valkey = (Path(f"/proc/{pid}/environ").read_bytes() for pid in running.pids[1:])
    assert b"hush" not in postgres + valkey  # Valkey overwrites its environment with its title
    variables = dict(entry.split(b"=", 1) for entry in postgres.split(b"\0") if entry)
    assert variables.keys() <= {b"PATH", b"LC_ALL", b"TZ", b"LD_LIBRARY_PATH"}
    assert (variables[b"LC_ALL"], variables[b"TZ"]) == (b"C", b"UTC")


def test_a_killed_program_leaves_no_server_and_no_folder(start_program):
    program, processes, logs = start_program()
    program.send_signal(signal.SIGKILL)
    assert_all_end(processes)
    assert not logs.parent.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a parent-death signal")
def test_a_guard_that_ends_leaves_no_server(start_program, number):
    _, processes, _ = start_program()
    processes[0].send_signal(number)
    assert_all_end(processes)


def test_servers_that_were_all_killed_start_again_with_their_data(server_folder):
    with embedded.servers(server_folder) as running:
        write(running)
        processes = [psutil.Process(pid) for pid in running.pids]
        processes += processes[1].children()
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended with the one before it
                each.kill()
        assert_all_end(processes[:1])
        with pytest.raises(EmbeddedError, match=r"guard .* its log is .*guard\.log\.$"):
            running.check()
    with embedded.servers(server_folder) as running:
        assert read(running) == ("a row", b"a message")


@pytest.mark.parametrize(
    ("victim", "number", "message", "in_log"),
    [
        (0, signal.SIGTERM, "The guard of the embedded servers has ended", ""),
        (1, signal.SIGINT, "PostgreSQL exited with code 0 .*is shut down", "received fast shutdown request"),
        (2, signal.SIGKILL, "Valkey was killed by SIGKILL", "Ready to accept connections"),
    ],
    ids=["guard", "PostgreSQL", "Valkey"],
)
def test_a_server_that_ends_is_reported_ends_the_other_and_its_log_is_kept(victim, number, message, in_log):
    def lose_one():
        with embedded.servers() as running:
            processes = [psutil.Process(pid) for pid in running.pids]
            processes[victim].send_signal(number)
            assert_all_end(processes)
            running.check()

    with pytest.raises(EmbeddedError, match=f"^{message}") as error:
        lose_one()
    log = log_named_in(error)
    assert in_log in log.read_text()
    assert [path.name for path in log.parent.parent.iterdir()] == ["logs"]
    embedded.discard(log.parent.parent)


def test_a_server_that_does_not_answer_in_time_is_stopped_and_reported(server_folder, monkeypatch):
    monkeypatch.setattr(process, "START_SECONDS", 0)
    monkeypatch.setenv("TOKENTRAIL_VALKEY_SERVER", str(server_folder / "valkey-server"))
    server_folder.mkdir(mode=0o755)
    (server_folder / "valkey-server").write_text("#!/bin/sh\necho Reading RDB file; exec sleep 600\n")
    (server_folder / "valkey-server").chmod(0o755)
    server = ValkeyServer(server_folder)
    server.launch()
    eventually(lambda: "Reading" in server.log.read_text())
    with pytest.raises(EmbeddedError, match=r"^Valkey did not answer within 0 s \(Reading RDB file\)"):
        server.wait_until_ready()
    assert not server.running


def test_a_server_stops_at_once_where_its_stop_signal_is_ignored(server_folder):
    """Under nohup or in the background of a script SIGINT is ignored, and a new process inherits that."""
    server = PostgresServer(server_folder, durable=False)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(3):
            server.launch()
            server.stop()
            assert server.child.process.returncode != -signal.SIGKILL, "it had to be killed"
    finally:
        signal.signal(signal.SIGINT, before)
        server.kill()


def test_a_folder_in_use_is_refused_until_its_user_is_killed(server_folder, start_program):
    program, *_ = start_program(str(server_folder))
    error = f"^{server_folder} is in use by process {program.pid}"
    with pytest.raises(EmbeddedError, match=error), embedded.servers(server_folder):
        pass
    program.kill()
    program.wait()
    with embedded.servers(server_folder) as running:
        write(running)


@pytest.mark.parametrize(
    ("variable", "server"), [("TOKENTRAIL_PG_BIN", "PostgreSQL"), ("TOKENTRAIL_VALKEY_SERVER", "Valkey")]
)
def test_a_server_that_does_not_start_is_reported_and_its_log_is_kept(server_folder, monkeypatch, variable, server):
    broken = "#!/bin/sh\ncase $1 in --version) echo 18.0;; *) echo it is broken >&2; exit 3;; esac\n"
    server_folder.mkdir(mode=0o755)
    for name in ("initdb", "postgres", "valkey-server"):
        (server_folder / name).write_text(broken)
        (server_folder / name).chmod(0o755)
    monkeypatch.setenv(variable, str(server_folder if server == "PostgreSQL" else server_folder / "valkey-server"))

    with pytest.raises(EmbeddedError, match=rf"^{server} .* \(it is broken\): ") as error, embedded.servers():
        pass

    log = log_named_in(error)
    assert "it is broken" in log.read_text()
    assert [path.name for path in log.parent.parent.iterdir()] == ["logs"]
    embedded.discard(log.parent.parent)


def test_where_there_is_no_wheel_the_error_names_the_settings(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match=r"TOKENTRAIL_PG_BIN .* TOKENTRAIL_VALKEY_SERVER .* DATABASE_URL"):
        embedded.binaries.postgres_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another account")
def test_root_without_an_account_nobody_is_refused(monkeypatch):
    monkeypatch.setattr("pwd.getpwnam", {}.__getitem__)
    with pytest.raises(EmbeddedError, match=r"nobody.* ordinary user"):
        embedded.unprivileged.account()


#: A file named as a server's program: its bytes, its mode, and the reason that the error gives.
NO_PROGRAMS = {
    "missing": (None, 0, "no such file"),
    "not executable": (b"#!/bin/sh\n", 0o644, "no executable file"),
    "no program": (bytes(range(256)), 0o755, "Exec format error"),
    "no library": (b"#!/bin/sh\nprintf 'no libx:\\n gone' >&2; exit 127\n", 0o755, "no libx: /  gone"),
    "fails": (b"#!/bin/sh\nexit 3\n", 0o755, "--version exits with code 3"),
}


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        *(("TOKENTRAIL_PG_BIN", name) for name in NO_PROGRAMS),
        *(("TOKENTRAIL_VALKEY_SERVER", name) for name in ("missing", "not executable", "no program")),
    ],
)
def test_a_program_that_cannot_run_is_refused_with_the_setting_that_names_it(monkeypatch, server_folder, setting, name):
    content, mode, reason = NO_PROGRAMS[name]
    of_valkey = setting == "TOKENTRAIL_VALKEY_SERVER"
    server_folder.mkdir(mode=0o755)
    monkeypatch.setenv(setting, str(server_folder / "valkey-server" if of_valkey else server_folder))
    for program in ("initdb", "postgres", "valkey-server") if content is not None else ():
        (server_folder / program).write_bytes(content)
        (server_folder / program).chmod(mode)
    temporary = server_folder / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(EmbeddedError) as error, embedded.servers():
        pass
    assert str(error.value).startswith(f"Cannot run {server_folder}/")
    assert f"({reason}): " in str(error.value)
    assert setting in str(error.value)
    if mode != 0o755:
        assert list(temporary.iterdir()) == [], "nothing was started"


def test_servers_of_the_distribution_serve_as_well(server_folder, monkeypatch, requires_program):
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    postgres = requires_program("postgres", os.pathsep.join(map(str, versions)))
    monkeypatch.setenv("TOKENTRAIL_PG_BIN", str(Path(postgres).parent))
    monkeypatch.setenv("TOKENTRAIL_VALKEY_SERVER", requires_program("redis-server"))
    with embedded.servers(server_folder) as running:
        write(running)
    with embedded.servers(server_folder) as running:
        assert read(running) == ("a row", b"a message")
        with psycopg.connect(running.database_url) as connection:
            assert setting(connection, "server_encoding") == "UTF8"


@pytest.mark.parametrize("kind", [PostgresServer, ValkeyServer])
def test_a_restarted_server_has_its_address_and_data(server_folder, kind):
    def add_one():
        """How many entries there are after one more."""
        if kind is ValkeyServer:
            with redis.Redis.from_url(server.url) as client:
                return client.rpush("kept", "one more")
        with psycopg.connect(server.url) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS kept ()")
            connection.execute("INSERT INTO kept DEFAULT VALUES")
            return connection.execute("SELECT count(*) FROM kept").fetchone()[0]

    server = kind(server_folder)
    server.start()
    try:
        url = server.url
        for count, end in enumerate((server.kill, server.stop, server.kill), 1):
            assert add_one() == count
            end()
            assert not server.running
            server.start()
            assert server.url == url
        assert add_one() == count + 1
    finally:
        server.stop()


def test_a_killed_server_takes_its_busy_sessions_with_it(server_folder):
    server = PostgresServer(server_folder, durable=False)
    server.start()
    with contextlib.closing(psycopg.connect(server.url, autocommit=True)) as connection:
        busy = psutil.Process(connection.info.backend_pid)
        connection.pgconn.send_query(b"DO 'BEGIN LOOP END LOOP; END'")
        server.kill()
        assert_all_end([busy])


def test_a_server_whose_chosen_port_was_taken_meanwhile_chooses_another(server_folder, servers):
    taken = int(servers.broker_url.rpartition(":")[2].partition("/")[0])
    server = ValkeyServer(server_folder, durable=False, options={"maxmemory": "64mb"})
    server.port = taken
    server.start()
    try:
        assert server.port != taken
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("maxmemory") == {"maxmemory": str(64 * 2**20)}, "a setting of the test"
    finally:
        server.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide a folder from nobody, and only root has to")
def test_root_keeps_its_folders_closed_and_runs_postgresql_as_nobody(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir(0o700)
    server = PostgresServer(hidden / "data", durable=False)
    server.start()
    try:
        assert psutil.Process(server.pid).username() == "nobody"
        assert hidden.stat().st_mode & 0o777 == 0o700
        elsewhere = (hidden / "data" / "postgresql-elsewhere").resolve()
        assert elsewhere.is_dir()
    finally:
        server.stop()
        embedded.discard(hidden / "data")
    assert not elsewhere.exists()


def test_a_test_starts_without_settings_from_outside(external_urls):
    assert {name for name in os.environ if name.startswith("TOKENTRAIL_")} <= {
        "TOKENTRAIL_HOME",
        "TOKENTRAIL_PG_BIN",
        "TOKENTRAIL_VALKEY_SERVER",
    }
    assert config.load_settings().database_url is None


def test_tests_refuse_a_given_redis_that_holds_something_and_leave_an_empty_one_empty(tmp_path):
    """A shell that was used with a live system has its address in the environment."""
    root = ROOT
    fills = tmp_path / "test_fills.py"
    fills.write_text("def test_fills(broker_url):\n    import redis; redis.Redis.from_url(broker_url).set('ours', 1)\n")

    def run_tests():
        plugins = ("-p", "tests.conftest", "-p", "no:cacheprovider", "-p", "no:xdist")
        return subprocess.run(
            [sys.executable, "-m", "pytest", "--rootdir", tmp_path, "-q", *plugins, str(fills)],
            cwd=root,
            env={
                **os.environ,
                "PYTHONPATH": str(root),
                "BROKER_URL": url,
                "DATABASE_URL": "postgresql://none",
            },
            capture_output=True,
            text=True,
            check=False,
        )

    with Broker(tmp_path / "broker") as given, given.client as broker:
        url = given.url
        ended = run_tests()
        assert (ended.returncode, broker.info("keyspace")) == (0, {}), ended.stdout + ended.stderr
        broker.set("of a live system", 1)
        ended = run_tests()
        assert (ended.returncode, broker.get("of a live system")) == (2, b"1"), ended.stdout
        assert "it is not empty (db0): unset BROKER_URL" in ended.stdout + ended.stderr
