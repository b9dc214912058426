"""Each error is provoked for real: a transient one is waited out, an event's own is bisected to its culprit."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.kit.events import accrual, burn
from tests.kit.wait import PATIENCE, eventually
from worker.config import Settings
from worker.db import connect
from worker.ledger.apply import CONTENDED_AFTER_SECONDS, apply_batch
from worker.ledger.dead_letters import NewDeadLetter
from worker.ledger.deliveries import IfShort, Origin
from worker.ledger.errors import MAX_CULPRITS, Interrupted, SuspiciousBatch
from worker.ledger.locks import MAX_FAILED_INSERTS
from worker.ledger.outcomes import Applied, DeadLettered, Locked, Rejected, Undecided
from worker.local.embedded import PostgresServer
from worker.migration import migrate

from .support import assert_books_balance, broken, count, holding, logged, rows, sent, told, waiting_for

BATCH = 500


@pytest.fixture
def server_role(owner):
    """A role with only the privileges that a worker needs, which the server can refuse."""
    role, password = f"ledger_{secrets.token_hex(6)}", secrets.token_hex(12)
    owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
    owner.execute(f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO {role}")
    yield role, password
    owner.execute(f"DROP OWNED BY {role}")
    owner.execute(f"DROP ROLE {role}")


@pytest.fixture(scope="module")
def other_server(tmp_path_factory):
    """A PostgreSQL that the tests may stop and kill. Durable: it keeps what it acknowledged."""
    server = PostgresServer(tmp_path_factory.mktemp("other"), durable=True)
    server.start()
    migrate(server.url)
    yield server
    server.stop()


def events(number=BATCH, users=7, name="k"):
    return [accrual(f"user{n % users}", n + 1, f"{name}{n}", metadata={"n": n}) for n in range(number)]


@contextlib.contextmanager
def a_table_renamed_away(owner):
    owner.execute("ALTER TABLE transaction_record RENAME TO elsewhere")
    try:
        yield
    finally:
        owner.execute("ALTER TABLE elsewhere RENAME TO transaction_record")


@contextlib.contextmanager
def set_in_database(owner, name, value):
    owner.execute(f"ALTER DATABASE {owner.info.dbname} SET {name} = '{value}'")
    try:
        yield
    finally:
        owner.execute(f"ALTER DATABASE {owner.info.dbname} RESET {name}")


def a_read_only_database(owner):
    return set_in_database(owner, "default_transaction_read_only", "on")


@contextlib.contextmanager
def a_lock_held(owner):
    owner.execute("INSERT INTO account (user_id) VALUES ('user1')")
    with holding(owner, "user1"):
        yield


@contextlib.contextmanager
def a_table_locked(owner):
    with owner.transaction():
        owner.execute("LOCK TABLE transaction_record")
        yield


def raising(sqlstate, condition="true"):
    """A trigger that raises an error which a test cannot provoke otherwise, or not soon enough."""

    @contextlib.contextmanager
    def trouble(owner):
        owner.execute(
            f"""
            CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN RAISE EXCEPTION 'trouble' USING ERRCODE = '{sqlstate}'; END $$;
            CREATE TRIGGER trouble BEFORE INSERT ON transaction_record FOR EACH ROW WHEN ({condition})
                EXECUTE FUNCTION trouble()
            """
        )
        try:
            yield
        finally:
            owner.execute("DROP TRIGGER trouble ON transaction_record; DROP FUNCTION trouble()")

    return trouble


NOT_NOW = {
    "42P01": (a_table_renamed_away, {}),
    "25006": (a_read_only_database, {}),
    "55P03": (a_lock_held, {"lock_timeout": 0.05}),
    "57014": (a_lock_held, {"lock_timeout": 60, "statement_timeout": 0.1}),
    "55P03 of a whole table": (a_table_locked, {"lock_timeout": 0.05}),
} | {
    f"{sqlstate} raised": (raising(sqlstate), {})
    for sqlstate in ("40001", "40P01", "53100", "53200", "54000", "55000", "58030", "0A000", "P0001", "XX000", "25P03")
}


@pytest.mark.parametrize(("trouble", "settings"), NOT_NOW.values(), ids=NOT_NOW)
def test_a_transient_error_is_waited_out_and_reported_once(request, watched, owner, trouble, settings):
    sqlstate = request.node.callspec.id.split()[0]
    ledger = watched(**settings)
    with logged() as entries:
        with trouble(owner):
            outcomes = ledger.begin(sent(*events(20)))
            report = ledger.next_report()
            ledger.wait_again(3)
            assert not outcomes.done()
        assert all(isinstance(outcome, Applied) for outcome in outcomes.result(PATIENCE))

    assert report.endswith(f"[{sqlstate}]")
    assert ledger.said == [report, None]
    assert [(entry["log_level"], entry["event"]) for entry in entries] == [
        ("warning", "database not available, keeping messages and trying again"),
        ("info", "database available again"),
    ]
    assert entries[0]["reason"] == entries[1]["was"] == report
    assert count(owner, "transaction_record") == 20
    assert count(owner, "dead_letter") == 0
    assert_books_balance(owner)


def test_a_server_without_a_free_connection_is_waited_out(watched, owner, url, server_role):
    """53300, for a role with only the privileges that a worker needs."""
    role, password = server_role
    owner.execute(f"ALTER ROLE {role} CONNECTION LIMIT 0")
    parts = urlsplit(url)
    ledger = watched(parts._replace(netloc=f"{role}:{password}@{parts.hostname}:{parts.port}").geturl())

    outcomes = ledger.begin([*sent(*events(20)), *sent(burn("user1", 10**9, "too much"), accrual("user1", 9, "k0"))])

    assert "too many connections for role" in ledger.next_report()
    owner.execute(f"ALTER ROLE {role} CONNECTION LIMIT -1")
    assert len(outcomes.result(PATIENCE)) == 22
    assert ledger.said[1:] == [None]
    assert_books_balance(owner)
    ledger.finish()


def test_a_url_that_libpq_refuses_is_a_transient_error(watched, owner, url):
    """Libpq refuses it without a server: that is no event's own error."""
    ledger = watched(url + "?sslmode=no_such_mode")
    outcomes = ledger.begin(sent(*events(3)))
    assert "no_such_mode" in ledger.next_report()
    ledger.stop.set()
    with pytest.raises(Interrupted):
        outcomes.result(PATIENCE)
    assert count(owner, "dead_letter") == 0


