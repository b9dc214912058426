"""`tokentrail migrate stamp`: a database of other software is taken over as it is, or refused with what is wrong."""

from __future__ import annotations

import sys
from contextlib import closing
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.kit.catalog import catalog
from tests.kit.stage import accrual, burn
from worker.cli import main
from worker.cli.adoption import differences
from worker.config import Settings, settings
from worker.ledger.deliveries import Delivery
from worker.ledger.invariants import check
from worker.ledger.outcomes import Applied
from worker.ledger.settle import Ledger
from worker.schema_version import current_revision, migrate

#: What somebody else's migrations made, with names, columns and tables of their own, and what has become of it since.
OTHER_SOFTWARE = """
    CREATE TABLE account (
        email text UNIQUE,
        balance numeric(38, 18) DEFAULT '0' NOT NULL CHECK (balance >= 0),
        user_id text COLLATE "C" PRIMARY KEY,
        updated_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP
    );
    CREATE TABLE burned_credit (
        id bigserial,
        user_id text COLLATE "C" NOT NULL REFERENCES account,
        action text COLLATE "C" NOT NULL,
        amount numeric(38, 18) NOT NULL CONSTRAINT positive CHECK (amount > 0),
        created_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP,
        PRIMARY KEY (user_id, id)
    );
    CREATE INDEX burned_credit_action ON burned_credit (action);
    CREATE TABLE global_token_balance (id integer PRIMARY KEY, balance numeric(38, 18) NOT NULL DEFAULT 0.0);
    CREATE TABLE _their_migrations (name text);
    INSERT INTO account (email, balance, user_id) VALUES ('ann@example.org', 12.5, 'ann'), (NULL, 0, 'bob');
    INSERT INTO burned_credit (user_id, action, amount) SELECT 'ann', 'render', n / 3.0 FROM generate_series(1, 500) n;
    INSERT INTO global_token_balance VALUES (1, 12.5)
"""

#: Every old value, where it lies and which transaction wrote it.
THEIR_ROWS = """
    SELECT 'account', ctid::text, xmin::text, (email, balance, user_id, updated_at)::text FROM account
    UNION ALL SELECT 'burned_credit', ctid::text, xmin::text, (id, user_id, action, amount, created_at)::text
        FROM burned_credit
    UNION ALL SELECT 'global', ctid::text, xmin::text, (id, balance)::text FROM global_token_balance
    ORDER BY 1, 2
"""

NOTED = "The tables are those of before the trail: noted as 0001. Now run `tokentrail migrate`.\n"


@pytest.fixture
def tokentrail_migrate(monkeypatch, capsys):
    """`tokentrail_migrate(url, "stamp")`: exit code, standard output, standard error. None is no DATABASE_URL."""

    def command(url, *arguments):
        monkeypatch.delenv("DATABASE_URL", raising=False)
        if url is not None:
            monkeypatch.setenv("DATABASE_URL", url)
        monkeypatch.setattr(sys, "argv", ["tokentrail", "migrate", *arguments])
        settings.cache_clear()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return command


@pytest.fixture
def before(empty_database_url):
    """A database with the tables of 0001, of which no migration knows."""
    migrate(empty_database_url, "0001")
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("DROP TABLE alembic_version")
        yield connection


def test_a_database_of_other_software_is_stamped_migrated_and_worked_on(empty_database_url, tokentrail_migrate):
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute(OTHER_SOFTWARE)
        made_of, rows = catalog(connection), connection.execute(THEIR_ROWS).fetchall()

        assert tokentrail_migrate(empty_database_url, "stamp") == (0, NOTED, "")

        assert [line for line in catalog(connection) if "alembic_version" not in line] == made_of
        said = "Migrated the schema from 0001 to 0002.\n"
        assert tokentrail_migrate(empty_database_url) == (0, said, "")
        assert connection.execute(THEIR_ROWS).fetchall() == rows
        assert len(rows) == 503

        events = burn("ann", "2.5", "b"), accrual("bob", 4, "a"), accrual("new", 1, "a"), burn("new", 1, "b")
        with closing(Ledger(Settings(DATABASE_URL=empty_database_url), stripe=-1)) as ledger:
            outcomes = ledger.settle([Delivery.of(event) for event in events])
        assert [(type(each), each.balance_after) for each in outcomes] == [
            (Applied, 10),
            (Applied, 4),
            (Applied, 1),
            (Applied, 0),
        ]
        assert check(connection) == []


