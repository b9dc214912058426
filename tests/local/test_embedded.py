"""The embedded servers: there when asked for, gone when nobody needs them, whoever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from tests.kit.brokers import Broker, eventually
from worker import config
from worker.config import ROOT
from worker.local import embedded
from worker.local.embedded import EmbeddedError, PostgresServer, ValkeyServer, process

#: A program that has servers and then waits to be killed.
PROGRAM = """
import json, sys, time
from pathlib import Path
from worker.local import embedded

with embedded.servers(Path(sys.argv[1]) if len(sys.argv) > 1 else None, durable=False) as pair:
    print(json.dumps([pair.pids, str(pair.logs)]), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def start_program():
    """Starts PROGRAM and tells its process, its servers' processes and where their logs are."""
    with contextlib.ExitStack() as stack:

        def start(*arguments):
            root = ROOT
            program = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True, cwd=root
            )
            stack.enter_context(program)
            stack.callback(program.kill)
            pids, logs = json.loads(program.stdout.readline())
            if not arguments:
                stack.callback(embedded.discard, Path(logs).parent)  # program and guard may both be killed
            processes = [psutil.Process(pid) for pid in pids]
            return program, processes + processes[1].children(), Path(logs)

        yield start


def runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # an ended one whose parent has not looked yet
    except psutil.NoSuchProcess:
        return False


def assert_all_end(processes):
    deadline = time.monotonic() + 30
    while alive := [process for process in processes if runs(process)]:
        assert time.monotonic() < deadline, f"still there after 30 seconds: {alive}"
        time.sleep(0.02)


def write(pair):
    with psycopg.connect(pair.database_url) as connection:
        connection.execute("CREATE TABLE kept (what text)")
        connection.execute("INSERT INTO kept VALUES ('a row')")
    with redis.Redis.from_url(pair.broker_url) as client:
        client.lpush("kept", "a message")


def read(pair):
    with psycopg.connect(pair.database_url) as connection:
        row = connection.execute("SELECT what FROM kept").fetchone()
    with redis.Redis.from_url(pair.broker_url) as client:
        return *row, *client.lrange("kept", 0, -1)


def setting(connection, name):
    return connection.execute("SELECT current_setting(%s)", [name]).fetchone()[0]


def test_throw_away_servers_answer_and_leave_nothing_behind():
    with embedded.servers() as pair:
        write(pair)
        assert read(pair) == ("a row", b"a message")
        pair.check()
        with psycopg.connect(pair.database_url) as connection:
            assert connection.info.dbname == "tokentrail"
            assert setting(connection, "fsync") == "off"
        processes = [psutil.Process(pid) for pid in pair.pids]

    assert_all_end(processes)
    assert not pair.logs.parent.exists()


def test_servers_keep_what_they_have_acknowledged_in_the_folder_they_are_given(server_folder):
    with embedded.servers(server_folder) as pair:
        write(pair)
    with embedded.servers(server_folder) as pair:
        assert read(pair) == ("a row", b"a message")
        with psycopg.connect(pair.database_url) as connection:
            assert setting(connection, "fsync") == setting(connection, "synchronous_commit") == "on"
            assert setting(connection, "max_connections") == "200"
            assert setting(connection, "shared_preload_libraries") == "pg_stat_statements"
            major = int(setting(connection, "server_version_num")) // 10_000
        with redis.Redis.from_url(pair.broker_url) as client:
            assert client.config_get("appendonly", "appendfsync", "maxmemory-policy") == {
                "appendonly": "yes",
                "appendfsync": "always",
                "maxmemory-policy": "noeviction",
            }
    assert (server_folder / f"postgresql-{major}").is_dir() or (server_folder / "postgresql-elsewhere").is_symlink()