def test_a_cancelled_statement_is_tried_again(watched, owner):
    owner.execute("INSERT INTO account (user_id) VALUES ('user1')")
    ledger = watched(lock_timeout=60)
    with holding(owner, "user1"):
        outcomes = ledger.begin(sent(*events(20)))
        [backend] = eventually(lambda: waiting_for(owner, owner), "the batch waits for the lock")
        assert owner.execute("SELECT pg_cancel_backend(%s)", (backend,)).fetchone() == (True,)
        assert ledger.next_report().endswith("[57014]")
    assert len(outcomes.result(PATIENCE)) == 20
    assert ledger.said[1:] == [None]
    assert_books_balance(owner)


def test_a_session_ended_in_mid_batch_is_replaced(watched, owner):
    ledger = watched(lock_timeout=60)
    ledger.settle(sent(*events(20)))
    with holding(owner, "user6"):
        outcomes = ledger.begin(sent(*events(40)))
        [backend] = eventually(lambda: waiting_for(owner, owner), "the batch waits for the lock")
        assert owner.execute("SELECT pg_terminate_backend(%s)", (backend,)).fetchone() == (True,)
        assert "57P01" in ledger.next_report()
    assert [outcome.repeated for outcome in outcomes.result(PATIENCE)] == [True] * 20 + [False] * 20
    assert ledger.said[1:] == [None]
    assert_books_balance(owner)


def test_a_deadlock_with_other_software_is_tried_again(watched, owner, url):
    """Another session locks accounts in another order; PostgreSQL cancels the batch's statement."""
    owner.execute("INSERT INTO account (user_id) VALUES ('user0'), ('user6')")
    ledger = watched(lock_timeout=60)
    with (
        set_in_database(owner, "deadlock_timeout", "1500ms"),
        psycopg.connect(url, autocommit=True) as stranger,
        stranger.transaction(),
    ):
        stranger.execute("SET LOCAL deadlock_timeout = '1h'")
        stranger.execute("SELECT FROM account WHERE user_id = 'user6' FOR UPDATE")
        outcomes = ledger.begin(sent(*events(20)))
        eventually(lambda: waiting_for(owner, stranger), "the batch waits for the stranger")
        # Returns when PostgreSQL has cancelled the batch.
        stranger.execute("SELECT FROM account WHERE user_id = 'user0' FOR UPDATE")
        assert ledger.next_report().endswith("[40P01]")
    assert len(outcomes.result(PATIENCE)) == 20
    assert ledger.said[1:] == [None]
    assert_books_balance(owner)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_server_that_stops_is_waited_for(watched, other_server, end):
    ledger = watched(other_server.url)
    name = f"{end}{secrets.token_hex(3)}"
    ledger.begin(sent(*events(20, name=name))).result(PATIENCE)
    getattr(other_server, end)()
    try:
        outcomes = ledger.begin(sent(*events(40, name=name)))
        ledger.wait_again()
    finally:
        other_server.start()

    assert [outcome.repeated for outcome in outcomes.result(PATIENCE)] == [True] * 20 + [False] * 20
    assert ledger.said[-1] is None
    assert ledger.said.count(None) == 1
    with psycopg.connect(other_server.url, autocommit=True) as owner:
        assert count(owner, "dead_letter") == 0
        assert_books_balance(owner)