def test_the_tables_of_0001_made_by_other_hands_become_what_our_migrations_make(
    before, empty_database_url, database_url, tokentrail_migrate
):
    assert tokentrail_migrate(empty_database_url, "stamp") == (0, NOTED, "")
    assert tokentrail_migrate(empty_database_url)[0] == 0
    with psycopg.connect(database_url) as ours:
        assert catalog(before) == catalog(ours)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        # Tables
        ("DROP TABLE burned_credit", "there is no table burned_credit"),
        (
            "ALTER TABLE account RENAME TO holder; CREATE VIEW account AS SELECT * FROM holder",
            "account is no ordinary table",
        ),
        ("ALTER TABLE account SET UNLOGGED", "account is no ordinary table"),
        # Columns
        ("ALTER TABLE burned_credit DROP action", "burned_credit has no column action"),
        (
            "ALTER TABLE burned_credit ALTER created_at TYPE timestamp(3)",
            "burned_credit.created_at is timestamp(3) without time zone and not timestamp with time zone",
        ),
        (
            "ALTER TABLE burned_credit ALTER action TYPE varchar(50)",
            "burned_credit.action is character varying(50) and not text",
        ),
        (
            "ALTER TABLE global_token_balance ALTER balance TYPE numeric(38, 2)",
            "global_token_balance.balance is numeric(38,2) and not numeric(38,18)",
        ),
        (
            'ALTER TABLE account ALTER user_id TYPE text COLLATE "POSIX"',
            "account.user_id has the collation POSIX and not C",
        ),
        (
            "ALTER TABLE burned_credit ALTER user_id TYPE text",
            "burned_credit.user_id has the collation default and not C",
        ),
        ("ALTER TABLE account ALTER balance DROP NOT NULL", "account.balance may be NULL"),
        ("ALTER TABLE account ALTER balance DROP DEFAULT", "account.balance has no default"),
        ("ALTER TABLE account ALTER balance SET DEFAULT 100", "account.balance has the default 100 and not 0"),
        ("ALTER TABLE burned_credit ALTER id DROP IDENTITY", "burned_credit.id has no default"),
        (
            """ALTER TABLE burned_credit DROP created_at,
                ADD created_at timestamptz NOT NULL GENERATED ALWAYS AS ('2020-01-01Z'::timestamptz) STORED""",
            "burned_credit.created_at is generated",
        ),
        # Keys and rules
        (
            "ALTER TABLE burned_credit DROP CONSTRAINT pk_burned_credit, ADD PRIMARY KEY (id)",
            "burned_credit has no PRIMARY KEY (user_id, id)",
        ),
        ("ALTER TABLE account DROP CONSTRAINT pk_account", "account has no PRIMARY KEY (user_id)"),
        (
            "ALTER TABLE account DROP CONSTRAINT ck_account_balance_not_negative",
            "account has no CHECK ((balance >= (0)::numeric))",
        ),
        # What is theirs and in the way
        (
            "ALTER TABLE account ADD tenant integer NOT NULL",
            "account.tenant is NOT NULL and has no default, so that workers could insert no row",
        ),
        ("ALTER TABLE account ADD sequence integer", "account has a column sequence already, which the trail brings"),
        ("CREATE TABLE dead_letter (id integer)", "there is a table dead_letter already, which the trail brings"),
        # The balance of all
        ("DELETE FROM global_token_balance", "global_token_balance holds no row and not one"),
        (
            "INSERT INTO global_token_balance (id) VALUES (1)",
            "global_token_balance holds several rows and not one",
        ),
        (
            "UPDATE global_token_balance SET id = -1",
            "the row of global_token_balance has the id -1 and not one from 0 up",
        ),
    ],
)
def test_what_differs_from_the_tables_of_before_the_trail_is_named(before, empty_database_url, change, difference):
    assert differences(empty_database_url) == []
    before.execute(change)
    assert differences(empty_database_url) == [difference]


def test_stamp_names_all_that_differs_in_one_sentence_and_notes_nothing(before, empty_database_url, tokentrail_migrate):
    before.execute("DROP TABLE burned_credit; ALTER TABLE account ALTER balance TYPE double precision")
    made_of = catalog(before)
    sentence = (
        "These are not the tables of migrations/versions/0001_before_the_trail.py, so that nothing was noted:"
        " account.balance is double precision and not numeric(38,18); account has no CHECK ((balance >= (0)::numeric));"
        " there is no table burned_credit."
    )
    assert tokentrail_migrate(empty_database_url, "stamp") == (1, "", f"tokentrail: {sentence}\n")
    assert catalog(before) == made_of


def test_stamp_is_for_a_database_that_no_migration_knows(empty_database_url, tokentrail_migrate):
    sentence = "The database has no tables of before the trail: a new one needs no stamp, only `tokentrail migrate`."
    assert tokentrail_migrate(empty_database_url, "stamp") == (1, "", f"tokentrail: {sentence}\n")
    for revision in ("0001", "0002"):
        migrate(empty_database_url, revision)
        sentence = f"The schema is at {revision} already: there is nothing to note."
        assert tokentrail_migrate(empty_database_url, "stamp") == (1, "", f"tokentrail: {sentence}\n")
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("DROP TABLE transaction_record CASCADE; UPDATE alembic_version SET version_num = 'ab12'")
    code, _, sentence = tokentrail_migrate(empty_database_url, "stamp")
    assert code == 1
    assert sentence.startswith("tokentrail: The database's alembic_version names ab12, which is not a migration of")


@pytest.mark.parametrize("command", ["stamp", "downgrade", "new"])
def test_without_the_database_or_its_password_it_is_one_sentence(
    before, empty_database_url, tokentrail_migrate, command
):
    arguments = (command, "add_nickname") if command == "new" else (command,)
    sentence = "No database: set DATABASE_URL, or start the embedded servers with `tokentrail up`."
    assert tokentrail_migrate(None, *arguments) == (2, "", f"tokentrail: {sentence}\n")

    address = urlsplit(empty_database_url)
    wrong = address._replace(netloc=f"{address.username}:hush@{address.hostname}:{address.port}").geturl()
    code, _, sentence = tokentrail_migrate(wrong, *arguments)
    assert code == 1
    assert sentence.startswith("tokentrail: PostgreSQL cannot be used (")
    assert "password authentication failed" in sentence
    assert sentence.count("\n") == 1
    assert current_revision(before) is None