def test_servers_refuse_whoever_has_no_password(server_folder):
    with embedded.servers() as pair:
        stranger = pair.database_url.replace("tokentrail:", "tokentrail:not", 1)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(stranger)
        stranger = pair.broker_url.replace("://:", "://:not", 1)
        with redis.Redis.from_url(stranger) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        password = pair.logs.parent / "password"
        assert password.stat().st_mode & 0o077 == 0
        assert password.read_text() not in repr(pair)
        for pid in pair.pids:
            assert password.read_text() not in " ".join(psutil.Process(pid).cmdline())


def test_two_throw_away_pairs_live_side_by_side():
    with embedded.servers() as one, embedded.servers() as other:
        write(one)
        write(other)
        assert one.database_url != other.database_url


def test_a_killed_program_leaves_no_server_and_no_folder(start_program):
    program, processes, logs = start_program()
    program.send_signal(signal.SIGKILL)
    assert_all_end(processes)
    assert not logs.parent.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_killed_guard_leaves_no_server(start_program):
    _, processes, _ = start_program()
    processes[0].send_signal(signal.SIGKILL)
    assert_all_end(processes)


def test_a_terminated_guard_stops_its_servers(start_program):
    _, processes, _ = start_program()
    processes[0].terminate()
    assert_all_end(processes)


def test_a_terminated_guard_is_reported_and_its_log_is_kept():
    def lose_it():
        with embedded.servers() as pair:
            guard = psutil.Process(pair.pids[0])
            guard.terminate()
            assert_all_end([guard])
            pair.check()

    with pytest.raises(EmbeddedError, match=r"^The guard of the embedded servers was killed or has failed") as failure:
        lose_it()
    log = Path(str(failure.value).rpartition("its log is ")[2].removesuffix("."))
    assert log.exists()
    assert [path.name for path in log.parent.parent.iterdir()] == ["logs"]
    embedded.discard(log.parent.parent)


def test_servers_that_were_all_killed_come_back_with_what_they_had(server_folder):
    with embedded.servers(server_folder) as pair:
        write(pair)
        processes = [psutil.Process(pid) for pid in pair.pids]
        processes += processes[1].children()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # gone already, with the one before it
                process.kill()
        assert_all_end(processes[:1])
        with pytest.raises(EmbeddedError, match=r"guard of the .* start again; its log is .*guard\.log\.$"):
            pair.check()
    with embedded.servers(server_folder) as pair:
        assert read(pair) == ("a row", b"a message")


def test_a_server_that_ends_by_itself_is_reported_and_takes_the_other_with_it():
    with embedded.servers() as pair:
        guard, postgres, valkey = (psutil.Process(pid) for pid in pair.pids)
        valkey.kill()
        assert_all_end([guard, postgres])
        sentence = (
            r"^Valkey was killed, by somebody or for want of memory: start again, and stop .* is .*valkey\.log\.$"
        )
        with pytest.raises(EmbeddedError, match=sentence):
            pair.check()


def test_a_server_that_somebody_stops_is_reported_with_its_last_words_and_its_log_is_kept():
    def lose_one():
        with embedded.servers() as pair:
            guard, postgres, _ = (psutil.Process(pid) for pid in pair.pids)
            postgres.send_signal(signal.SIGINT)
            assert_all_end([guard])
            pair.check()

    with pytest.raises(EmbeddedError) as failure:
        lose_one()
    said = str(failure.value)
    assert said.startswith("PostgreSQL has ended by itself with status 0 (")
    assert (
        "database system is shut down): start again, and if that fails mend what it says, or set DATABASE_URL" in said
    )
    log = Path(said.rpartition("its log is ")[2].removesuffix("."))
    assert "received fast shutdown request" in log.read_text()
    embedded.discard(log.parent.parent)


