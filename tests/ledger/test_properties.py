"""Whatever is delivered, in whatever order and batches: one outcome for each key, and the books balance."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.ledger.apply import apply_batch
from worker.ledger.deliveries import Delivery, IfShort
from worker.ledger.outcomes import Applied, DeadLettered, Rejected, Undecided
from worker.ledger.rules import Reason

from .support import NOON, accrual, assert_books_balance, burn, count, empty, repeatable, rows

USERS = ["ann", "Bö\tb\\N", "~", "1:a"]
AHEAD = (NOON + timedelta(days=30)).isoformat()

amounts = st.one_of(
    st.sampled_from(
        ["1", "2.5", "0.000000000000000001", "1000000000000", "99999999999999999999", "99999999999999999999.9"]
    ),
    st.integers(1, 9).map(str),
    st.integers(1, 10**38 - 1).map(lambda units: f"{units // 10**18}.{units % 10**18:018d}"),
)
metadata = st.one_of(
    st.none(),
    st.sampled_from([{}, {"n": 1}, {"n": Decimal("1.0")}, {"né\\N\t": [None, {"~": "\n"}]}]),
)
moments = st.sampled_from(
    [None, None, "2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00", "2000-01-01T00:00:00Z", AHEAD]
)
events = st.builds(
    lambda make, user, amount, key, data, at: make(user, amount, key, metadata=data, occurred_at=at),
    st.sampled_from([accrual, accrual, burn]),
    st.sampled_from(USERS),
    amounts,
    st.sampled_from([f"key{n}" for n in range(9)]),
    metadata,
    moments,
)
deliveries = st.builds(
    lambda event, if_short: Delivery.of(event, if_short=if_short),
    events,
    st.sampled_from([IfShort.WAIT, IfShort.REJECT]),
)

#: Some events, most of them more than once, in any order.
shuffled = st.lists(deliveries, min_size=1, max_size=10).flatmap(
    lambda sent: st.lists(st.sampled_from(sent), max_size=8).flatmap(lambda again: st.permutations(sent + again))
)
#: The same cut into batches, each with the ledger's clock, which may go back.
batches = st.tuples(
    shuffled, st.lists(st.tuples(st.integers(1, 6), st.integers(-7200, 7200)), min_size=18, max_size=18)
)
openings = st.dictionaries(st.sampled_from(USERS), st.sampled_from(["0", "3", "99999999999999999999.5"]))


def cut(sent, plan):
    for size, seconds in plan:
        if sent:
            yield sent[:size], NOON + timedelta(seconds=seconds)
            sent = sent[size:]


def open_with(connection, balances):
    empty(connection)
    for user, balance in balances.items():
        connection.execute("INSERT INTO account (user_id, balance) VALUES (%s, %s)", (user, balance))


UNIT = 10**18


def units(amount):
    """An amount as a whole number of the smallest unit: arithmetic that cannot round."""
    whole, _, decimals = str(format(amount, "f")).partition(".")
    return int(whole) * UNIT + int(decimals.ljust(18, "0") or 0)


class Model:
    """What the ledger must answer, in a few lines and whole numbers."""

    def __init__(self, balances):
        self.balances = {user: units(Decimal(balance)) for user, balance in balances.items()}
        self.answers = {}

    def answer(self, delivery):
        event = delivery.event
        key = event.user_id, event.idempotency_key
        content = event.model_dump(exclude={"idempotency_key"})
        if key in self.answers:
            first, answer = self.answers[key]
            return answer if first == content else "conflict"
        if event.occurred_at is not None and event.occurred_at.isoformat() == AHEAD:
            return "invalid_event"
        before = self.balances.get(event.user_id, 0)
        after = before + units(event.amount) * (1 if event.type == "accrual" else -1)
        if after < 0 and delivery.if_short is IfShort.WAIT:
            return "undecided"
        if 0 <= after < 10**20 * UNIT:
            self.balances[event.user_id] = after
            answer = (before, after)
        else:
            answer = (before, Reason.INSUFFICIENT_TOKENS if after < 0 else Reason.BALANCE_LIMIT)
        self.answers[key] = content, answer
        return answer


def plain(outcome):
    """An outcome as the model says it."""
    match outcome:
        case Applied(_, before, after):
            return units(before), units(after)
        case Rejected(_, reason, balance):
            return units(balance), reason
        case DeadLettered(reason, _):
            return reason
        case Undecided():
            return "undecided"


@settings(repeatable, max_examples=60)
@given(batches, openings)
def test_one_outcome_for_each_key_and_books_that_balance_however_events_are_delivered(connection, sent, balances):
    """Duplicated, shuffled, cut into any batches: every answer is the model's, and nothing else is written."""
    open_with(connection, balances)
    model = Model(balances)

    for batch, clock in cut(*sent):
        expected = [model.answer(delivery) for delivery in batch]
        assert [plain(outcome) for outcome in apply_batch(connection, batch, stripe=1, clock=clock)] == expected

    assert_books_balance(connection)
    keys = "SELECT user_id, idempotency_key FROM transaction_record UNION ALL SELECT user_id, idempotency_key FROM"
    assert sorted(connection.execute(f"{keys} rejected_event").fetchall()) == sorted(model.answers)
    held = {user: units(balance) for user, balance in connection.execute("SELECT user_id, balance FROM account")}
    assert {user: balance for user, balance in held.items() if balance} == {
        user: balance for user, balance in model.balances.items() if balance
    }


@settings(repeatable, max_examples=40)
@given(batches, openings)
def test_a_batch_writes_what_its_events_would_have_written_one_by_one(connection, sent, balances):
    """To the last byte: hashes, times, flows and the sentences of dead letters included."""
    open_with(connection, balances)
    together = []
    for batch, clock in cut(*sent):
        together += apply_batch(connection, batch, stripe=1, clock=clock)
    written = rows(connection)

    open_with(connection, balances)
    one_by_one = []
    for batch, clock in cut(*sent):
        for delivery in batch:
            one_by_one += apply_batch(connection, [delivery], stripe=1, clock=clock)

    assert together == one_by_one
    assert rows(connection) == written


@settings(repeatable, max_examples=25)
@given(batches, openings)
def test_delivering_everything_once_more_changes_no_outcome_and_no_row(connection, sent, balances):
    open_with(connection, balances)
    # Everything is decided by now: neither undecided nor too early, but for conflicts.
    final = [
        d._replace(if_short=IfShort.REJECT)
        for d in sent[0]
        if d.event.occurred_at is None or d.event.occurred_at < NOON
    ]
    first = apply_batch(connection, final, stripe=1, clock=NOON)
    written = {table: found for table, found in rows(connection).items() if table != "dead_letter"}

    again = apply_batch(connection, final, stripe=2, clock=NOON + timedelta(hours=1))

    assert [plain(outcome) for outcome in again] == [plain(outcome) for outcome in first]
    assert {table: found for table, found in rows(connection).items() if table != "dead_letter"} == written


@settings(repeatable, max_examples=25)
@given(batches)
def test_a_batch_that_fails_leaves_no_trace(connection, owner, sent):
    """Killed on its way to COMMIT, whatever was in it."""
    open_with(connection, {})
    before = rows(connection)
    with pytest.raises(psycopg.errors.DivisionByZero), connection.transaction():  # noqa: PT012 - a transaction is one
        apply_batch(connection, sent[0], stripe=1, clock=NOON)
        connection.execute("SELECT 1 / 0")
    assert rows(owner) == before
    assert count(owner, "account") == 0