def test_a_database_that_became_read_only_under_a_session_is_found_again(watched, owner):
    """As after a failover: the old session stays read-only, only a new one can write."""
    ledger = watched()
    ledger.settle(sent(*events(5)))
    ledger.session.connection().execute("SET default_transaction_read_only = on")
    outcomes = ledger.begin(sent(*events(10)))
    assert ledger.next_report().endswith("[25006]")
    assert len(outcomes.result(PATIENCE)) == 10


class Swallower:
    """A proxy that ends the first connection on which a client sends `word`, after PostgreSQL has executed it."""

    def __init__(self, url, word):
        parts = urlsplit(url)
        self.server = parts.hostname, parts.port
        self.word = word
        self.door = socket.create_server(("127.0.0.1", 0))
        port = self.door.getsockname()[1]
        self.url = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}").geturl()
        self.swallowed = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.door.accept()
                server = socket.create_connection(self.server)
                saying = threading.Event()
                for call in ((self._requests, client, server, saying), (self._answers, server, client, saying)):
                    threading.Thread(target=call[0], args=call[1:], daemon=True).start()

    def _requests(self, client, server, saying):
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if self.word in data and not self.swallowed.is_set():
                    saying.set()
                server.sendall(data)
        server.close()

    def _answers(self, server, client, saying):
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if saying.is_set() and self.word + b"\x00" in data:
                    self.swallowed.set()
                    break
                client.sendall(data)
        # shutdown, for the other thread's recv keeps a closed socket alive
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        client.close()

    def close(self):
        self.door.close()


def test_a_commit_without_confirmation_is_decided_once(watched, owner, url):
    ledger = watched()
    ledger.settle(sent(*[accrual(f"user{n}", 1, "opening") for n in range(7)]))
    letter = NewDeadLetter("undecodable", "The body is not JSON.", Origin("tokens.burn", "m1", b"?"))
    with contextlib.closing(Swallower(url, b"COMMIT")) as proxy:
        ledger = watched(proxy.url)
        outcomes = ledger.begin(sent(*events(20), burn("user1", 10**9, "too much")), [letter])
        found = outcomes.result(PATIENCE)
        assert proxy.swallowed.is_set()
        ledger.finish()
    assert len(ledger.said) == 2
    assert [outcome.repeated for outcome in found] == [True] * 21
    assert count(owner, "transaction_record") == 27
    assert count(owner, "rejected_event") == 1
    kept = owner.execute("SELECT reason, message_id, state, deliveries FROM dead_letter").fetchall()
    assert kept == [("undecodable", "m1", "open", 2)], (
        "one letter; that it was written twice can be seen, and changes nothing"
    )
    assert_books_balance(owner)


def test_a_connection_lost_at_the_rollback_for_missing_accounts_is_replaced(watched, owner, url):
    """Psycopg's own Rollback, which escapes if it cannot roll back, is no database error; it would end the worker."""
    with contextlib.closing(Swallower(url, b"ROLLBACK")) as proxy:
        ledger = watched(proxy.url)
        found = ledger.begin(sent(*events(20))).result(PATIENCE)
        assert proxy.swallowed.is_set()
        ledger.finish()
    assert len(ledger.said) == 2
    assert [outcome.repeated for outcome in found] == [False] * 20
    assert_books_balance(owner)


