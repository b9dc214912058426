"""Migrations of a live database: no writer waits, no legacy row changes, and a killed migration can be run again."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.conftest import _database as database
from tests.kit import cli
from tests.kit.catalog import catalog
from tests.kit.wait import PATIENCE, eventually
from worker.config import ROOT
from worker.local.embedded import PostgresServer
from worker.local.embedded.binaries import postgres_folder
from worker.migration import migrate
from worker.schema_version import SchemaError, check_schema, current_revision, known_revision

TOKENTRAIL = (sys.executable, "-m", "worker.cli", "migrate")
ALEMBIC = (sys.executable, "-m", "alembic")
#: What `tokentrail migrate` does, in a process that starts in half the time.
MIGRATE = (
    sys.executable,
    "-c",
    "from worker import config, migration; migration.migrate(config.load_settings().database())",
)

#: TOKENTRAIL_CHAOS=long takes as many as a system has after some years.
LEGACY_BURNS = 2_000_000 if os.environ.get("TOKENTRAIL_CHAOS") == "long" else 200_000
LEGACY_USERS = LEGACY_BURNS // 1_000

#: A migration keeps a lock for some milliseconds; a busy machine may take its processor away meanwhile. What this must
#: detect waits longer: for a report (REPORT_SECONDS), or for the whole of a naive migration.
MAX_WRITER_WAIT_SECONDS = 0.5
REPORT_SECONDS = 1

POPULATE = """
    INSERT INTO account (user_id, balance) SELECT 'user-' || n, 1000000 + n / 7.0 FROM generate_series(1, {users}) n;
    ALTER TABLE burned_credit DROP CONSTRAINT pk_burned_credit; -- added again below: half the time
    INSERT INTO burned_credit (user_id, amount, action, created_at)
        SELECT 'user-' || u, n / 3.0, 'render ünï ' || n, '2019-12-31T23:59:59Z'::timestamptz + n * '1 s'::interval
        FROM generate_series(1, {users}) u, generate_series(1, {burns} / {users}) n;
    ALTER TABLE burned_credit ADD CONSTRAINT pk_burned_credit PRIMARY KEY (user_id, id);
    UPDATE global_token_balance SET balance = (SELECT sum(balance) FROM account)
"""

#: Every byte of every legacy row, its place on disk and the transaction that wrote it.
LEGACY_ROWS = """
    SELECT 'account', ctid::text, xmin::text, (user_id, balance)::text FROM account
    UNION ALL SELECT 'burned_credit', ctid::text, xmin::text, (user_id, id, amount, action, created_at)::text
        FROM burned_credit
    UNION ALL SELECT 'global_token_balance', ctid::text, xmin::text, (id, balance)::text FROM global_token_balance
    UNION ALL SELECT relname, relfilenode::text, '', '' FROM pg_class
        WHERE relname ~ '^(pk_)?(account|burned_credit|global_token_balance)$'
    ORDER BY 1, 2
"""


def run(command, url, *arguments, cwd=ROOT):
    return cli.run(*arguments, program=command, cwd=cwd, DATABASE_URL=url, NO_COLOR="1")


def started(command, url):
    return cli.started(program=command, DATABASE_URL=url, NO_COLOR="1")


def populated(url, users=20, burns=1_000):
    """A legacy database that is in use."""
    migrate(url, "0001")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(POPULATE.format(users=users, burns=burns))
    return url


def until(connection, condition):
    """Wait until a query returns true."""
    eventually(lambda: connection.execute(condition).fetchone() == (True,), condition)


@contextmanager
def old_snapshot(url):
    """A long report: CREATE INDEX CONCURRENTLY waits for its end, and nothing else does."""
    with psycopg.connect(url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SELECT 1")
        yield


MIGRATOR_BUILDS_AN_INDEX = """
    SELECT EXISTS (SELECT FROM pg_stat_progress_create_index JOIN pg_stat_activity USING (pid)
                   WHERE pg_stat_activity.datname = current_database() AND phase = 'waiting for old snapshots')
"""

MIGRATOR_HAS_STOPPED = """
    SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
                   AND application_name = 'tokentrail migrate' AND wait_event = 'PgSleep')
"""

IS_VACUUMED = """
    SELECT EXISTS (SELECT FROM pg_stat_progress_vacuum
                   WHERE datname = current_database() AND relid = 'burned_credit'::regclass)
