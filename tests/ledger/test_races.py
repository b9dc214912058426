"""Many workers at once: no event lost or applied twice, no deadlock, and a batch that must wait does wait."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.kit.events import accrual, burn
from tests.kit.wait import eventually
from worker.db import connect
from worker.ledger.apply import apply_batch
from worker.ledger.outcomes import Applied, Rejected

from .support import assert_books_balance, count, holding, pid, sent, settings_for, told, waiting_for

WORKERS = 8


@pytest.fixture
def connections(url):
    """A connection for each worker, with a long lock timeout."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(url, settings_for(url, lock_timeout=30))) for _ in range(WORKERS)]


@pytest.fixture
def all_at_once(connections):
    """Runs `work(number, connection)` for each connection, starting together; their results."""

    def run(work):
        barrier = threading.Barrier(WORKERS)

        def start(number, connection):
            barrier.wait()
            return work(number, connection)

        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(start, range(WORKERS), connections))

    return run


def deadlocks(connection):
    connection.execute("SELECT pg_stat_force_next_flush()")
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    return connection.execute(query).fetchone()[0]


def test_overlapping_batches_over_the_same_accounts_lose_nothing_and_never_deadlock(all_at_once, owner):
    """For two seconds every worker takes the same events, in an order and in batches of its own."""
    dice = random.Random(4711)
    events = [
        (accrual if dice.random() < 0.6 else burn)(f"user{dice.randrange(20)}", dice.randrange(1, 9), f"k{number}")
        for number in range(6_000)
    ]
    deadline = time.monotonic() + 2  # how long to try; nothing is asserted about it
    before = deadlocks(owner)

    def work(number, connection):
        own = random.Random(number)
        delivered, answers = set(), {}
        while time.monotonic() < deadline:
            # Most of a batch is what others are delivering too at this moment.
            start = len(delivered) * len(events) // (len(events) + 1) if number % 2 else own.randrange(len(events))
            places = [own.randrange(start, min(start + 300, len(events))) for _ in range(own.randrange(1, 60))]
            outcomes = apply_batch(connection, sent(*(events[place] for place in places)), stripe=number % 3 + 1)
            delivered.update(places)
            for place, outcome in zip(places, outcomes, strict=True):
                assert isinstance(outcome, Applied | Rejected)
                first = answers.setdefault(place, outcome._replace(repeated=False))
                assert outcome._replace(repeated=False) == first
        return answers

    found = all_at_once(work)

    delivered = set().union(*found)
    print(f"{len(delivered)} events, delivered to {sum(map(len, found))} workers in all")
    assert count(owner, "transaction_record") + count(owner, "rejected_event") == len(delivered)
    for place in delivered:
        assert len({answers[place] for answers in found if place in answers}) == 1
    assert count(owner, "dead_letter") == 0
    assert deadlocks(owner) == before
    assert_books_balance(owner)


def test_fifty_racing_burns_of_one_against_thirty_apply_exactly_thirty(all_at_once, owner):
    apply_batch(owner, sent(accrual("ann", 30, "funds")), stripe=1)

    def work(number, connection):
        mine = range(number, 50, WORKERS)
        return [apply_batch(connection, sent(burn("ann", 1, f"k{n}")), stripe=1)[0] for n in mine]

    outcomes = [type(outcome) for found in all_at_once(work) for outcome in found]

    assert outcomes.count(Applied) == 30
    assert outcomes.count(Rejected) == 20
    assert owner.execute("SELECT balance FROM account").fetchone() == (0,)
    assert_books_balance(owner)


def test_the_same_event_delivered_to_all_at_once_is_applied_once(all_at_once, owner):
    event = accrual("ann", 1, "k")
    outcomes = [found[0] for found in all_at_once(lambda number, c: apply_batch(c, sent(event), stripe=number + 1))]
    assert sorted(told(outcomes)) == ["applied #1: 0 → 1"] + ["applied #1: 0 → 1 (again)"] * (WORKERS - 1)
    assert_books_balance(owner)


