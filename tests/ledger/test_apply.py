"""One batch: what each event writes, changes and returns."""

from __future__ import annotations

import json
import random
from datetime import timedelta
from decimal import Context, Decimal, Inexact, Rounded, localcontext

import pytest
from psycopg.pq import Trace

from tests.kit.events import accrual, burn
from worker.ledger.apply import apply_batch
from worker.ledger.chain import payload_hash
from worker.ledger.dead_letters import NewDeadLetter
from worker.ledger.deliveries import Delivery, IfShort, Origin
from worker.ledger.outcomes import Applied, DeadLettered, Rejected, Undecided
from worker.ledger.rules import Reason
from worker.ledger.store import stripe_of

from .support import NOON, assert_books_balance, count, rows, sent, told

TINY = "0.000000000000000001"
LARGEST = "99999999999999999999.999999999999999999"


def apply(connection, *events, if_short=IfShort.REJECT, **more):
    return apply_batch(connection, sent(*events, if_short=if_short), stripe=1, **more)


def one(connection, query, *parameters):
    return connection.execute(query, parameters).fetchone()


def balance(connection, user):
    return one(connection, "SELECT balance FROM account WHERE user_id = %s", user)[0]


def test_an_accrual_writes_its_record_its_source_and_moves_balance_and_supply(connection):
    event = accrual("ann", "12.5", "k1", metadata={"order": 1.50}, occurred_at="2026-01-30T01:00:00+02:00")

    assert told(apply(connection, event, clock=NOON)) == ["applied #1: 0 → 12.5"]

    assert one(
        connection,
        "SELECT sequence, idempotency_key, type, amount, balance_before, balance_after, metadata::text, occurred_at,"
        " created_at, payload_hash, hash_version FROM transaction_record WHERE user_id = 'ann'",
    ) == (
        *(1, "k1", "accrual", Decimal("12.5"), 0, Decimal("12.5"), '{"order":1.5}', event.occurred_at),
        *(NOON, payload_hash(event), 1),
    )
    assert one(connection, "SELECT sequence, amount, source, created_at FROM accrual_record") == (
        *(1, Decimal("12.5"), "payroll", NOON),
    )
    assert one(connection, "SELECT balance, opening_balance, sequence, rejections, last_recorded_at FROM account") == (
        *(Decimal("12.5"), 0, 1, 0, NOON),
    )
    assert one(connection, "SELECT issued, burned FROM global_token_balance WHERE id = 1") == (Decimal("12.5"), 0)
    assert one(connection, "SELECT hour, issued, burned, accruals, burns, rejections FROM token_flow") == (
        *(NOON.replace(minute=0, second=0, microsecond=0), Decimal("12.5"), 0, 1, 0, 0),
    )
    assert_books_balance(connection)


def test_a_burn_writes_its_record_and_a_burned_credit_with_the_balance_before_and_after(connection):
    outcomes = apply(connection, accrual("ann", "10", "k1"), burn("ann", "3.25", "k2"), clock=NOON)

    assert outcomes == [Applied(1, 0, 10), Applied(2, 10, Decimal("6.75"))]
    assert one(
        connection, "SELECT sequence, amount, action, balance_before, balance_after, created_at FROM burned_credit"
    ) == (2, Decimal("3.25"), "render", 10, Decimal("6.75"), NOON)
    assert one(connection, "SELECT issued, burned FROM global_token_balance WHERE id = 1") == (10, Decimal("3.25"))
    assert_books_balance(connection)


def test_a_burn_of_more_than_is_held_is_rejected_for_good_and_moves_nothing(connection):
    apply(connection, accrual("ann", "1", "k1"))

    assert told(apply(connection, burn("ann", "2", "k2"))) == ["rejected: insufficient tokens, 1 held, 2 asked"]
    apply(connection, accrual("ann", "10", "k3"))
    assert told(apply(connection, burn("ann", "2", "k2"))) == ["rejected: insufficient tokens, 1 held, 2 asked (again)"]

    assert balance(connection, "ann") == 11
    assert one(connection, "SELECT number, type, amount, action, reason, balance FROM rejected_event") == (
        *(1, "burn", 2, "render", "insufficient_tokens", 1),
    )
    assert_books_balance(connection)