"""

#: The statements of 0002 before which a migrator is killed.
KILLED_BEFORE = (
    "CREATE TABLE IF NOT EXISTS rejected_event%",
    "ALTER TABLE burned_credit%ADD COLUMN%",
    "%VALIDATE CONSTRAINT ck_account_sequence_not_negative",
    "CREATE UNIQUE INDEX CONCURRENTLY%",
    "CREATE OR REPLACE TRIGGER append_only%ON rejected_event%",
)


# The commands


def test_migrate_reports_from_which_revision_to_which_and_a_second_time_does_nothing(empty_database_url, tokentrail):
    migrated = tokentrail("migrate", DATABASE_URL=empty_database_url)
    assert migrated == (0, "Migrated the schema from nothing to 0002.\n", "")
    assert tokentrail("migrate") == (0, "The schema is at 0002 already: nothing to do.\n", "")


@pytest.fixture(scope="module")
def databases(servers, template):
    """A database in each state that the commands can meet; none of them changes it."""
    changes = {
        "empty": None,
        "0001": None,
        "0002": "SELECT 1",
        "9999": "UPDATE alembic_version SET version_num = '9999'",
        "of another application": """
            DROP TABLE transaction_record CASCADE;
            UPDATE alembic_version SET version_num = 'ab12'
        """,
    }
    with contextlib.ExitStack() as stack:
        urls = {}
        for state, change in changes.items():
            source = "template1" if change is None else template
            urls[state] = stack.enter_context(database(servers.database_url, source))
            if change:
                with psycopg.connect(urls[state]) as connection:
                    connection.execute(change)
        migrate(urls["0001"], "0001")
        yield urls


@pytest.mark.parametrize(
    ("state", "command", "code", "sentence"),
    [
        ("empty", "status", 1, "The database has no schema yet: run `tokentrail migrate`."),
        ("empty", "new add_nickname", 1, "The database has no schema yet"),
        ("empty", "downgrade", 1, "no schema yet: there is nothing to downgrade"),
        ("empty", "stamp", 1, "no tables of the legacy schema"),
        ("0001", "status", 1, "The schema is at 0001 and this code needs 0002: run `tokentrail migrate`."),
        ("0001", "new add_nickname", 1, "this code needs 0002"),
        ("0001", "downgrade --drop-history", 0, "The schema is at 0001 already"),
        ("0001", "stamp", 1, "The schema is at 0001 already"),
        ("0002", "status", 0, "The schema is at 0002, as this code needs it."),
        ("0002", "stamp", 1, "The schema is at 0002 already"),
        ("9999", "", 0, "Left as it is: The schema is at 9999, newer than this code (0002)"),
        ("9999", "status", 0, "The schema is at 9999, newer than this code (0002); deploy the newer code soon."),
        ("9999", "new add_nickname", 1, "newer than this code (0002)"),
        ("9999", "downgrade --drop-history", 1, "newer than this code (0002): use the newer code"),
        ("9999", "stamp", 1, "newer than this code (0002): use the newer code"),
        *(
            ("of another application", command, 1, "names ab12, which is not a migration of tokentrail")
            for command in ("", "status", "downgrade", "stamp", "new add_nickname")
        ),
    ],
)
def test_a_command_that_has_nothing_to_do_here_says_why(databases, tokentrail, state, command, code, sentence):
    with psycopg.connect(databases[state], autocommit=True) as connection:
        before = catalog(connection)
        result = tokentrail("migrate", *command.split(), DATABASE_URL=databases[state])
        assert catalog(connection) == before
    if code:
        cli.assert_one_line(result, code, sentence)
    else:
        assert (result.code, result.err) == (0, "")
        assert sentence in result.out


@pytest.mark.parametrize("state", ["empty", "0001", "0002", "9999", "of another application"])
def test_workers_run_on_their_own_schema_and_on_newer_ones(databases, state):
    with psycopg.connect(databases[state]) as connection:
        if state == "0002":
            assert check_schema(connection) is None
        elif state == "9999":
            assert "deploy the newer code soon" in check_schema(connection)
        else:
            with pytest.raises(SchemaError):
                check_schema(connection)


@pytest.mark.parametrize("command", ["", "stamp", "downgrade", "new add_nickname"])
def test_without_a_database_it_can_use_the_command_ends_with_one_line(servers, tokentrail, command):
    arguments = ("migrate", *command.split())
    address = urlsplit(servers.database_url)
    wrong = address._replace(netloc=f"{address.username}:hush@{address.hostname}:{address.port}").geturl()
    cli.assert_one_line(tokentrail(*arguments, DATABASE_URL=None), 2, "DATABASE_URL")
    cli.assert_one_line(tokentrail(*arguments, DATABASE_URL="postgresql://app@127.0.0.1:1/none"), 1, "PostgreSQL")
    cli.assert_one_line(tokentrail(*arguments, DATABASE_URL=wrong), 1, "password authentication failed")


def test_migrate_names_a_table_that_other_software_created(empty_database_url, tokentrail):
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("CREATE TABLE account (user_id text)")
    result = tokentrail("migrate", DATABASE_URL=empty_database_url)
    cli.assert_one_line(result, 1, 'relation "account" already exists', "tokentrail migrate stamp")


def test_new_writes_the_next_revision_from_the_models(database_url, tmp_path):
    for folder in ("migrations", "schema", "worker"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tables = tmp_path / "schema" / "tables.py"
    column = "    opening_balance: Mapped[Decimal | None]"
    assert column in tables.read_text()
    tables.write_text(tables.read_text().replace(column, f"    nickname: Mapped[str | None]\n{column}"))

    written = run(TOKENTRAIL, database_url, "new", "add_nickname", cwd=tmp_path)

    assert written.code == 0, written.err
    revision = (tmp_path / "migrations" / "versions" / "0003_add_nickname.py").read_text()
    assert revision.startswith('"""add nickname\n')
    assert "op.add_column('account', sa.Column('nickname', sa.Text(), nullable=True))" in revision
    assert "down_revision: str | None = '0002'" in revision
    assert run(TOKENTRAIL, database_url, cwd=tmp_path).out == "Migrated the schema from 0002 to 0003.\n"


