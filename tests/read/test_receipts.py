"""What became of an event, and what an account was refused: over HTTP and in the terminal."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from datetime import UTC, datetime

import psycopg
import pytest

from schema.events import parse_event
from tests.read.test_api import assert_problem, running, schema_of
from worker import config
from worker.cli import main
from worker.config import Settings
from worker.ledger.dead_letters import NewDeadLetter
from worker.ledger.deliveries import Delivery, Origin
from worker.ledger.settle import Ledger
from worker.read.database import SESSION
from worker.read.receipts import APPLIED, DEAD_LETTERED, REJECTED
from worker.read.rejections import REJECTIONS

RECEIPTS = "/api/account/receipts"
REJECTED_PAGE = "/api/account/rejections"


@pytest.fixture
def ledger(database_url):
    ledger = Ledger(Settings(DATABASE_URL=database_url), stripe=1)
    yield ledger
    ledger.close()


@pytest.fixture
def connection(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def client(database_url):
    with running(database_url) as client:
        yield client


@pytest.fixture(scope="module")
def client_without_database():
    with running("postgresql://127.0.0.1:1/nowhere") as client:
        yield client


@pytest.fixture
def tokentrail(monkeypatch, capsys, database_url):
    monkeypatch.setenv("DATABASE_URL", database_url)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tokentrail", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        config.settings.cache_clear()
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    return run


def accrual(user, amount, key, **more):
    event = {"user_id": user, "amount": amount, "idempotency_key": key, "source": "shop"} | more
    return parse_event(event, type_="accrual")


def burn(user, amount, key, **more):
    event = {"user_id": user, "amount": amount, "idempotency_key": key, "action": "chat"} | more
    return parse_event(event, type_="burn")


def settle(ledger, *events):
    return ledger.settle([Delivery.of(event) for event in events])


def refuse(ledger, event, reason="expired", message_id="m"):
    ledger.settle([], [NewDeadLetter.of_event(reason, "It is too late.", event, Origin("tokens.accrue", message_id))])


def ask(client, user, *keys, **more):
    answer = client.get(RECEIPTS, params={"userId": user, "idempotencyKey": list(keys)} | more)
    assert answer.status_code == 200, answer.text
    schema_of(client, RECEIPTS).validate(answer.json())
    return answer.json()["receipts"]


def statuses(receipts):
    return [receipt["status"] for receipt in receipts]


def test_receipts_say_what_became_of_each_key_in_the_order_asked(client, ledger):
    settle(ledger, accrual("ann", "1.5", "a", metadata={"n": 1}), burn("ann", 9, "b"), burn("ann", "0.5", "c"))
    refuse(ledger, accrual("ann", 7, "d"))

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
            "source": "shop",
        },
    }
    assert (burned["status"], burned["transaction"]["action"]) == ("applied", "chat")
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


def test_receipts_of_another_user_are_unknown(client, ledger):
    settle(ledger, accrual("ann", 1, "a"))
    assert statuses(ask(client, "bob", "a")) == ["unknown"]


def test_receipts_answer_a_hundred_keys_at_once_and_a_key_given_twice_once(client, ledger):
    settle(ledger, *(accrual("ann", 1, f"k {n} ü&=") for n in range(50)))
    receipts = ask(client, "ann", *(f"k {n} ü&=" for n in range(100)))
    assert statuses(receipts) == ["applied"] * 50 + ["unknown"] * 50
    assert statuses(ask(client, "ann", "k 1 ü&=", "k 1 ü&=")) == ["applied"]


def test_outcome_stands_before_a_dead_letter_and_a_replay_says_nothing_yet(client, ledger, connection):
    refuse(ledger, accrual("ann", 1, "a"))
    assert statuses(ask(client, "ann", "a")) == ["dead_lettered"]
    close = "UPDATE dead_letter SET state = %s, state_changed_at = now(), state_changed_by = 'x' WHERE id = %s"
    connection.execute(close, ("replayed", 1))
    assert statuses(ask(client, "ann", "a")) == ["unknown"]
    refuse(ledger, accrual("ann", 2, "a"), message_id="another")
    assert statuses(ask(client, "ann", "a")) == ["dead_lettered"]
    connection.execute(close, ("discarded", 2))
    assert ask(client, "ann", "a")[0]["state"] == "discarded"
    settle(ledger, accrual("ann", 3, "a"))
    assert statuses(ask(client, "ann", "a")) == ["applied"]


def test_receipt_of_a_rejection_stays_after_the_balance_has_grown(client, ledger):
    settle(ledger, burn("ann", 5, "b"))
    settle(ledger, accrual("ann", 100, "a"))
    (told,) = map(str, settle(ledger, burn("ann", 5, "b")))
    assert told.endswith("(again)")
    (receipt,) = ask(client, "ann", "b")
    assert (receipt["status"], receipt["balance"]) == ("rejected", "0")


def test_wait_answers_as_soon_as_the_first_key_is_decided(client, ledger):
    settle(ledger, accrual("ann", 1, "known"))
    assert statuses(ask(client, "ann", "x", "known", wait=10)) == ["unknown", "applied"]

    began = threading.Event()

    def decide():
        began.wait()
        time.sleep(0.3)
        settle(ledger, accrual("ann", 1, "late"))

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


def test_many_who_wait_leave_connections_for_the_others(client, ledger):
    """More readers than the pool has connections."""
    waiting = [threading.Thread(target=ask, args=(client, "ann", f"never {n}"), kwargs={"wait": 3}) for n in range(40)]
    for thread in waiting:
        thread.start()
    settle(ledger, accrual("ann", 1, "a"))
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
    found = assert_problem(client_without_database, client_without_database.get(f"{RECEIPTS}?{query}"), 422, parameter)
    assert found["detail"].startswith(parameter)


@pytest.mark.parametrize(
    ("query", "parameter"),
    [("", "userId"), ("userId=u&page=0", "page"), ("userId=u&limit=101", "limit"), ("userId=u&wait=1", "wait")],
)
def test_bad_parameter_of_rejections_is_refused_by_name_in_one_sentence(client_without_database, query, parameter):
    assert_problem(client_without_database, client_without_database.get(f"{REJECTED_PAGE}?{query}"), 422, parameter)


def test_rejections_are_pages_by_number_newest_first(client, ledger):
    settle(ledger, accrual("ann", 3, "a"), *(burn("ann", 10 + n, f"b{n}", metadata={"n": n}) for n in range(23)))
    settle(ledger, accrual("rich", "999999999999", "a"))

    answer = client.get(REJECTED_PAGE, params={"userId": "ann", "page": 2}).json()

    schema_of(client, REJECTED_PAGE).validate(answer)
    assert [rejection["number"] for rejection in answer["rejections"]] == [*range(13, 3, -1)]
    assert answer["pagination"] == {"page": 2, "limit": 10, "total": 23, "totalPages": 3}
    newest = client.get(REJECTED_PAGE, params={"userId": "ann", "limit": 1}).json()["rejections"][0]
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
        "action": "chat",
    }
    for user in ("rich", "nobody"):
        empty = client.get(REJECTED_PAGE, params={"userId": user}).json()
        assert empty["rejections"] == []
        assert empty["pagination"]["total"] == 0


def test_rejected_accrual_names_its_source(client, ledger, connection):
    connection.execute("INSERT INTO account (user_id, balance) VALUES ('ann', 99999999999999999999)")
    settle(ledger, accrual("ann", 1, "a"))
    (rejection,) = client.get(REJECTED_PAGE, params={"userId": "ann"}).json()["rejections"]
    assert (rejection["reason"], rejection["source"]) == ("balance_limit", "shop")
    assert rejection["balance"] == "99999999999999999999"


def test_receipt_command_says_what_became_of_an_event(tokentrail, ledger):
    settle(ledger, accrual("ann", "1.5", "a"), burn("ann", 9, "b"))
    refuse(ledger, accrual("ann", 7, "d\x1b[31m"))
    for key, words in (
        ("a", ("applied", "1 (accrual)", "0 → 1.5")),
        ("b", ("rejected", "insufficient_tokens", "1.5")),
        ("d\x1b[31m", ("dead-lettered", "expired", "It is too late.", "1, open")),
        ("x", ("unknown", "may still be queued")),
    ):
        code, out, err = tokentrail("receipt", "ann", key)
        assert (code, err) == (0, "")
        assert all(word in out for word in words), out
        assert "\x1b" not in out
    code, out, _ = tokentrail("receipt", "ann", "a", "--json")
    assert statuses(json.loads(out)["receipts"]) == ["applied"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("receipt", "", "k"), "USER must be 1 to 128 characters, none of them NUL."),
        (("receipt", "u", ""), "KEY must be 1 to 200 characters, none of them NUL."),
        (("receipt", "u"), "Missing argument 'key'"),
    ],
)
def test_receipt_command_refuses_bad_input_in_one_sentence(tokentrail, arguments, sentence):
    code, out, err = tokentrail(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_history_command_shows_rejections(tokentrail, ledger):
    settle(ledger, burn("ann", 9, "b"))
    code, out, _ = tokentrail("history", "ann", "--rejected")
    assert code == 0
    assert "page 1 of 1, 1 rejection " in out
    assert "insufficient_tokens" in out
    assert json.loads(tokentrail("history", "ann", "--rejected", "--json")[1])["pagination"]["total"] == 1
    assert tokentrail("history", "bob", "--rejected") == (0, "bob has no rejections.\n", "")


@pytest.mark.parametrize("analysed", [False, True])
def test_receipts_and_rejections_cost_index_look_ups_alone(connection, analysed):
    """However many rows there are, and whatever PostgreSQL believes of them."""
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
        SELECT 'user' || n %% 3, 1, 'chat', n, 1, 0 FROM generate_series(20001, 30000) AS n;
        INSERT INTO rejected_event
        SELECT 'user' || n %% 3, n, 'r' || n, 'burn', 1, NULL, 'chat', NULL, NULL, now(),
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
    asked = {"users": ["user0"] * len(keys), "keys": keys}
    page = {"user_id": "user0", "after": 9_000, "up_to": 9_100}
    for statement, parameters, index in (
        (APPLIED, asked, "uq_transaction_record_user_id_idempotency_key"),
        (REJECTED, asked, "uq_rejected_event_user_id_idempotency_key"),
        (DEAD_LETTERED, asked, "ix_dead_letter_user_id_idempotency_key"),
        (REJECTIONS, page, "pk_rejected_event"),
    ):
        rows = connection.execute(f"EXPLAIN (ANALYZE, COSTS OFF) {statement}".encode(), parameters).fetchall()
        plan = "\n".join(row[0] for row in rows)
        assert f"using {index}" in plan, plan
        assert "Seq Scan on" not in plan, plan
        assert "Filter" not in plan, plan