def test_a_burn_that_is_not_final_stays_undecided_and_writes_nothing_but_its_account(connection):
    assert apply(connection, burn("ann", "2", "k"), if_short=IfShort.WAIT) == [Undecided(Decimal(0))]
    assert {table: len(found) for table, found in rows(connection).items() if found} == {
        "account": 1,
        "global_token_balance": 1,  # the legacy row
    }
    mixed = [
        *sent(burn("ann", "2", "k"), if_short=IfShort.WAIT),
        *sent(accrual("ann", 5, "a")),
        *sent(burn("ann", "2", "k")),
    ]
    assert told(apply_batch(connection, mixed, stripe=1)) == [
        "undecided: 0 held",
        "applied #1: 0 → 5",
        "applied #2: 5 → 3",
    ]
    assert_books_balance(connection)


def test_the_first_outcome_stands_however_often_and_wherever_it_is_delivered_again(connection):
    events = accrual("ann", "1.0", "k1"), burn("ann", "1", "k2"), burn("ann", "1", "k3")
    first = apply(connection, *events)
    before = rows(connection)

    again = apply(connection, *reversed(events))
    twice = apply(connection, *events, *events)

    assert again == [outcome._replace(repeated=True) for outcome in reversed(first)]
    assert twice == [outcome._replace(repeated=True) for outcome in first] * 2
    assert rows(connection) == before


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (accrual("ann", "1.5", "k"), 'amount is 1.5, was 1; metadata is absent, was {"a":1}'),
        (accrual("ann", "1", "k", source="x" * 99, metadata={"a": 1}), f"source is {'x' * 57}..., was payroll"),
        (accrual("ann", "1", "k", metadata={"a": 2}), 'metadata is {"a":2}, was {"a":1}'),
        (
            accrual("ann", "1", "k", metadata={"a": 1}, occurred_at="2026-01-01T00:00:00Z"),
            "occurred_at is 2026-01-01T00:00:00+00:00, was absent",
        ),
        (
            burn("ann", "1", "k", metadata={"a": 1}),
            "type is burn, was accrual; source is absent, was payroll; action is render, was absent",
        ),
    ],
)
def test_other_content_under_a_used_key_is_a_conflict_that_names_what_differs(connection, other, words, together):
    first = accrual("ann", "1", "k", metadata={"a": 1.0})
    batches = [[first, other]] if together else [[first], [other]]
    outcome = [apply(connection, *batch) for batch in batches][-1][-1]

    sentence = f"This idempotency key was applied as #1 with other content: {words}. Send a new event under a new key."
    assert outcome == DeadLettered("conflict", sentence)
    assert one(connection, "SELECT reason, detail, user_id, idempotency_key, event->>'type' FROM dead_letter") == (
        *("conflict", sentence, "ann", "k", other.type),
    )
    assert balance(connection, "ann") == 1
    assert_books_balance(connection)


def test_a_conflict_with_a_rejection_says_so(connection):
    apply(connection, burn("ann", "2", "k", occurred_at="2026-01-01T00:00:00Z"))
    [outcome] = apply(connection, burn("ann", "3", "k", occurred_at="2026-01-01T01:00:00+01:00"))
    assert "rejected as no. 1 with other content: amount is 3, was 2. " in outcome.detail


@pytest.mark.parametrize(
    "same",
    [
        accrual("ann", "1.50", "k", metadata={"b": [1.0], "a": None}, occurred_at="2026-01-01T01:00:00+01:00"),
        accrual(
            "ann", "1.5", "k", metadata={"a": None, "b": [1]}, occurred_at="2026-01-01T00:00:00.000Z", type="accrual"
        ),
    ],
)
def test_the_same_content_written_otherwise_is_no_conflict(connection, same):
    first = accrual("ann", "1.500", "k", metadata={"a": None, "b": [1.00]}, occurred_at="2026-01-01T00:00:00Z")
    assert [str(outcome) for outcome in apply(connection, first, same)] == [
        "applied #1: 0 → 1.5",
        "applied #1: 0 → 1.5 (again)",
    ]


def test_a_dead_lettered_key_freezes_nothing(connection):
    ahead = (NOON + timedelta(days=2)).isoformat()
    [dead, alive] = apply(connection, accrual("ann", 1, "k", occurred_at=ahead), accrual("ann", 1, "k"), clock=NOON)
    assert isinstance(dead, DeadLettered)
    assert dead.reason == "invalid_event"
    assert "more than 1 day ahead of the ledger's clock" in dead.detail
    assert alive == Applied(1, 0, 1)


def test_occurred_at_is_judged_at_the_first_decision_only(connection):
    """A clock that was set back since does not turn an outcome into a dead letter."""
    event = accrual("ann", 1, "k", occurred_at=NOON.isoformat())
    apply(connection, event, clock=NOON)
    assert apply(connection, event, clock=NOON - timedelta(days=9)) == [Applied(1, 0, 1, repeated=True)]