def check_of_metadata(expression):
    """A constraint that a faulty migration could add."""

    @contextlib.contextmanager
    def trouble(owner):
        owner.execute("CREATE FUNCTION deep(n int) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RETURN deep(n + 1); END'")
        owner.execute(f"ALTER TABLE transaction_record ADD CONSTRAINT mistake CHECK ({expression}) NOT VALID")
        try:
            yield
        finally:
            owner.execute("ALTER TABLE transaction_record DROP CONSTRAINT mistake; DROP FUNCTION deep")

    return trouble


N = "(metadata->>'n')::int"
#: What PostgreSQL says of an event → the constraint that is in its way; {} is a condition on n.
THE_EVENTS_FAULT = {
    "23514": "NOT ({})",
    "22012": f"NOT ({{}}) OR 1 / ({N} - {N}) = 1",
    "22P02": "NOT ({}) OR ('x' || (metadata->>'n'))::int = 1",
    "54001": "NOT ({}) OR deep(0)",
}


@pytest.mark.parametrize("culprits", [[321], [0, 250, 499]])
@pytest.mark.parametrize("sqlstate", THE_EVENTS_FAULT)
def test_the_events_that_the_database_refuses_stand_alone_among_the_dead_letters(watched, owner, sqlstate, culprits):
    ledger = watched()
    condition = f"{N} IN ({','.join(map(str, culprits))})"
    letter = NewDeadLetter("invalid_event", "of the same batch", Origin("tokens.burn", "another"))
    with check_of_metadata(THE_EVENTS_FAULT[sqlstate].format(condition))(owner), logged() as entries:
        outcomes = ledger.settle(sent(*events()), [letter])

    assert [place for place, outcome in enumerate(outcomes) if isinstance(outcome, DeadLettered)] == culprits
    for place in culprits:
        assert outcomes[place].reason == "refused_by_database"
        assert outcomes[place].detail.endswith(f"[{sqlstate}]")
    query = "SELECT idempotency_key, event::json->'metadata'->>'n', detail FROM dead_letter WHERE user_id IS NOT NULL"
    assert sorted(owner.execute(query).fetchall()) == sorted(
        (f"k{place}", f"{place}", outcomes[place].detail) for place in culprits
    )
    assert count(owner, "dead_letter") == len(culprits) + 1
    assert count(owner, "transaction_record") == BATCH - len(culprits)
    print(f"{ledger.attempts} transactions to single out {len(culprits)} of {BATCH}")
    assert ledger.attempts <= 4 + len(culprits) * 2 * 9
    assert ledger.said == []
    assert {entry["event"] for entry in entries} == {"event refused, to be kept as a dead letter"}
    assert [entry["idempotency_key"] for entry in entries] == [f"k{place}" for place in culprits]
    assert_books_balance(owner)


def test_a_culprit_is_applied_when_it_arrives_again_after_the_fix(watched, owner):
    ledger = watched()
    with check_of_metadata(f"{N} <> 7")(owner):
        ledger.settle(sent(*events(20)))
    assert [outcome.repeated for outcome in ledger.settle(sent(*events(20)))] == [number != 7 for number in range(20)]
    assert_books_balance(owner)


def test_order_within_an_account_survives_the_cutting(watched, owner):
    """Each account's events are decided in their order: else a burn would meet too small a balance."""
    ledger = watched()
    steps = [
        make("ann", 1, f"{name}{n}", metadata={"n": n})
        for n in range(100)
        for make, name in ((accrual, "a"), (burn, "b"))
    ]
    with check_of_metadata(f"type = 'burn' OR {N} NOT IN (0, 50, 99)")(owner):
        outcomes = ledger.settle(sent(*steps))
    kinds = [type(outcome).__name__ for outcome in outcomes]
    assert kinds.count("DeadLettered") == kinds.count("Rejected") == 3
    assert kinds.count("Applied") == 194
    assert_books_balance(owner)


@pytest.mark.parametrize("culprits", [MAX_CULPRITS, MAX_CULPRITS + 1, BATCH])
def test_more_than_ten_culprits_look_like_a_bug_and_none_of_them_is_dead_lettered(watched, owner, culprits):
    ledger = watched()
    step = BATCH // culprits
    with check_of_metadata(f"{N} % {step} <> 0 OR {N} >= {step * culprits}")(owner):
        if culprits == MAX_CULPRITS:
            outcomes = ledger.settle(sent(*events()))
            assert sum(isinstance(outcome, DeadLettered) for outcome in outcomes) == culprits
            assert count(owner, "dead_letter") == culprits
        else:
            with pytest.raises(SuspiciousBatch, match=r"refused 11 events .* nothing is lost.*\[23514\]"):
                ledger.settle(sent(*events()))
            assert count(owner, "dead_letter") == 0
            assert_books_balance(owner)
        print(f"{ledger.attempts} transactions with {culprits} culprits of {BATCH}")
        assert ledger.attempts <= 2 + (MAX_CULPRITS + 1) * 2 * 9
    assert_books_balance(owner)

    outcomes = ledger.settle(sent(*events()))  # delivered again, after the fix
    assert all(isinstance(outcome, Applied) for outcome in outcomes)
    assert count(owner, "transaction_record") == BATCH
    assert_books_balance(owner)


