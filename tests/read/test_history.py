"""The history as a reader of the database gets it: right, complete, and as cheap on its last page as on its first."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from decimal import Decimal

import psycopg
import pytest

from schema.canonical import read_json
from schema.events import parse_event
from worker.ledger.apply import apply_batch
from worker.ledger.deliveries import Delivery
from worker.ledger.outcomes import Applied
from worker.read.database import SESSION
from worker.read.history import RECORDS, TOTAL, read_history, read_history_now
from worker.read.supply import read_supply


@pytest.fixture
def connection(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(SESSION.replace("default_transaction_read_only = on", "default_transaction_read_only = off"))
        yield connection


def record(connection, *events, stripe=1):
    """Apply events that must all be applied."""
    outcomes = apply_batch(connection, [Delivery.of(parse_event(event)) for event in events], stripe=stripe)
    assert all(isinstance(outcome, Applied) for outcome in outcomes), outcomes


def accrual(user, amount, key, **more):
    return {"type": "accrual", "user_id": user, "amount": amount, "idempotency_key": key, "source": "payroll"} | more


def burn(user, amount, key, **more):
    return {"type": "burn", "user_id": user, "amount": amount, "idempotency_key": key, "action": "render"} | more


def record_many(connection, user, count):
    """`count` records of one user, accruals and burns in turns, as the ledger would have written them."""
    parameters = {"user": user, "count": count}
    # No foreign-key look-up for each row: that would be most of the test's time.
    connection.execute("SET session_replication_role = replica")
    connection.execute(
        """
        INSERT INTO transaction_record
        SELECT %(user)s, n, 'k' || n, CASE n %% 2 WHEN 1 THEN 'accrual' ELSE 'burn' END, 1, (n + 1) %% 2, n %% 2,
               '{"n":1}', NULL, now(), sha256('p'), sha256('h'), 1
        FROM generate_series(1, %(count)s) AS n
        """,
        parameters,
    )
    connection.execute(
        "INSERT INTO accrual_record SELECT %(user)s, n, 1, 'payroll', now() FROM generate_series(1, %(count)s, 2) AS n",
        parameters,
    )
    connection.execute(
        """
        INSERT INTO burned_credit (user_id, amount, action, sequence, balance_before, balance_after)
        SELECT %(user)s, 1, 'render', n, 1, 0 FROM generate_series(2, %(count)s, 2) AS n
        """,
        parameters,
    )
    connection.execute(
        """
        INSERT INTO account (user_id, balance, opening_balance, sequence, head_hash, last_recorded_at)
        VALUES (%(user)s, %(count)s %% 2, 0, %(count)s, sha256('h'), now())
        """,
        parameters,
    )
    connection.execute("RESET session_replication_role")


def numbers(history):
    return [transaction.sequence for transaction in history.transactions]


def test_history_is_newest_first_and_pages_neither_overlap_nor_leave_out(connection):
    record(connection, *(accrual("u", 1, f"k{n}") for n in range(1, 24)))

    pages = [read_history_now(connection, "u", page, 10) for page in (1, 2, 3, 4)]

    assert [numbers(page) for page in pages] == [
        [*range(23, 13, -1)],
        [*range(13, 3, -1)],
        [3, 2, 1],
        [],
    ]
    assert {(page.pagination.total, page.pagination.total_pages) for page in pages} == {(23, 3)}


@pytest.mark.parametrize(("total", "limit", "pages"), [(1, 10, 1), (10, 10, 1), (11, 10, 2), (20, 7, 3), (5, 1, 5)])
def test_history_counts_its_pages(connection, total, limit, pages):
    record(connection, *(accrual("u", 1, f"k{n}") for n in range(total)))
    assert read_history_now(connection, "u", 1, limit).pagination.total_pages == pages


def test_history_says_what_was_recorded_to_the_last_decimal_and_microsecond(connection):
    given = accrual(
        "u",
        "12345678901.123456789012345678",
        "k1",
        source="Gehälter ✓",
        occurred_at="2026-01-31T13:00:00.000001+01:00",
        metadata={"b": 1, "a": read_json("[0.1000000000000000000000000001, 1e2, null, true]")},
    )
    record(connection, given, burn("u", "0.000000000000000001", "k2"))

    newest, oldest = read_history_now(connection, "u", 1, 10).transactions

    assert oldest.amount == Decimal("12345678901.123456789012345678")
    assert (oldest.type, oldest.source, oldest.idempotency_key) == ("accrual", "Gehälter ✓", "k1")
    assert oldest.occurred_at == datetime(2026, 1, 31, 12, 0, 0, 1, tzinfo=UTC)
    assert oldest.metadata == '{"a":[0.1000000000000000000000000001,100,null,true],"b":1}'
    assert (newest.type, newest.action, newest.occurred_at, newest.metadata) == ("burn", "render", None, None)
    assert newest.balance_before == oldest.balance_after
    assert newest.balance_after == Decimal("12345678901.123456789012345677")
    assert newest.created_at >= oldest.created_at


def test_history_of_an_unknown_user_and_of_an_account_without_records_is_empty(connection):
    connection.execute("INSERT INTO account (user_id, balance) VALUES ('before the trail', 5)")
    connection.execute("INSERT INTO burned_credit (user_id, amount, action) VALUES ('before the trail', 1, 'old')")

    for user in ("nobody", "before the trail"):
        history = read_history_now(connection, user, 1, 10)
        assert history.transactions == []
        assert history.pagination.model_dump() == {"page": 1, "limit": 10, "total": 0, "total_pages": 0}


def test_history_leaves_out_burns_from_before_the_trail(connection):
    connection.execute("INSERT INTO account (user_id, balance) VALUES ('u', 5)")
    connection.execute("INSERT INTO burned_credit (user_id, amount, action) VALUES ('u', 1, 'old')")
    record(connection, burn("u", 2, "k"))

    history = read_history_now(connection, "u", 1, 10)

    assert [(t.sequence, t.balance_before, t.balance_after) for t in history.transactions] == [(1, 5, 3)]


def test_history_is_the_same_with_and_without_an_event_loop(connection, database_url):
    record(connection, *(accrual("u", n, f"k{n}") for n in range(1, 8)), burn("u", 3, "b"))

    async def read():
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
            return await read_history(other, "u", 2, 3)

    assert asyncio.run(read()) == read_history_now(connection, "u", 2, 3)


def test_history_page_far_behind_the_end_is_empty(connection):
    record(connection, accrual("u", 1, "k"))
    assert numbers(read_history_now(connection, "u", 10**90, 100)) == []


def plan(connection, statement, parameters):
    explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
    return connection.execute(explain, parameters).fetchone()[0][0]["Plan"]


def nodes(plan):
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def buffers(plan):
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


def page_numbers(user, total, page, limit):
    up_to = total - (page - 1) * limit
    return {"user_id": user, "up_to": up_to, "after": up_to - limit}


@pytest.mark.parametrize("analysed", [False, True])
def test_history_costs_on_page_100_000_what_it_costs_on_page_1(connection, analysed):
    """Never more than index look-ups: with fresh statistics, with none, and with old burns beside the new."""
    total = 100_001
    for table in ("account", "transaction_record", "accrual_record", "burned_credit"):
        connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
    connection.execute(
        "INSERT INTO burned_credit (user_id, amount, action) SELECT 'u', 1, 'old' FROM generate_series(1, 20000)"
    )
    record_many(connection, "u", total)
    record_many(connection, "v", 5_000)
    if analysed:
        connection.execute("ANALYZE")

    read = {}
    for page, limit in ((1, 1), (100_000, 1), (1, 10), (10_000, 10), (1, 100), (1_000, 100)):
        found = plan(connection, RECORDS, page_numbers("u", total, page, limit))
        assert found["Actual Rows"] == limit
        kinds = {node["Node Type"] for node in nodes(found)}
        assert kinds <= {"Index Scan", "Nested Loop", "Merge Join", "Materialize", "Memoize", "Sort"}, kinds
        for node in nodes(found):
            if node["Node Type"] == "Index Scan":
                assert node["Index Name"] in {
                    "pk_transaction_record",
                    "pk_accrual_record",
                    "uq_burned_credit_user_id_sequence",
                }
                assert node.get("Rows Removed by Filter", 0) == 0
        read[page, limit] = buffers(found)

    assert read[100_000, 1] <= read[1, 1] * 1.5 + 2
    assert read[10_000, 10] <= read[1, 10] * 1.5 + 2
    assert read[1_000, 100] <= read[1, 100] * 1.5 + 2
    assert read[1, 100] < 100 * 3 * 5  # a few pages a look-up, three look-ups a record

    found = plan(connection, TOTAL, ("u",))
    assert {node["Node Type"] for node in nodes(found)} <= {"Index Scan", "Index Only Scan"}
    print(f"buffers by (page, limit): {json.dumps({str(k): v for k, v in read.items()})}")


def test_supply_is_the_sum_of_the_stripes_with_what_was_there_before_kept_apart(connection):
    connection.execute("UPDATE global_token_balance SET balance = 1000.5")
    large = "900000000000.000000000000000001"
    connection.execute(
        "INSERT INTO global_token_balance (id, issued, burned) VALUES (98, 12345678901234567890123456789.5, 0.25)"
    )
    record(connection, accrual("u", large, "a"), burn("u", "0.000000000000000002", "b"), stripe=1)
    record(connection, accrual("v", 7, "a"), stripe=2)

    supply = read_supply(connection)

    assert supply.issued == Decimal("12345678901234568790123456796.500000000000000001")
    assert supply.burned == Decimal("0.250000000000000002")
    assert supply.circulating == Decimal("12345678901234568790123456796.249999999999999999")
    assert supply.legacy == Decimal("1000.5")


def test_supply_of_a_new_database_is_zero(connection):
    assert read_supply(connection) == (0, 0, 0, 0)