def test_a_server_that_takes_too_long_is_reported_with_what_it_is_at(server_folder, monkeypatch):
    """One that answers nobody, as one that has much to recover from."""
    monkeypatch.setattr(process, "START_SECONDS", 0)
    monkeypatch.setenv("TOKENTRAIL_VALKEY_SERVER", str(server_folder / "valkey-server"))
    server_folder.mkdir(mode=0o755)
    (server_folder / "valkey-server").write_text("#!/bin/sh\necho Reading RDB file; exec sleep 600\n")
    (server_folder / "valkey-server").chmod(0o755)
    server = ValkeyServer(server_folder)
    server.launch()
    eventually(lambda: "Reading" in server.log.read_text())
    sentence = (
        r"^Valkey did not answer within 0 seconds \(Reading RDB file\): start again when this machine has less to"
    )
    with pytest.raises(EmbeddedError, match=sentence):
        server.wait_until_ready()
    assert not server.running


def test_a_server_stops_at_once_though_we_ignore_the_signal_that_stops_it(server_folder):
    """As under nohup or in the background of a script; it has no handler of its own yet."""
    server = PostgresServer(server_folder, durable=False)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(3):
            server.launch()
            server.stop()
            assert server.process.returncode != -signal.SIGKILL, "it had to be killed"
    finally:
        signal.signal(signal.SIGINT, before)
        server.kill()


def test_a_folder_in_use_is_refused_in_a_sentence_that_names_its_user(server_folder, start_program):
    program, *_ = start_program(str(server_folder))
    sentence = f"^{server_folder} is in use by process {program.pid}: stop that"
    with pytest.raises(EmbeddedError, match=sentence), embedded.servers(server_folder):
        pass


def test_a_folder_whose_user_was_killed_a_moment_ago_is_not_refused(server_folder, start_program):
    program, *_ = start_program(str(server_folder))
    program.kill()
    program.wait()
    with embedded.servers(server_folder) as pair:
        write(pair)


@pytest.mark.parametrize(
    ("variable", "server"), [("TOKENTRAIL_PG_BIN", "PostgreSQL"), ("TOKENTRAIL_VALKEY_SERVER", "Valkey")]
)
def test_a_server_that_does_not_start_is_reported_with_its_log_and_last_words(
    server_folder, monkeypatch, variable, server
):
    broken = "#!/bin/sh\ncase $1 in --version) echo 18.0;; *) echo it is broken >&2; exit 3;; esac\n"
    server_folder.mkdir()
    for name in ("initdb", "postgres", "valkey-server"):
        (server_folder / name).write_text(broken)
        (server_folder / name).chmod(0o755)
    monkeypatch.setenv(variable, str(server_folder if server == "PostgreSQL" else server_folder / "valkey-server"))

    advice = "mend what it says, or set DATABASE_URL and BROKER_URL to servers of your own; its log is "
    sentence = rf"^{server}('s initdb failed| ended with status 3 .*) \(it is broken\): {advice}"
    with pytest.raises(EmbeddedError, match=sentence) as failure, embedded.servers():
        pass

    log = Path(str(failure.value).rpartition("its log is ")[2].removesuffix("."))
    assert "it is broken" in log.read_text()
    assert [path.name for path in log.parent.parent.iterdir()] == ["logs"]
    embedded.discard(log.parent.parent)


def test_a_machine_without_the_wheel_is_told_both_ways_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        EmbeddedError, match=r"TOKENTRAIL_PG_BIN .* TOKENTRAIL_VALKEY_SERVER .* DATABASE_URL and BROKER_URL"
    ):
        embedded.binaries.postgres_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another account")
def test_a_root_without_nobody_is_told_both_ways_out(monkeypatch):
    monkeypatch.setattr("pwd.getpwnam", {}.__getitem__)
    with pytest.raises(EmbeddedError, match="run as an ordinary user, or set both DATABASE_URL and BROKER_URL"):
        embedded.unprivileged.account()


def test_a_named_program_that_is_not_there_is_refused_with_the_name_of_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENTRAIL_PG_BIN", str(tmp_path))
    with pytest.raises(
        EmbeddedError, match=rf"^{tmp_path}/initdb does not run \(No such file .*with TOKENTRAIL_PG_BIN"
    ):
        PostgresServer(tmp_path / "data").start()