def test_a_letter_that_cannot_be_written_stops_the_worker_rather_than_being_lost(watched, owner):
    letters = [NewDeadLetter("invalid_event", f"no. {n}", Origin("t", str(n))) for n in range(9)]
    letters[4] = NewDeadLetter("no such reason", "no. 4", Origin("t", "4"))
    with pytest.raises(SuspiciousBatch, match=r"a dead letter \(no such reason\)"):
        watched().settle(sent(*events(3)), letters)
    assert_books_balance(owner)


def test_a_batch_that_fails_leaves_nothing_half_done(connection, owner):
    before = rows(owner)
    letter = NewDeadLetter("no such reason", "refused when all else is written", Origin())
    with pytest.raises(psycopg.errors.CheckViolation):
        apply_batch(connection, sent(*events(3)), stripe=1, letters=[letter])
    assert rows(owner) == before


@pytest.mark.parametrize("others", ["known", "new"])
def test_while_some_accounts_are_locked_the_others_events_are_decided(watched, owner, connection, others):
    """The free accounts go first; the locked ones wait, in their order."""
    users = ["ann", "bob", "cid", "dan"]
    owner.execute("INSERT INTO account (user_id) SELECT unnest(%s::text[])", (users if others == "known" else ["bob"],))
    ledger = watched(lock_timeout=0.1)
    letter = NewDeadLetter("invalid_event", "of the same batch", Origin("tokens.burn", "another"))
    batch = [*(accrual(user, 2, "a") for user in users), *(burn(user, 1, "b") for user in users)]
    with logged() as entries:
        with holding(owner, "bob"):
            outcomes = ledger.begin(sent(*batch), [letter])
            eventually(lambda: count(connection, "transaction_record") == 6, "the free accounts' events are decided")
            assert count(connection, "transaction_record", "user_id = 'bob'") == 0
            assert count(connection, "dead_letter") == 1
            ledger.next_report()
            assert not outcomes.done()
        assert told(outcomes.result(PATIENCE)) == ["applied #1: 0 → 2"] * 4 + ["applied #2: 2 → 1"] * 4
    assert ledger.said == ["canceling statement due to lock timeout [55P03]", None]
    assert len(entries) == 2
    assert_books_balance(owner)


def test_events_of_a_locked_account_can_be_left_undecided(watched, owner, connection):
    owner.execute("INSERT INTO account (user_id) VALUES ('ann'), ('bob')")
    ledger = watched(lock_timeout=0.1)
    letter = NewDeadLetter("invalid_event", "of the same batch", Origin("tokens.burn", "another"))
    batch = sent(accrual("bob", 2, "a"), accrual("ann", 2, "a"), burn("bob", 1, "b"), accrual("cid", 1, "a"))
    locked = [Locked("bob"), Locked("bob")]
    with holding(owner, "bob"):
        mixed = ledger.settle(batch, [letter], leave_locked=True)
        assert [mixed[0], mixed[2]] == locked
        assert told([mixed[1], mixed[3]]) == ["applied #1: 0 → 2", "applied #1: 0 → 1"]
        assert count(connection, "dead_letter") == 1
        assert ledger.settle([batch[0], batch[2]], leave_locked=True) == locked, "also when there is nothing else"
        assert ledger.unlocked(["bob"]) == set()
        assert ledger.unlocked(["ann", "bob", "cid"]) == {"ann", "cid"}
    assert ledger.said == [], "one lock is no reason to be degraded"
    assert ledger.unlocked(["bob"]) == {"bob"}
    assert told(ledger.settle(batch, leave_locked=True)) == [
        "applied #1: 0 → 2",
        "applied #1: 0 → 2 (again)",
        "applied #2: 2 → 1",
        "applied #1: 0 → 1 (again)",
    ]
    assert_books_balance(owner)