def test_two_contents_of_one_key_delivered_to_all_at_once_have_one_winner(all_at_once, owner):
    outcomes = all_at_once(lambda number, c: apply_batch(c, sent(accrual("ann", number % 2 + 1, "k")), stripe=1)[0])
    assert sum(isinstance(outcome, Applied) and not outcome.repeated for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Applied) for outcome in outcomes) == WORKERS / 2
    assert count(owner, "transaction_record") == 1
    assert owner.execute("SELECT sum(deliveries) FROM dead_letter").fetchone() == (WORKERS / 2,)
    assert_books_balance(owner)


def test_accounts_inserted_by_all_at_once_in_different_orders_never_deadlock(all_at_once, owner):
    before = deadlocks(owner)

    def work(number, connection):
        own = random.Random(number)
        for step in range(12):
            users = [f"new{step}-{n}" for n in range(30)]
            own.shuffle(users)
            events = (accrual(user, 1, f"k{number}") for user in users)
            outcomes = apply_batch(connection, sent(*events), stripe=number + 1)
            assert all(isinstance(outcome, Applied) for outcome in outcomes)

    all_at_once(work)

    assert count(owner, "account", f"sequence = {WORKERS} AND balance = {WORKERS}") == 12 * 30
    assert deadlocks(owner) == before
    assert_books_balance(owner)


def test_the_second_holder_of_a_lock_waits_and_then_sees_what_the_first_did(connections, owner, background):
    first, second, *_ = connections
    with first.transaction():
        apply_batch(first, sent(accrual("ann", 5, "k1")), stripe=1)
        waiting = background(apply_batch, second, sent(burn("ann", 2, "k2")), stripe=2)
        assert eventually(lambda: waiting_for(owner, first), "the second batch waits for the first") == [pid(second)]
        assert not waiting.done()
        assert count(owner, "account") == 0
    assert told(waiting.result(60)) == ["applied #2: 5 → 3"]
    assert_books_balance(owner)


def test_a_batch_waits_for_an_account_that_another_inserts(connections, owner, background):
    first, second, *_ = connections
    with first.transaction():
        apply_batch(first, sent(accrual("new", 5, "k")), stripe=1)
        waiting = background(apply_batch, second, sent(accrual("new", 5, "k")), stripe=2)
        eventually(lambda: waiting_for(owner, first) == [pid(second)], "the second batch waits for the first")
    assert told(waiting.result(60)) == ["applied #1: 0 → 5 (again)"]


def test_a_batch_sees_what_was_decided_while_it_waited_for_a_lock(connections, owner, background):
    """The look-up must come after the wait: before it, the key was undecided."""
    apply_batch(owner, sent(accrual("ann", 5, "funds")), stripe=1)
    first, second, *_ = connections
    with holding(owner, "ann"):
        one = background(apply_batch, first, sent(burn("ann", 2, "k")), stripe=1)
        eventually(lambda: waiting_for(owner, owner) == [pid(first)], "the first batch waits for the holder")
        other = background(apply_batch, second, sent(burn("ann", 2, "k")), stripe=2)
        eventually(
            lambda: owner.execute("SELECT cardinality(pg_blocking_pids(%s))", (pid(second),)).fetchone()[0] > 0,
            "the second batch waits too",
        )
    outcomes = [*one.result(60), *other.result(60)]
    assert sorted(told(outcomes)) == ["applied #2: 5 → 3", "applied #2: 5 → 3 (again)"]
    assert_books_balance(owner)


def test_batches_of_other_accounts_do_not_wait_but_for_the_moment_of_the_stripe(connections, owner):
    first, second, *_ = connections
    with first.transaction():
        apply_batch(first, sent(accrual("ann", 5, "k")), stripe=1)
        assert told(apply_batch(second, sent(accrual("bob", 5, "k")), stripe=2)) == ["applied #1: 0 → 5"]
        with (
            pytest.raises(psycopg.errors.LockNotAvailable),
            connect(owner.info.dsn + f" password={owner.info.password}", settings_for("", lock_timeout=0.05)) as third,
        ):
            apply_batch(third, sent(accrual("cid", 5, "k")), stripe=1)
    assert_books_balance(owner)