def test_servers_of_the_distribution_serve_as_well(server_folder, monkeypatch, requires_program):
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    postgres = requires_program("postgres", os.pathsep.join(map(str, versions)))
    monkeypatch.setenv("TOKENTRAIL_PG_BIN", str(Path(postgres).parent))
    monkeypatch.setenv("TOKENTRAIL_VALKEY_SERVER", requires_program("redis-server"))
    with embedded.servers(server_folder) as pair:
        write(pair)
    with embedded.servers(server_folder) as pair:
        assert read(pair) == ("a row", b"a message")
        with psycopg.connect(pair.database_url) as connection:
            assert setting(connection, "server_encoding") == "UTF8"


@pytest.mark.parametrize("end", ["kill", "stop"])
@pytest.mark.parametrize(("kind", "driver"), [(PostgresServer, psycopg.connect), (ValkeyServer, None)])
def test_a_server_alone_comes_back_at_the_same_address_with_its_data(server_folder, kind, driver, end):
    server = kind(server_folder)
    server.start()
    try:
        address = server.url
        for round_ in range(3):
            if driver:
                with driver(address) as connection:
                    connection.execute("CREATE TABLE IF NOT EXISTS kept (round int)")
                    connection.execute("INSERT INTO kept VALUES (%s)", [round_])
                    assert connection.execute("SELECT count(*) FROM kept").fetchone() == (round_ + 1,)
            else:
                with redis.Redis.from_url(address) as client:
                    assert client.rpush("kept", round_) == round_ + 1
            getattr(server, end)()
            assert not server.running
            server.start()
            assert server.url == address
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


def test_a_server_takes_settings_of_the_test(server_folder):
    server = ValkeyServer(server_folder, durable=False, options={"maxmemory": "64mb"})
    server.start()
    try:
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("maxmemory") == {"maxmemory": str(64 * 2**20)}
    finally:
        server.stop()


def test_a_taken_port_of_our_choice_is_exchanged_for_another(server_folder, monkeypatch, servers):
    taken = int(servers.broker_url.rpartition(":")[2].partition("/")[0])
    server = ValkeyServer(server_folder, durable=False)
    server.port = taken  # as if another had been quicker
    server.start()
    try:
        assert server.port != taken
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


def test_a_test_starts_without_settings_from_outside(given):
    assert {name for name in os.environ if name.startswith("TOKENTRAIL_")} <= {
        "TOKENTRAIL_HOME",
        "TOKENTRAIL_PG_BIN",
        "TOKENTRAIL_VALKEY_SERVER",
    }
    assert config.settings().database_url is None


def test_tests_refuse_a_given_redis_that_holds_something_and_leave_an_empty_one_empty(tmp_path):
    """Whoever worked on a live system in this shell has its address in the environment."""
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
        assert "it holds something (db0): unset BROKER_URL" in ended.stdout + ended.stderr


def test_servers_are_told_nothing_of_our_environment(monkeypatch):
    """PostgreSQL runs as nobody where we are root: every other process of nobody's can read what it was told."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hush@db.example/tokens")
    monkeypatch.setenv("SOMETHING", "hush")
    monkeypatch.setenv("TZ", "UTC")
    with embedded.servers() as pair:
        postgres, valkey = (Path(f"/proc/{pid}/environ").read_bytes() for pid in pair.pids[1:])
    assert b"hush" not in postgres + valkey  # Valkey writes its title over what it was told
    told = dict(entry.split(b"=", 1) for entry in postgres.split(b"\0") if entry)
    assert told.keys() <= {b"PATH", b"LC_ALL", b"TZ", b"LD_LIBRARY_PATH"}
    assert (told[b"LC_ALL"], told[b"TZ"]) == (b"C", b"UTC")