def test_an_account_whose_insert_by_another_session_failed_is_unlocked(watched, owner, url):
    """There is no row then that could be locked."""
    ledger = watched(lock_timeout=0.1)
    batch = sent(accrual("ann", 1, "a"))
    with psycopg.connect(url) as stranger:
        stranger.execute("INSERT INTO account (user_id) VALUES ('ann')")
        assert ledger.settle(batch, leave_locked=True) == [Locked("ann")]
        stranger.rollback()
    assert ledger.unlocked(["ann"]) == {"ann"}
    assert told(ledger.settle(batch, leave_locked=True)) == ["applied #1: 0 → 1"]


def test_of_new_accounts_only_the_one_with_an_uncommitted_insert_is_locked(watched, owner, url):
    ledger = watched(lock_timeout=0.1)
    batch = sent(*(accrual(f"user-{n:02}", 1, "a") for n in range(20)))
    with psycopg.connect(url) as stranger:
        stranger.execute("INSERT INTO account (user_id) VALUES ('user-07')")
        outcomes = ledger.settle(batch, leave_locked=True)
        assert outcomes.pop(7) == Locked("user-07")
        assert told(outcomes) == ["applied #1: 0 → 1"] * 19
        assert ledger.unlocked(["user-07", "user-20"]) == {"user-20"}
        stranger.rollback()
    assert ledger.unlocked(["user-07"]) == {"user-07"}


def test_a_new_account_that_the_database_refuses_is_not_taken_for_a_locked_one(watched, owner, background):
    """The poll for lock holders inserts missing accounts, and meets the refusal."""
    owner.execute("INSERT INTO account (user_id) VALUES ('ann')")
    owner.execute("ALTER TABLE account ADD CONSTRAINT mistake CHECK (user_id <> 'bad')")
    ledger = watched(lock_timeout=0.1)
    batch = sent(*(accrual(user, 1, "a") for user in ("cid", "bad", "ann", "dan")))
    with holding(owner, "ann"):
        outcomes = background(ledger.settle, batch, leave_locked=True).result(PATIENCE)
        assert told([outcomes[0], outcomes[3]]) == ["applied #1: 0 → 1"] * 2
        assert isinstance(outcomes[1], DeadLettered)
        assert outcomes[2] == Locked("ann")
        assert ledger.unlocked(["ann", "bad"]) == {"bad"}
    assert ledger.unlocked(["ann"]) == {"ann"}


def test_a_batch_that_is_cut_decides_no_event_before_an_earlier_one_of_its_account(watched, owner, url, monkeypatch):
    """The account is locked when it is the first half's turn, and free again when it is the second's."""
    owner.execute("INSERT INTO account (user_id) VALUES ('ann')")
    ledger = watched(lock_timeout=0.2)
    batch = sent(accrual("ann", 5, "k1"), accrual("bob", 1, "k2"), burn("ann", 2, "k3"), accrual("eve", 1, "culprit"))
    attempt = ledger.session.attempt
    with psycopg.connect(url) as stranger, raising("22023", "NEW.idempotency_key = 'culprit'")(owner):

        def attempt_meanwhile(deliveries, letters):
            keys = {delivery.event.idempotency_key for delivery in deliveries}
            if keys == {"k1", "k2"}:
                stranger.execute("SELECT FROM account WHERE user_id = 'ann' FOR UPDATE")
            elif not keys & {"k1", "k2"}:
                stranger.rollback()
            return attempt(deliveries, letters)

        monkeypatch.setattr(ledger.session, "attempt", attempt_meanwhile)
        outcomes = ledger.settle(batch, leave_locked=True)
    assert outcomes[0] == outcomes[2] == Locked("ann")
    assert told([outcomes[1]]) == ["applied #1: 0 → 1"]
    assert isinstance(outcomes[3], DeadLettered)


def test_a_poll_for_unlocked_accounts_replaces_a_read_only_session(watched, owner):
    """As of a primary that has become a standby. In an idle worker nothing else would detect it."""
    owner.execute("INSERT INTO account (user_id) VALUES ('ann')")
    ledger = watched()
    ledger.settle(sent(*events(2)))
    ledger.session.connection().execute("SET default_transaction_read_only = on")
    assert ledger.unlocked(["ann"]) == set()
    assert ledger.next_report().endswith("[25006]")
    assert ledger.unlocked(["ann"]) == {"ann"}
    assert ledger.said[1:] == [None]