def test_a_legacy_balance_becomes_the_opening_balance(connection):
    connection.execute("INSERT INTO account (user_id, balance) VALUES ('ann', 7.5), ('bob', 1)")

    outcomes = apply(connection, burn("ann", 5, "k"), burn("bob", 5, "k"))

    assert told(outcomes) == ["applied #1: 7.5 → 2.5", "rejected: insufficient tokens, 1 held, 5 asked"]
    found = connection.execute("SELECT user_id, balance, opening_balance FROM account ORDER BY 1").fetchall()
    assert found == [("ann", Decimal("2.5"), Decimal("7.5")), ("bob", 1, None)]
    assert one(connection, "SELECT sum(issued - burned) FROM global_token_balance") == (-5,)
    assert_books_balance(connection)


def test_times_never_run_backwards_though_the_clock_does(connection):
    moments = [NOON, NOON - timedelta(hours=3), NOON + timedelta(seconds=1)]
    for number, moment in enumerate(moments):
        apply(connection, accrual("ann", 1, f"a{number}"), burn("ann", 99, f"b{number}"), clock=moment)
    for table in ("transaction_record", "rejected_event"):
        found = [row[0] for row in connection.execute(f"SELECT created_at FROM {table} ORDER BY 1")]
        assert found == [NOON, NOON, moments[2]]
    assert_books_balance(connection)


def test_amounts_keep_all_their_digits_from_message_to_column_in_a_thread_with_a_hostile_context(connection):
    with localcontext(Context(prec=5, Emax=3, Emin=-3, traps=[Inexact, Rounded])):
        outcomes = apply(
            connection,
            accrual("ann", "99999999999999999999.123456789012345678", "k1"),
            burn("ann", "11111111111111111111.000000000000000001", "k2"),
            accrual("bob", TINY, "k1"),
        )
        text = told(outcomes)
    assert text == [
        "applied #1: 0 → 99999999999999999999.123456789012345678",
        "applied #2: 99999999999999999999.123456789012345678 → 88888888888888888888.123456789012345677",
        f"applied #1: 0 → {TINY}",
    ]
    query = "SELECT amount::text, balance_after::text FROM transaction_record ORDER BY user_id, sequence"
    assert connection.execute(query).fetchall() == [
        ("99999999999999999999.123456789012345678", "99999999999999999999.123456789012345678"),
        ("11111111111111111111.000000000000000001", "88888888888888888888.123456789012345677"),
        (TINY, TINY),
    ]
    assert one(connection, "SELECT issued::text, burned::text FROM global_token_balance WHERE id = 1") == (
        "99999999999999999999.123456789012345679",
        "11111111111111111111.000000000000000001",
    )
    assert_books_balance(connection)


def test_the_largest_balance_is_reached_and_not_passed(connection):
    outcomes = apply(
        connection,
        accrual("ann", LARGEST, "k1"),
        accrual("ann", TINY, "k2"),
        burn("ann", TINY, "k3"),
        accrual("ann", TINY, "k4"),
        burn("ann", LARGEST, "k5"),
    )
    assert told(outcomes) == [
        f"applied #1: 0 → {LARGEST}",
        f"rejected: balance limit, {LARGEST} held, {TINY} more would pass 20 digits",
        f"applied #2: {LARGEST} → 99999999999999999999.999999999999999998",
        f"applied #3: 99999999999999999999.999999999999999998 → {LARGEST}",
        f"applied #4: {LARGEST} → 0",
    ]
    assert_books_balance(connection)


def test_two_mints_near_the_limit_stop_nobody_and_the_supply_has_room_for_all(connection):
    for number in range(12):
        outcomes = apply(
            connection,
            accrual(f"rich{number}", LARGEST, "mint"),
            accrual(f"rich{number}", LARGEST, "again"),
            accrual("ann", 1, f"k{number}"),
        )
        assert isinstance(outcomes[1], Rejected)
        assert outcomes[1].reason is Reason.BALANCE_LIMIT
        assert outcomes[2] == Applied(number + 1, number, number + 1)
    issued = one(connection, "SELECT issued FROM global_token_balance WHERE id = 1")[0]
    assert str(issued) == "1200000000000000000011.999999999999999988"
    assert_books_balance(connection)


def executed(connection, tmp_path, *events):
    """How many statements a batch is, as the protocol shows it."""
    path = tmp_path / "trace"
    with path.open("w") as file:
        connection.pgconn.trace(file.fileno())
        connection.pgconn.set_trace_flags(Trace.SUPPRESS_TIMESTAMPS)
        outcomes = apply(connection, *events)
        connection.pgconn.untrace()
    messages = [line.split("\t")[2] for line in path.read_text().splitlines() if line.startswith("F\t")]
    return sum(message in {"Query", "Execute"} for message in messages), outcomes


