"""Each invariant can fail: a change outside the ledger breaks exactly the invariant about it."""

from __future__ import annotations

from datetime import timedelta

import psycopg
import pytest

from tests.kit.events import accrual, burn
from worker.ledger.apply import apply_batch
from worker.ledger.chain import RECORD_FORM, REJECTION_FORM
from worker.ledger.invariants import INVARIANTS, check

from .support import NOON, as_forger, assert_books_balance, broken, empty, sent

BALANCE = "a balance is its opening balance plus the sum of its records"
NUMBERED = "an account's records are numbered 1, 2, 3 … without a gap, and its sequence counts them"
REJECTIONS_NUMBERED = "an account's rejections are numbered 1, 2, 3 … without a gap, and counted"
BEGINS = "a record begins with the balance its predecessor ended with, the first one with the opening balance"
ENDS = "a record ends with its beginning plus or minus its amount, which is positive, and never below zero"
NOT_NEGATIVE = "no balance is below zero"
TIMES = "times never run backwards along an account's records"
REJECTION_TIMES = "times never run backwards along an account's rejections"
LAST_MOMENT = "an account's last moment is that of its latest record or rejection"
ACCRUALS = "every accrual has one accrual record that says the same, and there is no other"
BURNS = "every burn has one burned credit that says the same, and there is no other since the trail began"
ONE_ANSWER = "no key was both applied and rejected"
TRUE_REASON = "a rejection's reason is true of the balance it met"
HASH = "a record's hash is that of its content and its predecessor's hash"
REJECTION_HASH = "a rejection's hash is that of its content and its predecessor's hash"
PAYLOAD = "a record's payload hash is that of its event"
REJECTION_PAYLOAD = "a rejection's payload hash is that of its event"
HEAD = "an account's head is the hash of its last record"
REJECTION_HEAD = "an account's rejection head is the hash of its last rejection"
SUPPLY = "issued − burned of the stripes is what the balances grew by, and the sum of all records"
STRIPES = "the hours of a stripe add up to the stripe"
HOURS = "an hour's flow is the sum and the number of its records and rejections"
GUARDED = "the database refuses changes of the audit trail"

#: A forger who knows how the chains are made: every hash from the first on, and the heads.
CHAIN_AGAIN = f"""
DO $$
DECLARE
    u record; n record; previous bytea; made bytea;
BEGIN
    FOR u IN SELECT user_id FROM account LOOP
        previous := NULL;
        FOR n IN SELECT sequence FROM transaction_record WHERE user_id = u.user_id ORDER BY 1 LOOP
            SELECT {RECORD_FORM} INTO made FROM transaction_record r
                LEFT JOIN accrual_record a ON a.user_id = r.user_id AND a.sequence = r.sequence
                LEFT JOIN burned_credit b ON b.user_id = r.user_id AND b.sequence = r.sequence
                WHERE r.user_id = u.user_id AND r.sequence = n.sequence;
            UPDATE transaction_record SET hash = made WHERE user_id = u.user_id AND sequence = n.sequence;
            previous := made;
        END LOOP;
        UPDATE account SET head_hash = previous WHERE user_id = u.user_id;
        previous := NULL;
        FOR n IN SELECT number FROM rejected_event WHERE user_id = u.user_id ORDER BY 1 LOOP
            SELECT {REJECTION_FORM} INTO made FROM rejected_event r
                WHERE r.user_id = u.user_id AND r.number = n.number;
            UPDATE rejected_event SET hash = made WHERE user_id = u.user_id AND number = n.number;
            previous := made;
        END LOOP;
        UPDATE account SET rejection_head = previous WHERE user_id = u.user_id;
    END LOOP;
END $$
"""


