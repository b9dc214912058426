"""Migrations of a live database: nobody waits, nothing old changes, and a killed one is run again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.kit.catalog import catalog
from worker.cli import main
from worker.config import ROOT, settings
from worker.local.embedded.binaries import postgres_folder
from worker.schema_version import SchemaError, check_schema, current_revision, known_revision, migrate

TOKENTRAIL = (sys.executable, "-m", "worker.cli", "migrate")
ALEMBIC = (sys.executable, "-m", "alembic")
#: What `tokentrail migrate` does, in a process that starts in half the time.
MIGRATE = (
    sys.executable,
    "-c",
    "from worker.schema_version import migrate; from worker.config import settings; migrate(settings().database())",
)
PATIENCE = 60  # seconds within which everything a test waits for must happen

#: As many as the tables of a system that has been in use for some years.
LEGACY_BURNS = 2_000_000
LEGACY_USERS = 2_000

#: No writer may wait longer for the migration.
LONGEST_WAIT = 0.1  # seconds

POPULATE = """
    INSERT INTO account (user_id, balance) SELECT 'user-' || n, 1000000 + n / 7.0 FROM generate_series(1, {users}) n;
    ALTER TABLE burned_credit DROP CONSTRAINT pk_burned_credit; -- made again below: half the time
    INSERT INTO burned_credit (user_id, amount, action, created_at)
        SELECT 'user-' || u, n / 3.0, 'render ünï ' || n, '2019-12-31T23:59:59Z'::timestamptz + n * '1 s'::interval
        FROM generate_series(1, {users}) u, generate_series(1, {burns} / {users}) n;
    ALTER TABLE burned_credit ADD CONSTRAINT pk_burned_credit PRIMARY KEY (user_id, id);
    UPDATE global_token_balance SET balance = (SELECT sum(balance) FROM account)
"""

#: Every byte of every row of 0001, where it lies and which transaction wrote it.
OLD_ROWS = """
    SELECT 'account', ctid::text, xmin::text, (user_id, balance)::text FROM account
    UNION ALL SELECT 'burned_credit', ctid::text, xmin::text, (user_id, id, amount, action, created_at)::text
        FROM burned_credit
    UNION ALL SELECT 'global_token_balance', ctid::text, xmin::text, (id, balance)::text FROM global_token_balance
    UNION ALL SELECT relname, relfilenode::text, '', '' FROM pg_class
        WHERE relname ~ '^(pk_)?(account|burned_credit|global_token_balance)$'
    ORDER BY 1, 2
"""


def environment(url):
    return {**os.environ, "DATABASE_URL": url, "NO_COLOR": "1"}


def run(command, url, *arguments, cwd=ROOT):
    return subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=environment(url),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture
def tokentrail_migrate(monkeypatch, capsys):
    """The command, in this process: exit code, standard output, standard error."""

    def command(url, *arguments):
        monkeypatch.setenv("DATABASE_URL", url)
        monkeypatch.setattr(sys, "argv", ["tokentrail", "migrate", *arguments])
        settings.cache_clear()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return command


@contextmanager
def started(command, url):
    """A migrator as a process of its own; killed in the end if it has not ended by then."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def populated(url, users=20, burns=1_000):
    """A database before the trail, in use."""
    migrate(url, "0001")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(POPULATE.format(users=users, burns=burns))
    return url


def until(connection, condition):
    """Wait until a query answers true."""
    deadline = time.monotonic() + PATIENCE
    while connection.execute(condition).fetchone() != (True,):
        assert time.monotonic() < deadline, f"never came true: {condition}"
        time.sleep(0.01)


@contextmanager
def old_snapshot(url):
    """Somebody's long report: CREATE INDEX CONCURRENTLY waits for it to end, and nothing else does."""
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

#: The statements of 0002 that a migrator is killed at, before they do anything.
TO_DIE_AT = (
    "CREATE TABLE IF NOT EXISTS rejected_event%",
    "ALTER TABLE burned_credit%ADD COLUMN%",
    "%VALIDATE CONSTRAINT ck_account_sequence_not_negative",
    "CREATE UNIQUE INDEX CONCURRENTLY%",
    "CREATE OR REPLACE TRIGGER append_only%ON rejected_event%",
)


# Deploying


def test_deploying_says_from_which_revision_to_which_and_a_second_time_does_nothing(
    empty_database_url, tokentrail_migrate
):
    assert tokentrail_migrate(empty_database_url) == (0, "Migrated the schema from nothing to 0002.\n", "")
    assert tokentrail_migrate(empty_database_url) == (0, "The schema is at 0002 already: nothing to do.\n", "")


