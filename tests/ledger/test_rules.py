"""The rules alone: what an event does to a balance."""

from __future__ import annotations

import pickle
from datetime import timedelta
from decimal import Context, Decimal, Inexact, Rounded, localcontext

import psycopg
import pytest

from worker.ledger.deliveries import Origin
from worker.ledger.errors import SuspiciousBatch, blames_event
from worker.ledger.rules import Reason, decide, too_far_ahead

from .support import NOON

TINY = Decimal("0.000000000000000001")
FULL = Decimal("99999999999999999999.999999999999999999")  # 38 digits
LESS = Decimal("99999999999999999999.999999999999999998")


@pytest.mark.parametrize(
    ("kind", "amount", "balance", "answer"),
    [
        ("accrual", "1", "0", "1"),
        ("accrual", TINY, LESS, FULL),
        ("accrual", TINY, FULL, Reason.BALANCE_LIMIT),
        ("accrual", FULL, FULL, Reason.BALANCE_LIMIT),
        ("burn", "1", "1", "0"),
        ("burn", FULL, FULL, "0"),
        ("burn", TINY, FULL, LESS),
        ("burn", TINY, "0", Reason.INSUFFICIENT_TOKENS),
        ("burn", FULL, LESS, Reason.INSUFFICIENT_TOKENS),
    ],
)
def test_a_decision_is_exact_to_the_last_digit_whatever_the_ambient_context(kind, amount, balance, answer):
    with localcontext(Context(prec=5, Emax=3, Emin=-3, traps=[Inexact, Rounded])):
        found = decide(kind, Decimal(amount), Decimal(balance))
    assert found == (answer if isinstance(answer, Reason) else Decimal(answer))


def test_a_moment_more_than_a_day_ahead_is_too_far_and_none_is_not():
    day = timedelta(days=1)
    assert not too_far_ahead(None, NOON)
    assert not too_far_ahead(NOON + day, NOON)
    assert too_far_ahead(NOON + day + timedelta(microseconds=1), NOON)


@pytest.mark.parametrize(
    ("sqlstate", "the_events"),
    [("22003", True), ("22P02", True), ("23505", True), ("23514", True), ("54001", True)]
    + [(code, False) for code in ("54000", "40001", "40P01", "55P03", "57014", "53300", "42P01", "XX000", "P0001")],
)
def test_only_what_an_event_itself_can_cause_is_held_against_it(sqlstate, the_events):
    assert blames_event(psycopg.errors.lookup(sqlstate)("of the server")) is the_events


@pytest.mark.parametrize(
    ("error", "the_events"),
    [(error, True) for error in (psycopg.DataError, psycopg.ProgrammingError, psycopg.NotSupportedError)]
    + [(error, True) for error in (KeyError, ZeroDivisionError, TypeError, UnicodeError)]
    + [(error, False) for error in (psycopg.OperationalError, psycopg.InterfaceError, MemoryError, OSError)],
)
def test_what_psycopg_cannot_send_and_our_bugs_are_held_against_the_event_too(error, the_events):
    assert blames_event(error("without a SQLSTATE")) is the_events


def test_a_suspicious_batch_says_that_nothing_is_lost_and_what_the_first_refusal_was():
    error = SuspiciousBatch(11, "no such thing [23514]")
    assert "11 events of one batch" in str(error)
    assert "nothing is lost" in str(error)
    assert str(error).endswith("no such thing [23514]")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_event_of_a_bulk_message_has_the_origin_of_its_message():
    origin = Origin("tokens.apply_many", "id", b"body", {"retries": 1}, None, 7)
    assert origin.at(3) == Origin("tokens.apply_many", "id", b"body", {"retries": 1}, 3, 7)
