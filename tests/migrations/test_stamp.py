"""`tokentrail migrate stamp`: adopts the legacy tables that other software created, or names the differences."""

from __future__ import annotations

from contextlib import closing

import psycopg
import pytest

from tests.conftest import _database as database
from tests.kit.catalog import catalog
from tests.kit.cli import assert_one_line
from tests.kit.events import accrual, burn
from worker.cli.adoption import differences
from worker.config import Settings
from worker.ledger.deliveries import Delivery
from worker.ledger.invariants import check
from worker.ledger.outcomes import Applied
from worker.ledger.settle import Ledger
from worker.migration import migrate

#: The legacy tables as other software may have created and used them, with names, columns and tables of its own.
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

#: Every value of them, its place on disk and the transaction that wrote it.
ROWS = """
    SELECT 'account', ctid::text, xmin::text, (email, balance, user_id, updated_at)::text FROM account
    UNION ALL SELECT 'burned_credit', ctid::text, xmin::text, (id, user_id, action, amount, created_at)::text
        FROM burned_credit
    UNION ALL SELECT 'global', ctid::text, xmin::text, (id, balance)::text FROM global_token_balance
    ORDER BY 1, 2
"""

STAMPED = "The tables are the legacy schema: stamped as 0001. Now run `tokentrail migrate`.\n"


def test_a_database_of_other_software_is_stamped_migrated_and_worked_on(empty_database_url, tokentrail):
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute(OTHER_SOFTWARE)
        before, rows = catalog(connection), connection.execute(ROWS).fetchall()

        assert tokentrail("migrate", "stamp", DATABASE_URL=empty_database_url) == (0, STAMPED, "")

        assert [line for line in catalog(connection) if "alembic_version" not in line] == before
        assert tokentrail("migrate") == (0, "Migrated the schema from 0001 to 0002.\n", "")
        assert connection.execute(ROWS).fetchall() == rows
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


def test_tables_equal_to_those_of_0001_become_what_our_migrations_create(empty_database_url, database_url, tokentrail):
    migrate(empty_database_url, "0001")
    with psycopg.connect(empty_database_url, autocommit=True) as connection, psycopg.connect(database_url) as ours:
        connection.execute("DROP TABLE alembic_version")
        assert tokentrail("migrate", "stamp", DATABASE_URL=empty_database_url) == (0, STAMPED, "")
        assert tokentrail("migrate").code == 0
        assert catalog(connection) == catalog(ours)


@pytest.fixture(scope="module")
def legacy(servers):
    """A database with the tables of revision 0001."""
    with database(servers.database_url) as url:
        migrate(url, "0001")
        yield url


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
            "burned_credit.created_at is timestamp(3) without time zone NOT NULL DEFAULT and must be timestamp with",
        ),
        (
            "ALTER TABLE burned_credit ALTER action TYPE varchar(50)",
            "burned_credit.action is character varying(50) NOT NULL and must be text NOT NULL",
        ),
        (
            "ALTER TABLE global_token_balance ALTER balance TYPE numeric(38, 2)",
            "global_token_balance.balance is numeric(38,2) NOT NULL DEFAULT 0 and must be numeric(38,18)",
        ),
        (
            'ALTER TABLE account ALTER user_id TYPE text COLLATE "POSIX"',
            'account.user_id is text NOT NULL and must be text COLLATE "C" NOT NULL',
        ),
        (
            "ALTER TABLE burned_credit ALTER user_id TYPE text",
            'burned_credit.user_id is text NOT NULL and must be text COLLATE "C" NOT NULL',
        ),
        (
            "ALTER TABLE account ALTER balance DROP NOT NULL",
            "account.balance is numeric(38,18) DEFAULT 0 and must be numeric(38,18) NOT NULL DEFAULT 0",
        ),
        (
            "ALTER TABLE account ALTER balance DROP DEFAULT",
            "account.balance is numeric(38,18) NOT NULL and must be numeric(38,18) NOT NULL DEFAULT 0",
        ),
        (
            "ALTER TABLE account ALTER balance SET DEFAULT 100",
            "account.balance is numeric(38,18) NOT NULL DEFAULT and must be numeric(38,18) NOT NULL DEFAULT 0",
        ),
        (
            "ALTER TABLE burned_credit ALTER id DROP IDENTITY",
            "burned_credit.id is bigint NOT NULL and must be bigint NOT NULL DEFAULT",
        ),
        (
            """ALTER TABLE burned_credit DROP created_at,
                ADD created_at timestamptz NOT NULL GENERATED ALWAYS AS ('2020-01-01Z'::timestamptz) STORED""",
            "burned_credit.created_at is timestamp with time zone NOT NULL GENERATED and must be",
        ),
        # Constraints
        (
            "ALTER TABLE burned_credit DROP CONSTRAINT pk_burned_credit, ADD PRIMARY KEY (id)",
            "burned_credit has no PRIMARY KEY (user_id, id)",
        ),
        ("ALTER TABLE account DROP CONSTRAINT pk_account", "account has no PRIMARY KEY (user_id)"),
        (
            "ALTER TABLE account DROP CONSTRAINT ck_account_balance_not_negative",
            "account has no CHECK ((balance >= (0)::numeric))",
        ),
        # The other software's own columns and tables, in conflict
        (
            "ALTER TABLE account ADD tenant integer NOT NULL",
            "account.tenant is NOT NULL and has no default, so workers could insert no row",
        ),
        (
            "ALTER TABLE account ADD sequence integer",
            "account has a column sequence already, which the audit trail adds",
        ),
        ("CREATE TABLE dead_letter (id integer)", "there is a table dead_letter already, which the audit trail adds"),
        # The legacy row
        ("DELETE FROM global_token_balance", "global_token_balance must hold one row, with an id from 0 up"),
        (
            "INSERT INTO global_token_balance (id) VALUES (1)",
            "global_token_balance must hold one row, with an id from 0 up",
        ),
        (
            "UPDATE global_token_balance SET id = -1",
            "global_token_balance must hold one row, with an id from 0 up",
        ),
    ],
)
def test_each_difference_from_the_legacy_schema_is_named(legacy, change, difference):
    with psycopg.connect(legacy) as connection:
        assert differences(connection) == []
        connection.execute(change)
        (found,) = differences(connection)
        assert found.startswith(difference)
        connection.rollback()


def test_stamp_names_all_differences_in_one_line_and_changes_nothing(empty_database_url, tokentrail):
    migrate(empty_database_url, "0001")
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("DROP TABLE alembic_version, burned_credit; ALTER TABLE account DROP balance")
        before = catalog(connection)
        result = tokentrail("migrate", "stamp", DATABASE_URL=empty_database_url)
        assert_one_line(result, 1, "account has no column balance", "there is no table burned_credit")
        assert catalog(connection) == before
