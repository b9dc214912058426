"""The tables: models and migrated database agree, and the database itself protects the audit trail."""

from __future__ import annotations

import secrets
from contextlib import contextmanager

import psycopg
import pytest
from sqlalchemy import create_engine, pool

from schema.tables import APPEND_ONLY, Base
from tests.kit.catalog import catalog

CHANGES = ("UPDATE {} SET user_id = user_id", "DELETE FROM {}", "TRUNCATE {} CASCADE")

#: What models declare; only migrations create triggers and functions.
OF_MODELS = ("column", "constraint", "index", "options")

DIFFERENCES = (
    "ALTER TABLE transaction_record DROP CONSTRAINT ck_transaction_record_balances_tie",
    "ALTER TABLE account DROP CONSTRAINT ck_account_balance_not_negative",
    """
    ALTER TABLE account DROP CONSTRAINT ck_account_sequence_not_negative;
    ALTER TABLE account ADD CONSTRAINT ck_account_sequence_not_negative CHECK (sequence >= -1)
    """,
    "ALTER TABLE burned_credit DROP CONSTRAINT fk_burned_credit_transaction_record",
    'ALTER TABLE rejected_event ALTER COLUMN idempotency_key TYPE text COLLATE "default"',
    "ALTER TABLE token_flow ALTER COLUMN issued TYPE numeric(38, 18)",
    "ALTER TABLE dead_letter ALTER COLUMN detail DROP NOT NULL",
    "CREATE INDEX ix_not_declared ON accrual_record (created_at)",
    "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'uq_burned_credit_user_id_sequence'::regclass",
    "ALTER TABLE account RESET (fillfactor)",
)


def declared(url):
    """The catalog of the models' tables, created in an empty database, so that PostgreSQL prints its CHECKs."""
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url), poolclass=pool.NullPool)
    Base.metadata.create_all(engine)
    with psycopg.connect(url) as connection:
        return catalog(connection, *OF_MODELS)


def migrated(connection):
    return [line for line in catalog(connection, *OF_MODELS) if "alembic_version" not in line]


@contextmanager
def plain_role(connection):
    """Switches the connection to a role with all privileges but ownership."""
    role = f"tokentrail_{secrets.token_hex(6)}"
    connection.execute(f"CREATE ROLE {role}")
    try:
        connection.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        connection.execute(f"SET ROLE {role}")
        yield
    finally:
        connection.execute("RESET ROLE")
        connection.execute(f"DROP OWNED BY {role}")
        connection.execute(f"DROP ROLE {role}")


def test_models_and_migrated_database_agree_in_every_column_check_key_and_index(database_url, empty_database_url):
    with psycopg.connect(database_url) as connection:
        assert migrated(connection) == declared(empty_database_url)


def test_the_comparison_of_models_and_database_sees_every_kind_of_difference(database_url, empty_database_url):
    expected = declared(empty_database_url)
    for change in DIFFERENCES:
        with psycopg.connect(database_url) as connection:
            connection.execute(change)
            assert migrated(connection) != expected, change
            connection.rollback()


def test_every_key_column_compares_byte_by_byte(database_url):
    with psycopg.connect(database_url) as connection:
        columns = catalog(connection, "column")
    keys = [line for line in columns if "| user_id |" in line or "| idempotency_key |" in line]
    assert len(keys) == 6 + 3
    assert all("| collation C |" in line for line in keys)


def test_every_audit_table_and_account_has_its_trigger_and_no_other_table_has(database_url):
    refuse = "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change() | enabled O"
    with psycopg.connect(database_url) as connection:
        assert catalog(connection, "trigger") == sorted(
            [
                f"trigger: CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON public.{table} {refuse}"
                for table in APPEND_ONLY
            ]
            + [f"trigger: CREATE TRIGGER keep_account BEFORE DELETE OR TRUNCATE ON public.account {refuse}"]
        )


@pytest.mark.parametrize("table", APPEND_ONLY)
def test_update_delete_and_truncate_of_an_audit_table_are_refused_to_every_role(table, database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (True,)
        _refuses(connection, table, CHANGES)
        with plain_role(connection):
            _refuses(connection, table, CHANGES)


def test_no_upsert_slips_past_the_trigger(database_url):
    with (
        psycopg.connect(database_url) as connection,
        pytest.raises(psycopg.errors.RestrictViolation, match="UPDATE of burned_credit refused"),
    ):
        connection.execute(
            "INSERT INTO burned_credit (user_id, amount, action) VALUES ('ada', 1, 'render') "
            "ON CONFLICT (user_id, id) DO UPDATE SET amount = 2"
        )


def test_delete_and_truncate_of_accounts_are_refused_to_every_role_and_update_is_not(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("INSERT INTO account (user_id) VALUES ('ada')")
        _refuses(connection, "account", CHANGES[1:])
        with plain_role(connection):
            _refuses(connection, "account", CHANGES[1:])
            connection.execute("UPDATE account SET balance = balance + 1")
        assert connection.execute("SELECT balance FROM account").fetchone() == (1,)


def _refuses(connection, table, changes):
    for change in changes:
        with pytest.raises(psycopg.errors.RestrictViolation) as refused:
            connection.execute(change.format(table))
        verb = change.split()[0]
        assert refused.value.diag.message_primary == f"{verb} of {table} refused: the audit trail is append-only"
        assert refused.value.diag.message_hint == "Correct a record with another event: tokentrail publish."