def test_deploying_over_a_newer_schema_leaves_it_as_it_is(database_url, tokentrail_migrate):
    _set_revision(database_url, "9999")
    code, output, _ = tokentrail_migrate(database_url)
    assert code == 0
    assert output.startswith("Left as it is: The schema is at 9999, newer than this code (0002)")


def test_a_failure_is_one_sentence_and_an_exit_code(empty_database_url, tokentrail_migrate):
    code, _, nowhere = tokentrail_migrate("postgresql://app@127.0.0.1:1/none")
    assert code == 1
    assert nowhere.startswith("tokentrail: PostgreSQL cannot be used (connection failed")
    assert nowhere.count("\n") == 1

    with psycopg.connect(empty_database_url) as connection:
        connection.execute("CREATE TABLE account (user_id text)")
    code, _, strangers = tokentrail_migrate(empty_database_url)
    assert code == 1
    assert strangers == (
        'tokentrail: relation "account" already exists, and no migration of ours made it: if these tables are '
        "the schema before the trail, say so with `tokentrail migrate stamp`, and migrate again.\n"
    )

    code, _, unusable = tokentrail_migrate("mysql://app@127.0.0.1/none")
    assert code == 2
    assert unusable.startswith("tokentrail: DATABASE_URL is not usable: must start with postgresql://")


def test_status_says_what_to_do_and_fails_when_there_is_something(empty_database_url, tokentrail_migrate):
    migrate(empty_database_url, "0001")
    sentence = "tokentrail: The schema is at 0001 and this code needs 0002: run `tokentrail migrate`.\n"
    assert tokentrail_migrate(empty_database_url, "status") == (1, "", sentence)
    migrate(empty_database_url)
    sentence = "The schema is at 0002, as this code needs it.\n"
    assert tokentrail_migrate(empty_database_url, "status") == (0, sentence, "")


def test_new_asks_for_a_database_at_the_newest_revision(empty_database_url, tokentrail_migrate):
    sentence = "tokentrail: The database has no schema yet: run `tokentrail migrate`.\n"
    assert tokentrail_migrate(empty_database_url, "new", "add_nickname") == (1, "", sentence)
    migrate(empty_database_url, "0001")
    sentence = "tokentrail: The schema is at 0001 and this code needs 0002: run `tokentrail migrate`.\n"
    assert tokentrail_migrate(empty_database_url, "new", "add_nickname") == (1, "", sentence)
    migrate(empty_database_url)
    _set_revision(empty_database_url, "9999")
    sentence = "tokentrail: The schema is at 9999, newer than this code (0002); deploy the newer code soon.\n"
    assert tokentrail_migrate(empty_database_url, "new", "add_nickname") == (1, "", sentence)


