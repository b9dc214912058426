"""Receipts and rejections over HTTP: what became of an event, and what an account was refused."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime

import pytest

from tests.kit.events import accrual, burn
from tests.read.test_api import assert_problem, schema_of
from worker.ledger.dead_letters import NewDeadLetter
from worker.ledger.deliveries import Origin
from worker.read.connection import SESSION
from worker.read.pages import REJECTIONS
from worker.read.receipts import APPLIED, DEAD_LETTERED, REJECTED

RECEIPTS = "/api/account/receipts"
REJECTIONS_PATH = "/api/account/rejections"


@pytest.fixture
def refuse(ledger):
    """Write a dead letter for the event."""
    return lambda event, message_id="m": ledger.settle(
        [], [NewDeadLetter.of_event("expired", "It is too late.", event, Origin("tokens.accrue", message_id))]
    )


def ask(client, user, *keys, **more):
    answer = client.get(RECEIPTS, params={"userId": user, "idempotencyKey": list(keys)} | more)
    assert answer.status_code == 200, answer.text
    schema_of(client, RECEIPTS).validate(answer.json())
    return answer.json()["receipts"]


def statuses(receipts):
    return [receipt["status"] for receipt in receipts]


def test_receipts_say_what_became_of_each_key_in_the_order_of_the_keys(client, settle, refuse):
    settle(accrual("ann", "1.5", "a", metadata={"n": 1}), burn("ann", 9, "b"), burn("ann", "0.5", "c"))
    refuse(accrual("ann", 7, "d"))

    applied, unknown, rejected, letter, burned = ask(client, "ann", "a", "x", "b", "d", "c")

    created = applied["transaction"].pop("createdAt")
    assert datetime.fromisoformat(created).tzinfo == UTC
    assert applied == {
        "userId": "ann",
        "idempotencyKey": "a",
        "status": "applied",
        "transaction": {
            "userId": "ann",
            "sequence": 1,
            "type": "accrual",
            "amount": "1.5",
            "balanceBefore": "0",
            "balanceAfter": "1.5",
            "metadata": {"n": 1},
            "idempotencyKey": "a",
            "occurredAt": None,
            "source": "payroll",
        },
    }
    assert (burned["status"], burned["transaction"]["action"]) == ("applied", "render")
    del rejected["createdAt"]
    assert rejected == {
        "userId": "ann",
        "idempotencyKey": "b",
        "status": "rejected",
        "reason": "insufficient_tokens",
        "balance": "1.5",
        "number": 1,
    }
    del letter["lastSeenAt"]
    assert letter == {
        "userId": "ann",
        "idempotencyKey": "d",
        "status": "dead_lettered",
        "reason": "expired",
        "detail": "It is too late.",
        "state": "open",
        "deadLetter": 1,
    }
    assert unknown["status"] == "unknown"
    assert "may still be queued" in unknown["detail"]


def test_receipts_of_another_user_are_unknown(client, settle):
    settle(accrual("ann", 1, "a"))
    assert statuses(ask(client, "bob", "a")) == ["unknown"]


def test_receipts_answer_a_hundred_keys_at_once_and_a_key_given_twice_once(client, settle):
    settle(*(accrual("ann", 1, f"k {n} ü&=") for n in range(50)))
    receipts = ask(client, "ann", *(f"k {n} ü&=" for n in range(100)))
    assert statuses(receipts) == ["applied"] * 50 + ["unknown"] * 50
    assert statuses(ask(client, "ann", "k 1 ü&=", "k 1 ü&=")) == ["applied"]


def test_outcome_has_precedence_over_a_dead_letter_and_a_replay_says_nothing_yet(client, settle, refuse, connection):
    refuse(accrual("ann", 1, "a"))
    assert statuses(ask(client, "ann", "a")) == ["dead_lettered"]
    close = "UPDATE dead_letter SET state = %s, state_changed_at = now(), state_changed_by = 'x' WHERE id = %s"
    connection.execute(close, ("replayed", 1))
    assert statuses(ask(client, "ann", "a")) == ["unknown"]
    refuse(accrual("ann", 2, "a"), message_id="another")
    assert statuses(ask(client, "ann", "a")) == ["dead_lettered"]
    connection.execute(close, ("discarded", 2))
    assert ask(client, "ann", "a")[0]["state"] == "discarded"
    settle(accrual("ann", 3, "a"))
    assert statuses(ask(client, "ann", "a")) == ["applied"]


def test_receipt_of_a_rejection_stays_after_the_balance_has_grown(client, settle):
    settle(burn("ann", 5, "b"))
    settle(accrual("ann", 100, "a"))
    (outcome,) = settle(burn("ann", 5, "b"))
    assert outcome.repeated
    (receipt,) = ask(client, "ann", "b")
    assert (receipt["status"], receipt["balance"]) == ("rejected", "0")


def test_wait_answers_as_soon_as_the_first_key_is_decided(client, settle):
    settle(accrual("ann", 1, "known"))
    assert statuses(ask(client, "ann", "x", "known", wait=10)) == ["unknown", "applied"]

    began = threading.Event()

    def decide():
        began.wait()
        time.sleep(0.3)
        settle(accrual("ann", 1, "late"))

    thread = threading.Thread(target=decide)
    thread.start()
    began.set()
    started = time.monotonic()
    assert statuses(ask(client, "ann", "later", "late", wait=10)) == ["unknown", "applied"]
    assert 0.2 < time.monotonic() - started < 9  # it waited, and not to the end
    thread.join()


def test_wait_ends_with_what_is_known(client):
    started = time.monotonic()
    assert statuses(ask(client, "ann", "a", wait=1)) == ["unknown"]
    assert time.monotonic() - started >= 1


def test_waiting_readers_hold_no_connection(client, settle):
    """Four times as many readers wait as the pool has connections."""
    waiting = [threading.Thread(target=ask, args=(client, "ann", f"never {n}"), kwargs={"wait": 3}) for n in range(40)]
    for thread in waiting:
        thread.start()
    settle(accrual("ann", 1, "a"))
    assert statuses(ask(client, "ann", "a")) == ["applied"]
    assert any(thread.is_alive() for thread in waiting)
    for thread in waiting:
        thread.join()


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("", "userId"),
        ("userId=u", "idempotencyKey"),
        ("idempotencyKey=k", "userId"),
        ("userId=u&idempotencyKey=", "idempotencyKey"),
        ("userId=u&idempotencyKey=a&idempotencyKey=", "idempotencyKey"),
        (f"userId=u&idempotencyKey={'x' * 201}", "idempotencyKey"),
        ("userId=u&idempotencyKey=a%00", "idempotencyKey"),
        ("userId=u&idempotencyKey=%FF", "idempotencyKey"),
        ("userId=u&" + "&".join(f"idempotencyKey={n}" for n in range(101)), "idempotencyKey"),
        ("userId=u&userId=u&idempotencyKey=k", "userId"),
        ("userId=u&idempotencyKey=k&wait=11", "wait"),
        ("userId=u&idempotencyKey=k&wait=-1", "wait"),
        ("userId=u&idempotencyKey=k&wait=0.5", "wait"),
        ("userId=u&idempotencyKey=k&wait=1&wait=1", "wait"),
        ("userId=u&idempotencyKey=k&page=1", "page"),
        ("userId=u&idempotency_keys=k&idempotencyKey=k", "idempotency_keys"),
    ],
)
def test_bad_parameter_of_receipts_is_refused_by_name_in_one_sentence(client_without_database, query, parameter):
    answer = client_without_database.get(f"{RECEIPTS}?{query}")
    problem = assert_problem(client_without_database, answer, 422, parameter)
    assert problem["detail"].startswith(parameter)


def test_rejections_are_pages_by_number_newest_first(client, settle):
    settle(accrual("ann", 3, "a"), *(burn("ann", 10 + n, f"b{n}", metadata={"n": n}) for n in range(23)))
    settle(accrual("rich", 1, "a"))

    answer = client.get(REJECTIONS_PATH, params={"userId": "ann", "page": 2}).json()

    schema_of(client, REJECTIONS_PATH).validate(answer)
    assert [rejection["number"] for rejection in answer["rejections"]] == [*range(13, 3, -1)]
    assert answer["pagination"] == {"page": 2, "limit": 10, "total": 23, "totalPages": 3}
    newest = client.get(REJECTIONS_PATH, params={"userId": "ann", "limit": 1}).json()["rejections"][0]
    del newest["createdAt"]
    assert newest == {
        "userId": "ann",
        "number": 23,
        "type": "burn",
        "amount": "32",
        "reason": "insufficient_tokens",
        "balance": "3",
        "metadata": {"n": 22},
        "idempotencyKey": "b22",
        "occurredAt": None,
        "action": "render",
    }
    for user in ("rich", "nobody"):
        empty = client.get(REJECTIONS_PATH, params={"userId": user}).json()
        assert empty["rejections"] == []
        assert empty["pagination"]["total"] == 0


def test_rejected_accrual_names_its_source(client, settle, refuse, connection):
    connection.execute("INSERT INTO account (user_id, balance) VALUES ('ann', 99999999999999999999)")
    settle(accrual("ann", 1, "a"))
    (rejection,) = client.get(REJECTIONS_PATH, params={"userId": "ann"}).json()["rejections"]
    assert (rejection["reason"], rejection["source"]) == ("balance_limit", "payroll")
    assert rejection["balance"] == "99999999999999999999"


@pytest.mark.parametrize("analysed", [False, True])
def test_receipts_and_rejections_cost_index_look_ups_only(connection, analysed):
    """However many rows there are, with statistics and without."""
    for table in ("account", "transaction_record", "accrual_record", "burned_credit", "rejected_event", "dead_letter"):
        connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
    connection.execute("SET session_replication_role = replica")
    connection.execute(
        """
        INSERT INTO transaction_record
        SELECT 'user' || n %% 3, n, 'k' || n, 'accrual', 1, 0, 1, NULL, NULL, now(), sha256('p'), sha256('h'), 1
        FROM generate_series(1, 20000) AS n;
        INSERT INTO accrual_record SELECT 'user' || n %% 3, n, 1, 'shop', now() FROM generate_series(1, 20000) AS n;
        INSERT INTO burned_credit (user_id, amount, action, sequence, balance_before, balance_after)
        SELECT 'user' || n %% 3, 1, 'render', n, 1, 0 FROM generate_series(20001, 30000) AS n;
        INSERT INTO rejected_event
        SELECT 'user' || n %% 3, n, 'r' || n, 'burn', 1, NULL, 'render', NULL, NULL, now(),
            'insufficient_tokens', 0, sha256('p'), sha256('h'), 1
        FROM generate_series(1, 20000) AS n;
        INSERT INTO dead_letter (fingerprint, reason, detail, user_id, idempotency_key, first_seen_at, last_seen_at)
        SELECT sha256(n::text::bytea), 'expired', 'x', 'user' || n %% 3, 'd' || n, now(), now()
        FROM generate_series(1, 20000) AS n
        """.replace("%%", "%")
    )
    if analysed:
        connection.execute("ANALYZE")
    connection.execute(SESSION)
    keys = [f"{kind}{n}" for n in range(3, 100, 3) for kind in "krd"]
    parameters_of_keys = {"users": ["user0"] * len(keys), "keys": keys}
    page = {"user_id": "user0", "after": 9_000, "up_to": 9_100}
    for statement, parameters, index in (
        (APPLIED, parameters_of_keys, "uq_transaction_record_user_id_idempotency_key"),
        (REJECTED, parameters_of_keys, "uq_rejected_event_user_id_idempotency_key"),
        (DEAD_LETTERED, parameters_of_keys, "ix_dead_letter_user_id_idempotency_key"),
        (REJECTIONS.rows, page, "pk_rejected_event"),
    ):
        rows = connection.execute(f"EXPLAIN (ANALYZE, COSTS OFF) {statement}".encode(), parameters).fetchall()
        plan = "\n".join(row[0] for row in rows)
        assert f"using {index}" in plan, plan
        assert "Seq Scan on" not in plan, plan
        assert "Filter" not in plan, plan