def test_a_batch_is_the_same_few_statements_whatever_its_size(connection, tmp_path):
    def batch(size, name):
        for number in range(size):
            user, key = f"user{number % 300}", f"{name}{number}"
            yield from (accrual(user, 2, key), burn(user, 1, f"b{key}"), burn(user, 10**9, f"r{key}"))
            yield accrual(user, 3, key)  # a conflict

    opening, _ = executed(connection, tmp_path, *batch(300, "o"))  # new accounts: locked once, then inserted
    small, few = executed(connection, tmp_path, *batch(1, "s"))
    large, many = executed(connection, tmp_path, *batch(500, "l"))
    assert len(many) == 500 * len(few)
    print(f"statements a batch: {small} for {len(few)} events, {large} for {len(many)}, {opening} with new accounts")
    assert small == large <= 12
    assert opening <= 16
    stored, _ = executed(connection, tmp_path, *batch(500, "l"))  # all decided: conflicts are explained from the tables
    assert stored <= small


def letter(**changes):
    origin = Origin("tokens.burn", "id-1", b'{"a":1}', {"lang": "py"})
    return NewDeadLetter("invalid_event", "amount is missing.", origin._replace(**changes))


def test_a_message_delivered_twice_is_one_dead_letter_that_counts(connection):
    apply_batch(connection, [], stripe=1, letters=[letter(), letter()], clock=NOON)
    apply_batch(connection, [], stripe=1, letters=[letter(headers={"later": "delivery"})])
    assert one(
        connection, "SELECT count(*), max(deliveries), bool_and(last_seen_at > first_seen_at) FROM dead_letter"
    ) == (*(1, 3, True),)


@pytest.mark.parametrize(
    "change", [{"task": "tokens.accrue"}, {"message_id": "id-2"}, {"body": b'{"a":2}'}, {"event_index": 0}]
)
def test_another_message_is_another_dead_letter(connection, change):
    apply_batch(connection, [], stripe=1, letters=[letter(), letter(**change)])
    assert count(connection, "dead_letter") == 2


def test_a_conflict_delivered_twice_is_one_dead_letter_that_counts(connection):
    events = [accrual("ann", 1, "k"), accrual("ann", 2, "k")]
    origin = Origin("tokens.accrue", "id-1", b"{}")
    for _ in range(2):
        apply_batch(connection, [Delivery.of(event, origin) for event in events], stripe=1)
    assert one(connection, "SELECT count(*), max(deliveries) FROM dead_letter") == (1, 2)


def test_a_letter_is_kept_whatever_is_in_it(connection):
    nasty = "a\x00b\ud800c\\N\t\n'\"{}"
    apply_batch(
        connection,
        [],
        stripe=1,
        letters=[
            NewDeadLetter(
                "undecodable",
                f"It is {nasty}.",
                Origin(nasty, nasty, b"\x00\xff\\x", {nasty: [nasty, {"deep": None}]}),
                event=json.dumps({"user_id": "\x00\ud800"}),
            )
        ],
    )
    task, message_id, detail, body, headers = one(
        connection, "SELECT task, message_id, detail, body, headers::text FROM dead_letter"
    )
    assert task == message_id == "a\N{REPLACEMENT CHARACTER}b?c\\N\t\n'\"{}"
    assert detail == f"It is {task}."
    assert body == b"\x00\xff\\x"
    assert json.loads(headers) == {nasty: [nasty, {"deep": None}]}


def test_a_legacy_row_is_never_a_stripe(connection):
    with pytest.raises(RuntimeError, match="row 0 of global_token_balance is a legacy row"):
        apply_batch(connection, sent(accrual("ann", 1, "k")), stripe=0)
    assert count(connection, "account") == 0


def test_processes_spread_over_the_stripes_and_stay_clear_of_a_legacy_row_whatever_its_number():
    assert {stripe_of("host", pid, 16) for pid in range(100, 116)} == set(range(-16, 0))
    containers = {stripe_of(host, 7, 1000) for host in map("c{:011x}".format, range(50))}
    assert len(containers) > 40
    assert all(-1000 <= stripe < 0 for stripe in containers)


def test_batches_of_two_stripes_add_up(connection):
    for stripe in (1, 2, 1):
        apply_batch(connection, sent(accrual("ann", 1, f"k{random.Random(stripe).random()}")), stripe=stripe)
    assert_books_balance(connection)