def two_users(connection):
    """Two users with three records and two rejections each, over three hours, and an old account without any."""
    connection.execute(
        "INSERT INTO account (user_id, balance) VALUES ('ann', 5), ('old', 7);"
        "INSERT INTO burned_credit (user_id, amount, action) VALUES ('ann', 3, 'legacy')"
    )
    for user in ("ann", "bob"):
        steps = [
            accrual(user, 10, "k1", metadata={"n": 1}),
            burn(user, 99, "r1"),
            burn(user, 4, "k2", occurred_at="2026-01-01T00:00:00Z"),
            accrual(user, 1, "k3"),
            burn(user, 100, "r2", metadata={"why": "not"}),
        ]
        for hour, step in enumerate(steps):
            clock = NOON + timedelta(hours=hour // 2)
            apply_batch(connection, sent(step), stripe=1 + hour % 2, clock=clock)
    assert_books_balance(connection)


@pytest.fixture
def books(connection):
    """Those of two users; whatever a forger does to them is undone after the test, constraints included."""
    two_users(connection)
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with connection.transaction(force_rollback=True):
        yield connection


def forge(connection, *statements, chain_again=False):
    for table, constraint in (
        ("transaction_record", "ck_transaction_record_balances_tie"),
        ("transaction_record", "ck_transaction_record_balance_not_negative"),
        ("burned_credit", "ck_burned_credit_balances_tie"),
        ("account", "ck_account_balance_not_negative"),
    ):
        connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {constraint}")
    with as_forger(connection):
        for statement in statements:
            connection.execute(statement)
        if chain_again:
            connection.execute(CHAIN_AGAIN)


#: What is done behind the ledger's back → the sentences that it breaks.
PLAIN = {
    "UPDATE account SET balance = balance + CASE user_id WHEN 'ann' THEN 1 ELSE -1 END WHERE sequence > 0": {BALANCE},
    "UPDATE account SET balance = balance + 1 WHERE user_id = 'ann'": {BALANCE, SUPPLY},
    "UPDATE account SET sequence = 4 WHERE user_id = 'ann'": {NUMBERED},
    "UPDATE account SET rejections = 1 WHERE user_id = 'ann'": {REJECTIONS_NUMBERED},
    "UPDATE account SET balance = -1 WHERE user_id = 'old'": {NOT_NEGATIVE},
    "UPDATE account SET last_recorded_at = last_recorded_at + '1s' WHERE user_id = 'bob'": {LAST_MOMENT},
    "UPDATE accrual_record SET amount = 11 WHERE user_id = 'ann' AND sequence = 1": {ACCRUALS},
    "UPDATE accrual_record SET created_at = created_at + '1us' WHERE user_id = 'ann' AND sequence = 1": {ACCRUALS},
    "INSERT INTO accrual_record VALUES ('ann', 2, 4, 'out of thin air', now())": {ACCRUALS},
    "DELETE FROM accrual_record WHERE user_id = 'ann' AND sequence = 3": {ACCRUALS, HASH, PAYLOAD},
    "UPDATE burned_credit SET amount = 5 WHERE user_id = 'ann' AND sequence = 2": {BURNS},
    "UPDATE burned_credit SET balance_after = 0 WHERE user_id = 'ann' AND sequence = 2": {BURNS},
    "UPDATE burned_credit SET sequence = 9 WHERE user_id = 'ann' AND sequence = 2": {BURNS, HASH, PAYLOAD},
    "UPDATE transaction_record SET hash = sha256('x') WHERE (user_id, sequence) = ('ann', 2)": {HASH},
    "UPDATE transaction_record SET hash = sha256('x') WHERE (user_id, sequence) = ('ann', 3)": {HASH, HEAD},
    "UPDATE transaction_record SET hash_version = 2 WHERE (user_id, sequence) = ('ann', 3)": {HASH},
    "UPDATE transaction_record SET idempotency_key = 'k9' WHERE (user_id, sequence) = ('ann', 3)": {HASH},
    "UPDATE transaction_record SET metadata = '{\"n\":2}' WHERE (user_id, sequence) = ('ann', 1)": {HASH, PAYLOAD},
    "UPDATE transaction_record SET metadata = '{\"n\": 1}' WHERE (user_id, sequence) = ('ann', 1)": {HASH, PAYLOAD},
    "UPDATE accrual_record SET source = 'gift' WHERE (user_id, sequence) = ('ann', 1)": {HASH, PAYLOAD},
    "UPDATE rejected_event SET hash = sha256('x') WHERE (user_id, number) = ('ann', 1)": {REJECTION_HASH},
    "UPDATE rejected_event SET action = 'x' WHERE (user_id, number) = ('ann', 1)": {REJECTION_HASH, REJECTION_PAYLOAD},
    "UPDATE account SET head_hash = sha256('x') WHERE user_id = 'ann'": {HEAD},
    "UPDATE account SET rejection_head = sha256('x') WHERE user_id = 'ann'": {REJECTION_HEAD},
    "UPDATE global_token_balance SET issued = issued + 1 WHERE id = 1": {SUPPLY, STRIPES},
    "UPDATE global_token_balance SET issued = issued + 1, burned = burned + 1 WHERE id = 1": {STRIPES},
    "INSERT INTO global_token_balance (id, issued, burned) VALUES (7, 1, 1)": {STRIPES},
    "UPDATE token_flow SET accruals = accruals + 1 WHERE stripe = 1": {HOURS},
    "UPDATE token_flow SET rejections = 0": {HOURS},
    "UPDATE token_flow SET hour = hour + interval '9 hours' WHERE stripe = 1": {HOURS},
    "DELETE FROM token_flow WHERE stripe = 2": {HOURS, STRIPES},
    "ALTER TABLE rejected_event DISABLE TRIGGER append_only": {GUARDED},
    "DROP TRIGGER keep_account ON account": {GUARDED},
    "ALTER TABLE burned_credit ENABLE REPLICA TRIGGER append_only": {GUARDED},
}

#: The same by a forger who also recomputes the chains.
CHAINED = {
    "UPDATE transaction_record SET balance_before = balance_before + 1, balance_after = balance_after + 1"
    " WHERE (user_id, sequence) = ('ann', 1)": {BEGINS},
    "UPDATE account SET opening_balance = 4, balance = balance - 1 WHERE user_id = 'ann'": {BEGINS},
    "UPDATE transaction_record SET balance_after = balance_after + 1 WHERE (user_id, sequence) = ('ann', 3)": {ENDS},
    "UPDATE transaction_record SET created_at = created_at - interval '1 microsecond'"
    " WHERE (user_id, sequence) = ('ann', 1)": {ACCRUALS},
    "UPDATE rejected_event SET idempotency_key = 'k1' WHERE (user_id, number) = ('ann', 1)": {ONE_ANSWER},
    "UPDATE rejected_event SET reason = 'balance_limit' WHERE (user_id, number) = ('ann', 1)": {TRUE_REASON},
    "UPDATE rejected_event SET balance = 99 WHERE (user_id, number) = ('ann', 1)": {TRUE_REASON},
    "UPDATE transaction_record SET payload_hash = sha256('x') WHERE (user_id, sequence) = ('ann', 1)": {PAYLOAD},
    "UPDATE rejected_event SET payload_hash = sha256('x') WHERE (user_id, number) = ('ann', 1)": {REJECTION_PAYLOAD},
    "UPDATE transaction_record SET occurred_at = NULL WHERE (user_id, sequence) = ('ann', 2)": {PAYLOAD},
    "UPDATE transaction_record SET sequence = 4 WHERE (user_id, sequence) = ('ann', 3);"
    "UPDATE accrual_record SET sequence = 4 WHERE (user_id, sequence) = ('ann', 3)": {NUMBERED},
    "UPDATE rejected_event SET number = 3 WHERE (user_id, number) = ('ann', 2)": {REJECTIONS_NUMBERED},
}


@pytest.mark.parametrize(("statement", "sentences"), PLAIN.items())
def test_what_is_changed_behind_the_ledgers_back_breaks_the_sentence_about_it(books, statement, sentences):
    forge(books, statement)
    assert broken(books) == sentences


@pytest.mark.parametrize(("statement", "sentences"), CHAINED.items())
def test_a_forger_who_recomputes_the_chains_is_found_too(books, statement, sentences):
    forge(books, *statement.split(";"), chain_again=True)
    assert broken(books) == sentences


def test_a_dropped_record_is_missed_even_from_the_end(books):
    forge(
        books,
        "DELETE FROM accrual_record WHERE (user_id, sequence) = ('ann', 3)",
        "DELETE FROM transaction_record WHERE (user_id, sequence) = ('ann', 3)",
        chain_again=True,
    )
    assert broken(books) >= {NUMBERED, BALANCE, SUPPLY, HOURS}


def test_a_deleted_account_is_missed(books):
    forge(books, "DELETE FROM account WHERE user_id = 'ann'")
    assert broken(books) >= {NUMBERED, REJECTIONS_NUMBERED, BALANCE, HEAD}


def test_times_that_run_backwards_are_found(books):
    # Within an hour of each other, so that no flow changes; the latest stays the latest.
    minutes = "UPDATE {0} SET created_at = %s + {1} * interval '1 minute' WHERE user_id = 'ann'"
    with as_forger(books):
        for table in ("transaction_record", "accrual_record", "rejected_event"):
            number = "number" if table == "rejected_event" else "sequence"
            books.execute(minutes.format(table, number), (NOON,))
        books.execute(minutes.format("burned_credit", "sequence") + " AND sequence > 0", (NOON,))
        books.execute("UPDATE account SET last_recorded_at = %s WHERE user_id = 'ann'", (NOON + timedelta(minutes=3),))
        books.execute(CHAIN_AGAIN)
    assert broken(books) == {HOURS}

    swapped = """
        UPDATE {0} t SET created_at = o.created_at FROM {0} o
        WHERE t.user_id = 'ann' AND o.user_id = 'ann' AND t.{1} + o.{1} = {2} AND t.{1} <> o.{1}
    """
    with as_forger(books):
        books.execute(swapped.format("rejected_event", "number", 3))
        books.execute(CHAIN_AGAIN)
    assert broken(books) == {HOURS, REJECTION_TIMES}
    with as_forger(books):
        books.execute(swapped.format("transaction_record", "sequence", 4))
        books.execute(swapped.format("accrual_record", "sequence", 4))
        books.execute(CHAIN_AGAIN)
    assert broken(books) == {HOURS, REJECTION_TIMES, TIMES}


def test_every_invariant_is_seen_to_fail_here():
    seen = set().union(*PLAIN.values(), *CHAINED.values()) | {TIMES, REJECTION_TIMES}
    assert seen == INVARIANTS.keys()


def test_a_check_shows_the_first_rows_that_break_a_sentence(books):
    with as_forger(books):
        books.execute("UPDATE account SET head_hash = sha256('x') WHERE sequence > 0")
    [found] = check(books, limit=1)
    assert found.sentence == HEAD
    [row] = found.rows
    assert row["user_id"] in {"ann", "bob"}
    assert {"head_hash", "last"} < row.keys()
    [found] = check(books, limit=10)
    assert len(found.rows) == 2


def test_a_check_sees_one_moment_and_stops_nobody(connection, owner, background):
    """Batches go on while all is checked: nothing half-done is seen, nobody waits."""
    two_users(connection)
    done = background(
        lambda: [
            apply_batch(connection, sent(accrual("ann", 1, f"w{n}"), burn("bob", 1000, f"w{n}")), stripe=3)
            for n in range(150)
        ]
    )
    checks = 0
    while not done.done():
        assert check(owner) == []
        checks += 1
    assert checks > 0
    assert len(done.result()) == 150
    assert_books_balance(owner)


def test_empty_books_balance(connection):
    empty(connection)
    assert_books_balance(connection)