def test_an_account_whose_lock_holder_changes_is_busy_and_not_locked(watched, owner, url):
    """A poll never sees it without a lock, because one transaction after the other holds it."""
    owner.execute("INSERT INTO account (user_id) VALUES ('ann'), ('bob')")
    ledger = watched(lock_timeout=0.1)
    batch = sent(accrual("ann", 1, "a"), accrual("bob", 1, "a"))
    with psycopg.connect(url) as stuck, psycopg.connect(url) as one, psycopg.connect(url) as another:
        stuck.execute("SELECT FROM account WHERE user_id = 'bob' FOR UPDATE")
        one.execute("SELECT FROM account WHERE user_id = 'ann' FOR UPDATE")
        assert ledger.settle(batch, leave_locked=True) == [Locked("ann"), Locked("bob")]
        assert ledger.unlocked(["ann", "bob"]) == set()
        one.commit()
        another.execute("SELECT FROM account WHERE user_id = 'ann' FOR UPDATE")
        assert ledger.unlocked(["ann", "bob"]) == {"ann"}, "a batch that waits for the row lock gets it"
        assert ledger.settle(batch[:1], leave_locked=True) == [Locked("ann")], "unless that takes too long"
        assert ledger.unlocked(["ann", "bob"]) == set()


def test_a_session_that_inserts_many_accounts_does_not_delay_other_new_accounts(watched, owner, url):
    """What one poll has no time for, a later one has."""
    ledger = watched(lock_timeout=0.1)
    imported = [f"import-{n}" for n in range(1, MAX_FAILED_INSERTS + 3)]
    others = [f"user-{n:02}" for n in range(25)]
    with psycopg.connect(url) as stranger:
        stranger.execute("INSERT INTO account (user_id) SELECT unnest(%s::text[])", (imported,))
        outcomes = ledger.settle(sent(*(accrual(user, 1, "a") for user in [*imported, *others])), leave_locked=True)
        assert outcomes[: len(imported)] == [Locked(user) for user in imported]
        waiting = [outcome.user_id for outcome in outcomes if isinstance(outcome, Locked)]
        assert len(waiting) > len(imported), "one poll has no time for all"
        for _ in range(100):
            free = ledger.unlocked(waiting)
            waiting = [user for user in waiting if user not in free]
            if not set(waiting) & set(others):
                break
        assert waiting == imported


def test_a_contended_batch_leaves_a_short_burn_undecided(watched, owner, connection, background):
    """The lock holder may have delayed its accrual too, in another worker."""
    owner.execute("INSERT INTO account (user_id) VALUES ('ann')")
    ledger = watched(lock_timeout=PATIENCE)
    prompt = [delivery._replace(if_short=IfShort.REJECT_UNLESS_CONTENDED) for delivery in sent(burn("ann", 5, "b"))]
    with holding(owner, "ann"):
        late = background(ledger.settle, prompt)
        eventually(lambda: waiting_for(owner, owner), "it waits for the row lock")
        time.sleep(CONTENDED_AFTER_SECONDS)
    assert late.result(PATIENCE) == [Undecided(Decimal(0))]
    assert count(connection, "rejected_event") == 0
    (refused,) = ledger.settle(prompt)
    assert isinstance(refused, Rejected), "and is rejected when it had not to wait"


