"""A batch costs what it costs, however many records the tables and the user have, and whatever PostgreSQL believes."""

from __future__ import annotations

import psycopg
import pytest

from tests.kit.events import accrual, burn
from worker.ledger.settle import Ledger

from .support import as_forger, sent, settings_for

TABLES = ("transaction_record", "rejected_event", "burned_credit", "account")

#: Table → its key: every statement finds rows by the whole key.
BY_KEY = (
    "Index Scan using uq_transaction_record_user_id_idempotency_key on transaction_record t ",
    "Index Scan using uq_rejected_event_user_id_idempotency_key on rejected_event r ",
    "Index Scan using pk_transaction_record on transaction_record x ",  # the foreign keys
)


@pytest.fixture
def url(database_url):
    """A database of the test's own: its tables are filled and never vacuumed."""
    with psycopg.connect(database_url) as connection:
        for table in TABLES:
            connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
    return database_url


@pytest.fixture
def ledger(url):
    ledger = Ledger(settings_for(url), stripe=1)
    yield ledger
    ledger.close()


@pytest.fixture
def plans(ledger):
    """The plans of the statements that the ledger runs, and of their foreign keys, as auto_explain tells them."""
    connection = ledger.session.connection()
    try:
        connection.execute("LOAD 'auto_explain'")
    except psycopg.errors.UndefinedFile:
        pytest.skip("this PostgreSQL comes without auto_explain")
    found = []
    connection.add_notice_handler(lambda notice: found.append(notice.message_primary))
    connection.execute("SET auto_explain.log_min_duration = 0")
    connection.execute("SET auto_explain.log_nested_statements = on")
    connection.execute("SET client_min_messages = log")
    return found


def fill(connection, count, users):
    """So many users, and the records and rejections of them."""
    with as_forger(connection):
        connection.execute(
            f"""
            INSERT INTO transaction_record
            SELECT 'user' || n % {users}, n, 'k' || n, 'accrual', 1, 0, 1, NULL, NULL, now(),
                sha256('p'), sha256('h'), 1
            FROM generate_series(1, {count}) AS n;
            INSERT INTO rejected_event
            SELECT 'user' || n % {users}, n, 'r' || n, 'burn', 1, NULL, 'render', NULL, NULL, now(),
                'insufficient_tokens', 0, sha256('p'), sha256('h'), 1
            FROM generate_series(1, {count}) AS n;
            INSERT INTO account (user_id) SELECT 'user' || n FROM generate_series(1, {users}) AS n
            """
        )


def batch(name, users=1):
    for number in range(users):
        yield accrual(f"new{number}", 2, f"{name} a")
        yield burn(f"new{number}", 1, f"{name} b")
        yield burn(f"new{number}", 9, f"{name} c")


def assert_found_by_key(plans):
    scans = [line.partition("->")[2].strip() or line.strip() for plan in plans for line in plan.splitlines()]
    scans = [line for line in scans if "Scan" in line and " on " in line and "unnest" not in line]
    for expected in BY_KEY:
        assert any(scan.startswith(expected) for scan in scans), (expected, scans)
    for plan in plans:
        assert "Seq Scan on" not in plan, plan
        # A filter is what remains when an index did not find the row by itself.
        assert "Filter" not in plan.replace("Conflict Filter: (stripe.issued IS NOT NULL)", ""), plan


@pytest.mark.parametrize("users", [500, 20_000])
@pytest.mark.parametrize("analysed", [False, True])
def test_rows_are_found_by_their_whole_key_with_and_without_statistics(ledger, plans, owner, analysed, users):
    fill(owner, 20_000, users)
    if analysed:
        owner.execute("ANALYZE")
    for number in range(9):  # a foreign key's first plans are for one user each; then one is kept for all
        ledger.settle(sent(*batch(number)))
    for size in (1, 100):
        plans.clear()
        ledger.settle(sent(*batch(f"batch of {size}", size)))
        assert_found_by_key(plans)


@pytest.mark.parametrize("users", [500, 20_000])
@pytest.mark.parametrize("analysed", [False, True])
def test_a_plan_made_while_the_tables_were_empty_is_soon_forgotten(ledger, plans, owner, analysed, users):
    for number in range(20):  # PostgreSQL keeps a plan from the sixth use of a prepared statement
        ledger.settle(sent(*batch(number)))
    fill(owner, 20_000, users)
    if analysed:
        owner.execute("ANALYZE")
    for number in range(20, 33):
        plans.clear()
        ledger.settle(sent(*batch(number)))
    assert_found_by_key(plans)


def test_even_a_plan_kept_on_purpose_finds_rows_by_their_whole_key(ledger, plans, owner):
    ledger.session.connection().execute("SET plan_cache_mode = force_generic_plan")
    for number in range(20):
        ledger.settle(sent(*batch(number)))
    kept = "SELECT sum(generic_plans) FROM pg_prepared_statements WHERE statement LIKE '%JOIN rejected_event%'"
    assert ledger.session.connection().execute(kept).fetchone()[0] > 0
    fill(owner, 20_000, 20_000)
    for number in range(20, 33):
        plans.clear()
        ledger.settle(sent(*batch(number)))
    assert_found_by_key(plans)
