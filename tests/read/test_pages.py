"""Pages of records and rejections, and the supply: complete, exact, and as cheap on the last page as on the first."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from schema.canonical import read_json
from tests.kit.events import accrual, burn
from worker.read.connection import SESSION
from worker.read.pages import RECORDS, REJECTIONS, read_page
from worker.read.supply import read_supply


@pytest.fixture
def history(read):
    return lambda user, page=1, limit=10, pages=RECORDS: read(
        read_page, pages=pages, user_id=user, page=page, limit=limit
    )


def numbers(page):
    return [transaction.sequence for transaction in page.transactions]


def test_pages_are_newest_first_and_neither_overlap_nor_leave_out(settle, history):
    settle(*(accrual("u", 1, f"k{n}") for n in range(1, 24)))

    pages = [history("u", page) for page in (1, 2, 3, 4, 10**90)]

    assert [numbers(page) for page in pages] == [[*range(23, 13, -1)], [*range(13, 3, -1)], [3, 2, 1], [], []]
    assert {(page.pagination.total, page.pagination.total_pages) for page in pages} == {(23, 3)}


@pytest.mark.parametrize(("total", "limit", "pages"), [(1, 10, 1), (10, 10, 1), (11, 10, 2), (20, 7, 3), (5, 1, 5)])
def test_number_of_pages(settle, history, total, limit, pages):
    settle(*(accrual("u", 1, f"k{n}") for n in range(total)))
    assert history("u", 1, limit).pagination.total_pages == pages


def test_record_is_exact_to_the_last_decimal_and_microsecond(settle, history):
    settle(
        accrual(
            "u",
            "12345678901.123456789012345678",
            "k1",
            source="Gehälter ✓",
            occurred_at="2026-01-31T13:00:00.000001+01:00",
            metadata={"b": 1, "a": read_json("[0.1000000000000000000000000001, 1e2, null, true]")},
        ),
        burn("u", "0.000000000000000001", "k2"),
    )

    newest, oldest = history("u").transactions

    assert oldest.amount == Decimal("12345678901.123456789012345678")
    assert (oldest.type, oldest.source, oldest.idempotency_key) == ("accrual", "Gehälter ✓", "k1")
    assert oldest.occurred_at == datetime(2026, 1, 31, 12, 0, 0, 1, tzinfo=UTC)
    assert oldest.metadata == '{"a":[0.1000000000000000000000000001,100,null,true],"b":1}'
    assert (newest.type, newest.action, newest.occurred_at, newest.metadata) == ("burn", "render", None, None)
    assert newest.balance_before == oldest.balance_after
    assert newest.balance_after == Decimal("12345678901.123456789012345677")
    assert newest.created_at >= oldest.created_at


def test_unknown_user_and_legacy_account_have_an_empty_history(connection, history):
    connection.execute("INSERT INTO account (user_id, balance) VALUES ('legacy', 5)")
    connection.execute("INSERT INTO burned_credit (user_id, amount, action) VALUES ('legacy', 1, 'old')")

    for user in ("nobody", "legacy"):
        for pages in (RECORDS, REJECTIONS):
            assert history(user, pages=pages).pagination.model_dump() == {
                "page": 1,
                "limit": 10,
                "total": 0,
                "total_pages": 0,
            }
        assert history(user).transactions == []


def test_legacy_burns_are_not_part_of_the_history(connection, settle, history):
    connection.execute("INSERT INTO account (user_id, balance) VALUES ('u', 5)")
    connection.execute("INSERT INTO burned_credit (user_id, amount, action) VALUES ('u', 1, 'old')")
    settle(burn("u", 2, "k"))
    assert [(t.sequence, t.balance_before, t.balance_after) for t in history("u").transactions] == [(1, 5, 3)]


def test_rejections_are_pages_by_number(settle, history):
    settle(accrual("u", 3, "a"), *(burn("u", 10 + n, f"b{n}") for n in range(23)))
    page = history("u", 2, pages=REJECTIONS)
    assert [rejection.number for rejection in page.rejections] == [*range(13, 3, -1)]
    assert (page.pagination.total, page.pagination.total_pages) == (23, 3)


def record_many(connection, user, count):
    """Insert `count` records of one user, accruals and burns in turns."""
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
def test_page_100_000_costs_what_page_1_costs(connection, analysed):
    """Index look-ups only: with fresh statistics, with none, and with legacy burns beside the new ones."""
    connection.execute(SESSION.replace("default_transaction_read_only = on", "default_transaction_read_only = off"))
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

    blocks = {}
    for page, limit in ((1, 1), (100_000, 1), (1, 10), (10_000, 10), (1, 100), (1_000, 100)):
        root = plan(connection, RECORDS.rows, page_numbers("u", total, page, limit))
        assert root["Actual Rows"] == limit
        kinds = {node["Node Type"] for node in nodes(root)}
        assert kinds <= {"Index Scan", "Nested Loop", "Merge Join", "Materialize", "Memoize", "Sort"}, kinds
        for node in nodes(root):
            if node["Node Type"] == "Index Scan":
                assert node["Index Name"] in {
                    "pk_transaction_record",
                    "pk_accrual_record",
                    "uq_burned_credit_user_id_sequence",
                }
                assert node.get("Rows Removed by Filter", 0) == 0
        blocks[page, limit] = buffers(root)

    assert blocks[100_000, 1] <= blocks[1, 1] * 1.5 + 2
    assert blocks[10_000, 10] <= blocks[1, 10] * 1.5 + 2
    assert blocks[1_000, 100] <= blocks[1, 100] * 1.5 + 2
    assert blocks[1, 100] < 100 * 3 * 5  # a few pages a look-up, three look-ups a record

    root = plan(connection, RECORDS.total, ("u",))
    assert {node["Node Type"] for node in nodes(root)} <= {"Index Scan", "Index Only Scan"}
    print(f"buffers by (page, limit): {json.dumps({str(k): v for k, v in blocks.items()})}")


def test_supply_is_the_sum_of_the_stripes_with_the_legacy_balance_kept_apart(connection, settle, read):
    connection.execute("UPDATE global_token_balance SET balance = 1000.5")
    connection.execute(
        "INSERT INTO global_token_balance (id, issued, burned) VALUES (98, 12345678901234567890123456789.5, 0.25)"
    )
    settle(accrual("u", "900000000000.000000000000000001", "a"), burn("u", "0.000000000000000002", "b"))
    settle(accrual("v", 7, "a"))

    supply = read(read_supply)

    assert supply.issued == Decimal("12345678901234568790123456796.500000000000000001")
    assert supply.burned == Decimal("0.250000000000000002")
    assert supply.circulating == Decimal("12345678901234568790123456796.249999999999999999")
    assert supply.legacy == Decimal("1000.5")


def test_supply_of_a_new_database_is_zero(read):
    assert read(read_supply) == (0, 0, 0, 0)