# Under load


def test_upgrade_leaves_every_old_row_byte_for_byte_and_what_is_new_in_it_null(empty_database_url):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        before = connection.execute(LEGACY_ROWS).fetchall()
        migrate(empty_database_url)

        assert len(before) > 1_000
        assert connection.execute(LEGACY_ROWS).fetchall() == before
        new = {
            "account": "(opening_balance, head_hash, rejection_head, last_recorded_at) IS NULL "
            "AND (sequence, rejections) = (0, 0)",
            "burned_credit": "(sequence, balance_before, balance_after) IS NULL",
            "global_token_balance": "(issued, burned) IS NULL",
        }
        for table, untouched in new.items():
            assert connection.execute(f"SELECT bool_and({untouched}) FROM {table}").fetchone() == (True,)


class LegacyWriters:
    """The legacy software at work: counts what it writes, its errors, and how long it waits for the migrator.

    PostgreSQL is asked every few milliseconds which session waits for the migrator and since when. The time that an
    insert takes says less: on a busy machine any insert may be slow.
    """

    def __init__(self, url):
        self.url = url
        self.written = 0
        self.longest_wait = 0.0  # seconds that a writer waited for the migrator
        self.errors = []
        self._end = threading.Event()
        jobs = [self._insert, *[self._hold_a_transaction] * 4, self._report, self._watch]
        self._threads = [threading.Thread(target=self._run, args=(job, n)) for n, job in enumerate(jobs, start=1)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        while self.written < 100 and not self.errors:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _run(self, job, number):
        try:
            with psycopg.connect(self.url, autocommit=True, application_name="legacy writer") as connection:
                while not self._end.is_set():
                    job(connection, number)
        except Exception as error:  # noqa: BLE001 - the test reports all
            self.errors.append(error)

    def _burn(self, connection, number):
        connection.execute(
            "INSERT INTO burned_credit (user_id, amount, action) VALUES (%s, 1, 'live')", [f"user-{number}"]
        )
        connection.execute("UPDATE account SET balance = balance - 1 WHERE user_id = %s", [f"user-{number}"])
        self.written += 1

    def _insert(self, connection, number):
        self._burn(connection, number)
        connection.execute("UPDATE global_token_balance SET balance = balance - 1 WHERE id = 0")
        time.sleep(0.001)

    def _hold_a_transaction(self, connection, number):
        with connection.transaction():
            self._burn(connection, number)
            time.sleep(random.uniform(0, 0.08))

    def _report(self, connection, number):
        # A migrator that waits for a strong lock behind this report makes every writer wait as long.
        with connection.transaction():
            for table in ("account", "burned_credit"):
                connection.execute(f"SELECT count(*) FROM {table} WHERE user_id = %s", [f"user-{number}"])
            time.sleep(REPORT_SECONDS)
        time.sleep(REPORT_SECONDS)

    def _watch(self, connection, _):
        # statement_timestamp: the wait was at least that long, however late this process reads it
        (waited,) = connection.execute("""
            SELECT max(extract(epoch FROM statement_timestamp() - l.waitstart))::float8
            FROM pg_locks l JOIN pg_stat_activity w USING (pid)
            WHERE NOT l.granted AND w.application_name = 'legacy writer' AND w.datname = current_database()
                AND pg_blocking_pids(l.pid) && ARRAY(SELECT pid FROM pg_stat_activity
                    WHERE application_name = 'tokentrail migrate' AND datname = current_database())
        """).fetchone()
        self.longest_wait = max(self.longest_wait, waited or 0.0)
        time.sleep(0.005)


def test_no_writer_waits_for_the_migration_of_many_burns(empty_database_url):
    populated(empty_database_url, LEGACY_USERS, LEGACY_BURNS)

    # A naive migration, to see that this test detects it. Rolled back, so that the real one has all to do.
    with (
        LegacyWriters(empty_database_url) as with_naive_migration,
        psycopg.connect(empty_database_url, application_name="tokentrail migrate") as naive,
    ):
        naive.execute("ALTER TABLE burned_credit ADD COLUMN sequence bigint")
        naive.execute("ALTER TABLE burned_credit ADD CONSTRAINT positive CHECK (sequence > 0)")
        naive.execute("CREATE INDEX ON burned_credit (user_id, sequence)")
        naive.execute("ALTER TABLE burned_credit ADD COLUMN trace uuid DEFAULT gen_random_uuid()")  # rewrites it
        naive.execute("SELECT pg_sleep(%s)", [REPORT_SECONDS])  # as with more rows, or a slower disk
        naive.rollback()
    assert with_naive_migration.errors == []
    assert with_naive_migration.longest_wait > MAX_WRITER_WAIT_SECONDS

    with LegacyWriters(empty_database_url) as writers:
        written_before = writers.written
        begun = time.monotonic()
        migrated = run(TOKENTRAIL, empty_database_url)
        took, written = time.monotonic() - begun, writers.written - written_before
    print(
        f"{LEGACY_BURNS:,} burns migrated in {took:.1f} s with {written:,} written meanwhile; "
        f"longest wait {writers.longest_wait * 1000:.0f} ms, "
        f"behind a naive migration {with_naive_migration.longest_wait * 1000:.0f} ms"
    )

    assert migrated.out == "Migrated the schema from 0001 to 0002.\n", migrated.err
    assert writers.errors == []
    assert written > 100
    assert writers.longest_wait <= MAX_WRITER_WAIT_SECONDS
    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute("SELECT count(*) FROM burned_credit").fetchone() == (
            LEGACY_BURNS + writers.written + with_naive_migration.written,
        )


# Killed, and two at once


@pytest.fixture
def clean(database_url):
    """The catalog of a database that was migrated in one go."""
    with psycopg.connect(database_url) as connection:
        return catalog(connection)


def test_a_migration_killed_at_any_step_can_be_run_again(empty_database_url, clean):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        old_rows = connection.execute(LEGACY_ROWS).fetchall()
        # The migrator stops before the statement, and waits there to be killed.
        connection.execute("""
            CREATE SCHEMA test;
            CREATE FUNCTION test.stop() RETURNS event_trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF current_setting('application_name') = 'tokentrail migrate'
                    AND ltrim(current_query(), E' \\n') LIKE current_setting('test.stop_at') THEN
                    PERFORM pg_sleep(4);
                END IF;
            END $$;
            CREATE EVENT TRIGGER stop ON ddl_command_start EXECUTE FUNCTION test.stop()
        """)
        for statement in KILLED_BEFORE:
            connection.execute(f"ALTER DATABASE {connection.info.dbname} SET test.stop_at = '{statement}'")
            with started(MIGRATE, empty_database_url) as process:
                until(connection, MIGRATOR_HAS_STOPPED)
                process.send_signal(signal.SIGKILL)
                assert process.wait(PATIENCE) == -signal.SIGKILL
            assert current_revision(connection) == "0001"
            # The server ends the killed migrator's statement by itself.
            until(connection, f"SELECT NOT ({MIGRATOR_HAS_STOPPED})")
        connection.execute("DROP EVENT TRIGGER stop")

        assert migrate(empty_database_url) == ["0002"]
        assert catalog(connection) == clean
        assert connection.execute(LEGACY_ROWS).fetchall() == old_rows


def test_an_index_left_invalid_by_a_killed_build_is_built_again(empty_database_url, clean):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        with old_snapshot(empty_database_url), started(MIGRATE, empty_database_url) as process:
            until(connection, MIGRATOR_BUILDS_AN_INDEX)
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
            # The server ends the build of the killed migrator by itself.
            until(connection, f"SELECT NOT ({MIGRATOR_BUILDS_AN_INDEX})")
        assert [line for line in catalog(connection, "index") if "INVALID" in line]

        migrate(empty_database_url)
        assert catalog(connection) == clean


def test_of_two_migrations_at_once_one_waits_and_both_succeed(empty_database_url, clean):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        with started(TOKENTRAIL, empty_database_url) as first, started(TOKENTRAIL, empty_database_url) as second:
            with old_snapshot(empty_database_url):
                until(connection, MIGRATOR_BUILDS_AN_INDEX)
                # The second polls the lock while the first builds its index.
                until(
                    connection,
                    "SELECT count(*) = 2 FROM pg_stat_activity WHERE application_name = 'tokentrail migrate' "
                    "AND datname = current_database()",
                )
                time.sleep(
                    1.2
                )  # past deadlock_timeout: a migrator that waited inside a transaction would be cancelled by now
            ends = [(*process.communicate(timeout=PATIENCE), process.returncode) for process in (first, second)]

        assert sorted(ends) == [
            ("Migrated the schema from 0001 to 0002.\n", "", 0),
            (
                "The schema is at 0002 already: nothing to do.\n",
                "another migration is running; waiting for it to end\n",
                0,
            ),
        ]
        assert catalog(connection) == clean


@pytest.fixture
def own_server_url(server_folder):
    """A server of the test's own, whose configuration it may change."""
    server = PostgresServer(server_folder, durable=False)
    server.start()
    yield server.url
    server.stop()


def test_a_table_is_migrated_while_autovacuum_works_on_it(own_server_url):
    """An automatic VACUUM gives way only to a statement that has waited for a second; no step waits that long."""
    populated(own_server_url)
    with psycopg.connect(own_server_url, autocommit=True) as connection:
        connection.execute("""
            ALTER TABLE burned_credit SET (autovacuum_vacuum_insert_threshold = 0, autovacuum_vacuum_threshold = 0,
                autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)
        """)
        connection.execute("UPDATE burned_credit SET action = 'rendered'")
        connection.execute("ALTER SYSTEM SET autovacuum_naptime = '1s'")
        connection.execute("SELECT pg_reload_conf()")
        until(connection, IS_VACUUMED)
        connection.execute("ALTER SYSTEM SET autovacuum_naptime = '1h'")
        connection.execute("SELECT pg_reload_conf()")

        migrate(own_server_url)

        assert connection.execute(IS_VACUUMED).fetchone() == (False,)


# Downgrade


HISTORY = {
    "transaction_record": """
        INSERT INTO transaction_record VALUES
            ('user-1', 1, 'key', 'burn', 5, 15, 10, NULL, NULL, now(), 'p', 'h', 1);
        INSERT INTO burned_credit (user_id, amount, action, sequence, balance_before, balance_after)
            VALUES ('user-1', 5, 'render', 1, 15, 10)
    """,
    "rejected_event": """
        INSERT INTO rejected_event VALUES
            ('user-1', 1, 'key', 'burn', 5, NULL, 'render', NULL, NULL, now(), 'insufficient_tokens', 0, 'p', 'h', 1)
    """,
    "dead_letter": """
        INSERT INTO dead_letter (fingerprint, reason, detail, first_seen_at, last_seen_at)
            VALUES ('f', 'undecodable', 'It cannot be read.', now(), now())
    """,
}


@pytest.mark.parametrize("table", HISTORY)
def test_downgrade_refuses_to_drop_history(table, database_url, tokentrail):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(HISTORY[table])
        before = catalog(connection)
        result = tokentrail("migrate", "downgrade", DATABASE_URL=database_url)
        cli.assert_one_line(result, 1, f"which holds rows ({table})", "tokentrail migrate downgrade --drop-history")
        assert catalog(connection) == before
        assert current_revision(connection) == "0002"


def test_downgrade_with_drop_history_puts_the_supply_into_the_legacy_row(empty_database_url, tokentrail):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        legacy, legacy_rows = catalog(connection), connection.execute(LEGACY_ROWS).fetchall()
        (balance,) = connection.execute("SELECT balance FROM global_token_balance").fetchone()
        migrate(empty_database_url)
        migrated = catalog(connection)
        for rows in HISTORY.values():
            connection.execute(rows)
        connection.execute("INSERT INTO global_token_balance (id, issued, burned) VALUES (1, 100, 30), (2, 0.5, 40)")

        result = tokentrail("migrate", "downgrade", "--drop-history", DATABASE_URL=empty_database_url)
        assert result == (0, "Took the schema back from 0002 to 0001. The audit trail was dropped.\n", "")

        assert catalog(connection) == legacy
        assert connection.execute("SELECT id, balance - %s FROM global_token_balance", [balance]).fetchall() == [
            (0, 30.5)
        ]
        # Legacy rows stay as they were, and the burns since are burns to the legacy software too.
        remaining = [row for row in connection.execute(LEGACY_ROWS) if row[0] != "global_token_balance"]
        assert set(remaining) > {row for row in legacy_rows if row[0] != "global_token_balance"}
        assert connection.execute("SELECT count(*) FROM burned_credit").fetchone() == (1_001,)

        migrate(empty_database_url)
        assert catalog(connection) == migrated
        connection.execute(HISTORY["dead_letter"])
        downgraded = run(ALEMBIC, empty_database_url, "-x", "drop-history", "downgrade", "0001")
        assert downgraded.code == 0, downgraded.err
        assert catalog(connection) == legacy


def test_an_empty_trail_is_downgraded_and_upgraded_again_without_a_trace(empty_database_url, tokentrail):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        legacy = catalog(connection)
        migrate(empty_database_url)
        migrated = catalog(connection)
        result = tokentrail("migrate", "downgrade", DATABASE_URL=empty_database_url)
        assert result == (0, "Took the schema back from 0002 to 0001. The audit trail was empty.\n", "")
        assert catalog(connection) == legacy
        migrate(empty_database_url)
        assert catalog(connection) == migrated


# Review before running


def test_the_printed_sql_makes_the_same_database(empty_database_url, clean, requires_program):
    psql = requires_program("psql", path=f"{postgres_folder()}{os.pathsep}{os.environ['PATH']}")
    printed = run(TOKENTRAIL, empty_database_url, "--sql")
    assert (printed.code, printed.err) == (0, "")

    played = cli.run("-qXv", "ON_ERROR_STOP=1", empty_database_url, program=[psql], stdin=printed.out)

    assert played.code == 0, played.err
    with psycopg.connect(empty_database_url) as connection:
        assert catalog(connection) == clean
        assert current_revision(connection) == known_revision()


def test_the_printed_downgrade_refuses_to_drop_history_too(database_url, requires_program):
    psql = requires_program("psql", path=f"{postgres_folder()}{os.pathsep}{os.environ['PATH']}")
    with psycopg.connect(database_url) as connection:
        connection.execute(HISTORY["dead_letter"])
    printed = run(ALEMBIC, database_url, "downgrade", "0002:0001", "--sql")

    played = cli.run("-qXv", "ON_ERROR_STOP=1", database_url, program=[psql], stdin=printed.out)

    assert "which holds rows (dead_letter)" in played.err
    with psycopg.connect(database_url) as connection:
        assert current_revision(connection) == "0002"


def test_squawk_finds_no_unsafe_statement(database_url, requires_program, tmp_path):
    squawk = requires_program("squawk", path=str(Path(sys.executable).parent))
    migration = tmp_path / "migration.sql"
    migration.write_text(run(ALEMBIC, database_url, "upgrade", "head", "--sql").out)
    assert "CREATE TABLE" in migration.read_text()

    def findings():
        return cli.run("--config", ROOT / ".squawk.toml", "--reporter", "gcc", migration, program=[squawk])

    found = findings()
    assert (found.code, found.out) == (0, "")

    migration.write_text(migration.read_text() + "CREATE INDEX ix ON burned_credit (action);")
    assert "require-concurrent-index-creation" in findings().out


def test_alembic_finds_no_difference_between_models_and_database(database_url):
    checked = run(ALEMBIC, database_url, "check")
    assert checked.code == 0, checked.out + checked.err