def test_a_frozen_worker_loses_its_locks_and_recovers(watched, owner, url):
    """SIGSTOP in mid-batch, while it holds locks: PostgreSQL ends its session (idle_in_transaction_session_timeout,
    25P03) and the others go on. When it resumes, it tries again and gets the outcomes decided meanwhile.
    """
    owner.execute("INSERT INTO account (user_id) VALUES ('ann'), ('bob'), ('cid')")
    ledger = watched(lock_timeout=0.1)
    command = [sys.executable, "-m", "tests.ledger.frozen", url, "k", "ann", "bob"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            with holding(owner, "bob"):
                backend = int(process.stdout.readline())
                eventually(lambda: waiting_for(owner, owner) == [backend], "it holds ann and waits for bob")
                os.kill(process.pid, signal.SIGSTOP)
            outcomes = ledger.begin(sent(*(accrual(user, 1, "k") for user in ("ann", "bob", "cid"))))
            assert told(outcomes.result(PATIENCE)) == ["applied #1: 0 → 1"] * 3
            assert count(owner, "pg_stat_activity", f"pid = {backend}") == 0
            os.kill(process.pid, signal.SIGCONT)
            answers, reports = json.loads(process.stdout.readline())
        finally:
            process.kill()
    assert answers == ["applied #1: 0 → 1 (again)"] * 2
    assert "25P03" in reports[0] or "server closed the connection" in reports[0]
    assert reports[1:] == [None]
    assert_books_balance(owner)


def test_a_worker_frozen_in_the_middle_of_a_copy_loses_its_locks(watched, owner, url):
    """PostgreSQL waits for the lines of a COPY without a timeout, and keeps the locks meanwhile."""
    owner.execute("INSERT INTO account (user_id) VALUES ('ann'), ('cid')")
    settings = Settings(DATABASE_URL=url, idle_in_transaction_timeout=1, statement_timeout=1, lock_timeout=0.5)
    frozen = connect(url, settings)
    try:
        frozen.execute("BEGIN")
        frozen.execute("SELECT FROM account WHERE user_id = 'ann' FOR UPDATE")
        frozen.pgconn.send_query(b"COPY accrual_record FROM STDIN")
        [backend] = eventually(lambda: in_copy(owner), "it is in the middle of a COPY")
        ledger = watched(lock_timeout=0.1, idle_in_transaction_timeout=2)
        with logged() as entries:
            outcomes = ledger.begin(sent(*(accrual(user, 1, "k") for user in ("ann", "cid"))))
            eventually(lambda: count(owner, "transaction_record") == 1, "the account that is free goes first")
            time.sleep(1)  # half of idle_in_transaction_timeout
            assert in_copy(owner) == [backend], "a slow session is not frozen yet"
            assert told(outcomes.result(PATIENCE)) == ["applied #1: 0 → 1"] * 2
        assert in_copy(owner) == []
    finally:
        frozen.close()
    ended = "ended the session of a worker that froze while it wrote"
    assert [entry["backend"] for entry in entries if entry["event"] == ended] == [backend]
    assert_books_balance(owner)


def in_copy(owner):
    """The backends that wait for the lines of a COPY."""
    found = owner.execute(
        "SELECT pid FROM pg_stat_activity"
        " WHERE datname = current_database() AND query LIKE 'COPY %' AND wait_event = 'ClientRead'"
    )
    return [row[0] for row in found if row[0] != owner.info.backend_pid]


def test_stop_interrupts_waiting_with_nothing_half_done(watched, owner):
    ledger = watched()
    before = rows(owner)
    with a_read_only_database(owner):
        outcomes = ledger.begin(sent(*events(20)))
        report = ledger.next_report()
        eventually(lambda: ledger.waits >= 6, "it waits for seconds between its attempts")
        ledger.stop.set()
        with pytest.raises(Interrupted, match="25006"):
            outcomes.result(PATIENCE)
    assert ledger.said == [report]
    assert rows(owner) == before
    assert broken(owner) == set()


def test_stop_after_a_part_was_decided_loses_nothing_and_repeats_nothing(watched, owner, connection):
    owner.execute("INSERT INTO account (user_id) VALUES ('ann'), ('bob')")
    ledger = watched(lock_timeout=0.1)
    batch = sent(accrual("ann", 1, "k"), accrual("bob", 1, "k"))
    with holding(owner, "bob"):
        outcomes = ledger.begin(batch)
        eventually(lambda: count(connection, "transaction_record") == 1, "the free account's event is decided")
        ledger.stop.set()
        with pytest.raises(Interrupted):
            outcomes.result(PATIENCE)
    assert told(watched().settle(batch)) == ["applied #1: 0 → 1 (again)", "applied #1: 0 → 1"]
    assert_books_balance(owner)


def test_a_stopped_ledger_still_decides_what_it_can_decide_at_once(watched, owner):
    ledger = watched()
    ledger.stop.set()
    assert len(ledger.settle(sent(*events(20)))) == 20
    assert_books_balance(owner)


def test_a_closed_ledger_opens_again(watched, owner):
    ledger = watched()
    ledger.settle(sent(*events(2)))
    ledger.close()
    ledger.close()
    assert [outcome.repeated for outcome in ledger.settle(sent(*events(2)))] == [True, True]


def test_a_legacy_row_taken_for_a_stripe_is_an_error_and_not_waited_out(watched, owner):
    with pytest.raises(RuntimeError, match="cannot be a stripe"):
        watched(stripe=0).settle(sent(*events(2)))
    assert count(owner, "transaction_record") == 0