def test_new_writes_the_next_revision_from_the_models(database_url, tmp_path):
    for folder in ("migrations", "schema", "worker"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tables = tmp_path / "schema" / "tables.py"
    column = "    opening_balance: Mapped[Decimal | None]"
    assert column in tables.read_text()
    tables.write_text(tables.read_text().replace(column, f"    nickname: Mapped[str | None]\n{column}"))

    written = run(TOKENTRAIL, database_url, "new", "add_nickname", cwd=tmp_path)

    assert written.returncode == 0, written.stderr
    revision = (tmp_path / "migrations" / "versions" / "0003_add_nickname.py").read_text()
    assert revision.startswith('"""add nickname\n')
    assert "op.add_column('account', sa.Column('nickname', sa.Text(), nullable=True))" in revision
    assert "down_revision: str | None = '0002'" in revision
    assert run(TOKENTRAIL, database_url, cwd=tmp_path).stdout == "Migrated the schema from 0002 to 0003.\n"


# Under load


def test_upgrade_leaves_every_old_row_byte_for_byte_and_what_is_new_in_it_null(empty_database_url):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        before = connection.execute(OLD_ROWS).fetchall()
        migrate(empty_database_url)

        assert len(before) > 1_000
        assert connection.execute(OLD_ROWS).fetchall() == before
        new = {
            "account": "(opening_balance, head_hash, rejection_head, last_recorded_at) IS NULL "
            "AND (sequence, rejections) = (0, 0)",
            "burned_credit": "(sequence, balance_before, balance_after) IS NULL",
            "global_token_balance": "(issued, burned) IS NULL",
        }
        for table, untouched in new.items():
            assert connection.execute(f"SELECT bool_and({untouched}) FROM {table}").fetchone() == (True,)


class Writers:
    """The software of before the trail, at work: what it writes, what it is told, how long it waits for whom.

    It is asked of PostgreSQL, every few milliseconds, who waits for the migrator and since when, rather than
    measured how long an insert takes: on a busy machine any insert may be slow for reasons of its own.
    """

    def __init__(self, url):
        self.url = url
        self.written = 0
        self.longest = 0.0  # seconds waited for the migrator
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
            with psycopg.connect(self.url, autocommit=True, application_name="old writer") as connection:
                while not self._end.is_set():
                    job(connection, number)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test reports it
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
        # Whoever queues for a strong lock behind this for as long as it takes makes every writer wait as long.
        with connection.transaction():
            for table in ("account", "burned_credit"):
                connection.execute(f"SELECT count(*) FROM {table} WHERE user_id = %s", [f"user-{number}"])
            time.sleep(0.25)
        time.sleep(0.75)

    def _watch(self, connection, _):
        # statement_timestamp: the wait was at least that long, however late this process hears of it
        (waited,) = connection.execute("""
            SELECT max(extract(epoch FROM statement_timestamp() - l.waitstart))::float8
            FROM pg_locks l JOIN pg_stat_activity w USING (pid)
            WHERE NOT l.granted AND w.application_name = 'old writer' AND w.datname = current_database()
                AND pg_blocking_pids(l.pid) && ARRAY(SELECT pid FROM pg_stat_activity
                    WHERE application_name = 'tokentrail migrate' AND datname = current_database())
        """).fetchone()
        self.longest = max(self.longest, waited or 0.0)
        time.sleep(0.005)


def test_no_writer_waits_for_the_migration_of_two_million_burns(empty_database_url):
    populated(empty_database_url, LEGACY_USERS, LEGACY_BURNS)

    # What most would write, to see that this test would see it. Rolled back, so that the real one has all to do.
    with (
        Writers(empty_database_url) as behind_a_naive_one,
        psycopg.connect(empty_database_url, application_name="tokentrail migrate") as naive,
    ):
        naive.execute("ALTER TABLE burned_credit ADD COLUMN sequence bigint")
        naive.execute("ALTER TABLE burned_credit ADD CONSTRAINT positive CHECK (sequence > 0)")
        naive.execute("CREATE UNIQUE INDEX ON burned_credit (user_id, sequence) WHERE sequence IS NOT NULL")
        naive.rollback()
    assert behind_a_naive_one.errors == []
    assert behind_a_naive_one.longest > LONGEST_WAIT

    with Writers(empty_database_url) as writers:
        written_before = writers.written
        begun = time.monotonic()
        migrated = run(TOKENTRAIL, empty_database_url)
        took, written = time.monotonic() - begun, writers.written - written_before
    print(
        f"{LEGACY_BURNS:,} burns migrated in {took:.1f} s with {written:,} written meanwhile; "
        f"longest wait {writers.longest * 1000:.0f} ms, "
        f"behind a naive migration {behind_a_naive_one.longest * 1000:.0f} ms"
    )

    assert migrated.stdout == "Migrated the schema from 0001 to 0002.\n", migrated.stderr
    assert writers.errors == []
    assert written > 100
    assert writers.longest <= LONGEST_WAIT
    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute("SELECT count(*) FROM burned_credit").fetchone() == (
            LEGACY_BURNS + writers.written + behind_a_naive_one.written,
        )


# Killed, and two at once


@pytest.fixture
def clean(database_url):
    """What a database is made of that was migrated in one go."""
    with psycopg.connect(database_url) as connection:
        return catalog(connection)


def test_a_migration_killed_at_any_step_can_be_run_again(empty_database_url, clean):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        old_rows = connection.execute(OLD_ROWS).fetchall()
        # The migrator stops at a statement before it does anything, and waits there for its end.
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
        for statement in TO_DIE_AT:
            connection.execute(f"ALTER DATABASE {connection.info.dbname} SET test.stop_at = '{statement}'")
            with started(MIGRATE, empty_database_url) as process:
                until(connection, MIGRATOR_HAS_STOPPED)
                process.send_signal(signal.SIGKILL)
                assert process.wait(PATIENCE) == -signal.SIGKILL
            assert current_revision(connection) == "0001"
            # The server ends the dead migrator's statement by itself.
            until(connection, f"SELECT NOT ({MIGRATOR_HAS_STOPPED})")
        connection.execute("DROP EVENT TRIGGER stop")

        assert migrate(empty_database_url) == ["0002"]
        assert catalog(connection) == clean
        assert connection.execute(OLD_ROWS).fetchall() == old_rows


def test_an_index_left_invalid_by_a_killed_build_is_built_again(empty_database_url, clean):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        with old_snapshot(empty_database_url), started(MIGRATE, empty_database_url) as process:
            until(connection, MIGRATOR_BUILDS_AN_INDEX)
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
            # The server ends the build of the dead migrator by itself.
            until(connection, f"SELECT NOT ({MIGRATOR_BUILDS_AN_INDEX})")
        assert [line for line in catalog(connection, "index") if "INVALID" in line]

        migrate(empty_database_url)
        assert catalog(connection) == clean


def test_of_two_migrations_at_once_one_waits_and_says_so_and_both_succeed(empty_database_url, clean):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        with started(TOKENTRAIL, empty_database_url) as first, started(TOKENTRAIL, empty_database_url) as second:
            with old_snapshot(empty_database_url):
                until(connection, MIGRATOR_BUILDS_AN_INDEX)
                # Both have met: the second's attempts are on while the first builds its index.
                until(
                    connection,
                    "SELECT count(*) = 2 FROM pg_stat_activity WHERE application_name = 'tokentrail migrate' "
                    "AND datname = current_database()",
                )
                time.sleep(1.2)  # past deadlock_timeout: what waits inside a transaction would be shot by now
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


def test_a_table_that_is_being_vacuumed_is_migrated_all_the_same(empty_database_url):
    """An automatic vacuum gives way only to who has waited for a second, and no step of ours waits that long."""
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("""
            ALTER TABLE burned_credit SET (autovacuum_vacuum_insert_threshold = 0, autovacuum_vacuum_threshold = 0,
                autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)
        """)
        connection.execute("UPDATE burned_credit SET action = 'rendered'")
        connection.execute("ALTER SYSTEM SET autovacuum_naptime = '1s'")
        try:
            connection.execute("SELECT pg_reload_conf()")
            until(connection, IS_VACUUMED)
        finally:
            connection.execute("ALTER SYSTEM RESET autovacuum_naptime")
            connection.execute("SELECT pg_reload_conf()")

        migrate(empty_database_url)

        assert connection.execute(IS_VACUUMED).fetchone() == (False,)


# Back


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
def test_downgrade_refuses_to_drop_history_and_says_how_to(table, database_url, tokentrail_migrate):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(HISTORY[table])
        made_of = catalog(connection)

        sentence = (
            f"The downgrade would drop the audit trail, which holds rows ({table}); back up, then drop them for good"
            " with: tokentrail migrate downgrade --drop-history"
        )
        assert tokentrail_migrate(database_url, "downgrade") == (1, "", f"tokentrail: {sentence}\n")
        assert catalog(connection) == made_of
        assert current_revision(connection) == "0002"


def test_downgrade_told_to_drop_history_gives_the_old_software_its_one_balance_back(
    empty_database_url, tokentrail_migrate
):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        before, old_rows = catalog(connection), connection.execute(OLD_ROWS).fetchall()
        (balance,) = connection.execute("SELECT balance FROM global_token_balance").fetchone()
        migrate(empty_database_url)
        made_of = catalog(connection)
        for rows in HISTORY.values():
            connection.execute(rows)
        connection.execute("INSERT INTO global_token_balance (id, issued, burned) VALUES (1, 100, 30), (2, 0.5, 40)")

        said = "Took the schema back from 0002 to 0001. What the trail held is gone for good.\n"
        assert tokentrail_migrate(empty_database_url, "downgrade", "--drop-history") == (0, said, "")

        assert catalog(connection) == before
        assert connection.execute("SELECT id, balance - %s FROM global_token_balance", [balance]).fetchall() == [
            (0, 30.5)
        ]
        # What the old software had stays; the burns since are burns to it too.
        left = [row for row in connection.execute(OLD_ROWS) if row[0] != "global_token_balance"]
        assert set(left) > {row for row in old_rows if row[0] != "global_token_balance"}
        assert connection.execute("SELECT count(*) FROM burned_credit").fetchone() == (1_001,)

        migrate(empty_database_url)
        assert catalog(connection) == made_of
        connection.execute(HISTORY["dead_letter"])
        downgraded = run(ALEMBIC, empty_database_url, "-x", "drop-history", "downgrade", "0001")
        assert downgraded.returncode == 0, downgraded.stderr
        assert catalog(connection) == before


def test_an_empty_trail_is_downgraded_and_upgraded_again_without_a_trace(empty_database_url, tokentrail_migrate):
    populated(empty_database_url)
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        before = catalog(connection)
        migrate(empty_database_url)
        made_of = catalog(connection)
        said = "Took the schema back from 0002 to 0001. The trail held nothing.\n"
        assert tokentrail_migrate(empty_database_url, "downgrade") == (0, said, "")
        assert catalog(connection) == before
        said = "The schema is at 0001 already: nothing to do.\n"
        assert tokentrail_migrate(empty_database_url, "downgrade", "--drop-history") == (0, said, "")
        migrate(empty_database_url)
        assert catalog(connection) == made_of


def test_downgrade_takes_back_only_what_this_code_knows(empty_database_url, tokentrail_migrate):
    sentence = "tokentrail: The database has no schema yet: there is nothing to take back.\n"
    assert tokentrail_migrate(empty_database_url, "downgrade") == (1, "", sentence)
    migrate(empty_database_url)
    _set_revision(empty_database_url, "9999")
    sentence = "tokentrail: The schema is at 9999, newer than this code (0002): use the newer code.\n"
    assert tokentrail_migrate(empty_database_url, "downgrade", "--drop-history") == (1, "", sentence)


# Reviewed before it runs


def test_the_printed_sql_makes_the_same_database(empty_database_url, clean, requires_program):
    psql = requires_program("psql", path=f"{postgres_folder()}{os.pathsep}{os.environ['PATH']}")
    printed = run(TOKENTRAIL, empty_database_url, "--sql")
    assert (printed.returncode, printed.stderr) == (0, "")

    played = subprocess.run(
        [psql, "-qXv", "ON_ERROR_STOP=1", empty_database_url],
        input=printed.stdout,
        capture_output=True,
        text=True,
        check=False,
    )

    assert played.returncode == 0, played.stderr
    with psycopg.connect(empty_database_url) as connection:
        assert catalog(connection) == clean
        assert current_revision(connection) == known_revision()


def test_the_printed_downgrade_refuses_to_drop_history_too(database_url, requires_program):
    psql = requires_program("psql", path=f"{postgres_folder()}{os.pathsep}{os.environ['PATH']}")
    with psycopg.connect(database_url) as connection:
        connection.execute(HISTORY["dead_letter"])
    printed = run(ALEMBIC, database_url, "downgrade", "0002:0001", "--sql")

    played = subprocess.run(
        [psql, "-qXv", "ON_ERROR_STOP=1", database_url],
        input=printed.stdout,
        capture_output=True,
        text=True,
        check=False,
    )

    assert "which holds rows (dead_letter)" in played.stderr
    with psycopg.connect(database_url) as connection:
        assert current_revision(connection) == "0002"


def test_squawk_finds_no_unsafe_statement(database_url, requires_program, tmp_path):
    squawk = requires_program("squawk", path=str(Path(sys.executable).parent))
    migration = tmp_path / "migration.sql"
    migration.write_text(run(ALEMBIC, database_url, "upgrade", "head", "--sql").stdout)
    assert "CREATE TABLE" in migration.read_text()

    def findings():
        return subprocess.run(
            [squawk, "--config", ROOT / ".squawk.toml", "--reporter", "gcc", migration],
            capture_output=True,
            text=True,
            check=False,
        )

    found = findings()
    assert (found.returncode, found.stdout) == (0, "")

    migration.write_text(migration.read_text() + "CREATE INDEX ix ON burned_credit (action);")
    assert "require-concurrent-index-creation" in findings().stdout


def test_alembic_finds_no_difference_between_models_and_database(database_url):
    checked = run(ALEMBIC, database_url, "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


# Whether this code can work with that database


def test_a_worker_refuses_a_database_that_was_not_migrated(empty_database_url):
    with psycopg.connect(empty_database_url) as connection:
        assert current_revision(connection) is None
        with pytest.raises(SchemaError, match=r"no schema yet: run `tokentrail migrate`\.$"):
            check_schema(connection)


def test_a_new_worker_refuses_an_older_schema(empty_database_url):
    migrate(empty_database_url, "0001")
    with (
        psycopg.connect(empty_database_url) as connection,
        pytest.raises(
            SchemaError, match=r"^The schema is at 0001 and this code needs 0002: run `tokentrail migrate`\.$"
        ),
    ):
        check_schema(connection)


def test_an_old_worker_runs_on_a_newer_schema_with_a_warning(database_url):
    with psycopg.connect(database_url) as connection:
        assert check_schema(connection) is None
        _set_revision(database_url, "9999")
        assert (
            check_schema(connection)
            == "The schema is at 9999, newer than this code (0002); deploy the newer code soon."
        )


def test_a_database_of_another_application_is_not_taken_for_a_newer_schema(empty_database_url):
    with psycopg.connect(empty_database_url) as connection:
        connection.execute(
            "CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('ab12')"
        )
        with pytest.raises(SchemaError, match="names ab12, which is not a migration of tokentrail"):
            check_schema(connection)


def _set_revision(url, revision):
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = %s", [revision])
