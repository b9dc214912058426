"""The canonical form and its hash: written out by hand here, so that it cannot change unnoticed."""

from __future__ import annotations

import hashlib

import pytest

from schema.events import parse_event
from tests.kit.events import accrual, burn
from worker.ledger.apply import apply_batch
from worker.ledger.chain import VERSION, micros, money, payload_hash

from .support import NOON, assert_books_balance, sent

#: What version 1 says of two records and a rejection of one account. A change here is a new version: what is stored
#: was hashed like this.
FIRST = accrual(
    "alice", "1.5", "order-1", metadata={"a": 1.50, "Grüße": "né"}, occurred_at="2026-01-30T01:00:00.000001+01:00"
)
SECOND = burn("alice", "0.000000000000000001", "order-2")
THIRD = burn("alice", "100", "order-3")

METADATA = '{"Grüße":"né","a":1.5}'
OCCURRED = "1769731200000001"
CREATED = "1769860800123456"
HALF = "1.500000000000000000"
LESS = "1.499999999999999999"
TINY = "0.000000000000000001"
ZERO = "0.000000000000000000"
HUNDRED = "100.000000000000000000"

#: (payload hash, hash, version) of FIRST, SECOND and THIRD, applied at NOON in this order to a new account.
GOLDEN = [
    (
        "87cc8f7c53caa4e7974614f6a90aff26876968cd92338b247a87bd1f9f769023",
        "66c2cd9e166d63962ae7e38b5a6197fd903a74c0a001efe8f34bcc9c20193b9b",
        1,
    ),
    (
        "cd04d3e01f3777de7ce959839496a6c93db37853b26bd92e900276270ba144a1",
        "d7265a57001d34445c57ffdd631af9a27e45912628b154a1a0ddfd4c242e3644",
        1,
    ),
    (
        "0d526396f214446b312d461f3142044f5caebc669c68bf53bf24e1d400a5bfe2",
        "c44f0da8efe60fc6579060bb0d79a26d1e0c5bc3df187a9a851334d37325a086",
        1,
    ),
]


def sha256(*fields):
    """Of fields, each with its length in bytes before it; nothing is a tilde."""
    form = b"".join(b"~" if field is None else b"%d:%b" % (len(field.encode()), field.encode()) for field in fields)
    return hashlib.sha256(form).hexdigest()


def stored(connection):
    query = """
        SELECT encode(payload_hash, 'hex'), encode(hash, 'hex'), hash_version FROM transaction_record
        UNION ALL SELECT encode(payload_hash, 'hex'), encode(hash, 'hex'), hash_version FROM rejected_event
    """
    return sorted(connection.execute(query).fetchall())


def test_version_1_is_the_form_written_here(connection):
    apply_batch(connection, sent(FIRST, SECOND, THIRD), stripe=1, clock=NOON)

    content = ["accrual", "alice", HALF, "source", "payroll", "metadata", METADATA, "occurred_at", OCCURRED]
    paid = sha256(*content)
    spent = sha256("burn", "alice", TINY, "action", "render")
    refused = sha256("burn", "alice", HUNDRED, "action", "render")
    first = sha256(
        *("alice", "1", "order-1", "accrual", HALF, "payroll", METADATA, OCCURRED, ZERO, HALF, CREATED, paid, None)
    )
    second = sha256(*("alice", "2", "order-2", "burn", TINY, "render", None, None, HALF, LESS, CREATED, spent, first))
    rejection = sha256(
        *("alice", "1", "order-3", "burn", HUNDRED, "render", None, None),
        *("insufficient_tokens", LESS, CREATED, refused, None),
    )
    assert stored(connection) == sorted([(paid, first, 1), (spent, second, 1), (refused, rejection, 1)])
    assert VERSION == 1


def test_version_1_has_these_hashes(connection):
    """What is stored stays provable only as long as these stay the same."""
    apply_batch(connection, sent(FIRST, SECOND, THIRD), stripe=1, clock=NOON)
    assert stored(connection) == sorted(GOLDEN)


NASTY_TEXTS = [
    "a",
    " ",
    "~",
    "1:1",
    "\t\n\r\\\b\f\v",
    "\\N",
    "\\.",
    "\\\\x00",
    "'\";--{}[]()",
    "Grüße",
    "e\u0301 is not \u00e9",
    "\u2028\ufeff\u200d\x7f\x01",
    "漢字🎉\U0010ffff",
    "🎉" * 128,
]


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_postgresql_recomputes_what_python_hashed_whatever_the_text(connection, text):
    metadata = {text: [text, {"n": "1e-18", "deep": [None, True, -1.50, 10**40]}]}
    apply_batch(
        connection,
        sent(
            accrual(text, "1.10", text, source=text),
            accrual(text, "88888888888888888888", f"{text}2"[-200:], metadata=metadata),
            accrual(text, "1", f"{text}3"[-200:], occurred_at="2000-01-01T00:00:00Z", metadata={}),
            burn(text, "0.000000000000000001", f"{text}4"[-200:], occurred_at="2026-01-01T00:00:00.000001Z"),
            burn(text, "88888888888888888888", f"{text}5"[-200:], action=text, metadata=metadata),
            burn(text, "88888888888888888888", f"{text}6"[-200:]),
        ),
        stripe=1,
    )
    found = connection.execute("SELECT user_id, idempotency_key, metadata::text FROM transaction_record").fetchall()
    assert {row[0] for row in found} == {text}
    assert text in {row[1] for row in found}
    assert {row[2] for row in found} == {None, "{}", accrual("a", 1, "k", metadata=metadata).metadata}
    assert connection.execute("SELECT rejections FROM account").fetchone()[0] > 0
    assert_books_balance(connection)


def test_fields_cannot_borrow_from_their_neighbours():
    """The length before each field: what reads the same in a row is not the same event."""
    events = [
        accrual("a", 1, "k", source="bc"),
        accrual("a", 1, "k", source="b", metadata={}),
        accrual("a1:", 1, "k", source="bc"),
        accrual("a", 1, "k", source="bc8:metadata2:{}"),
        accrual("a", 1, "k", source="bc", metadata={}),
        burn("a", 1, "k", action="bc"),
        accrual("a", 1, "k", source="bc", occurred_at="2026-01-01T00:00:00Z"),
        accrual("a", "1.000000000000000001", "k", source="bc"),
    ]
    assert len({payload_hash(event) for event in events}) == len(events)


def test_the_key_is_not_part_of_the_content():
    assert payload_hash(accrual("a", 1, "k")) == payload_hash(accrual("a", 1, "another"))


def test_an_absent_field_is_the_same_as_null():
    fields = {"type": "burn", "user_id": "a", "amount": 1, "idempotency_key": "k", "action": "x"}
    null = parse_event(fields | {"metadata": None, "occurred_at": None})
    assert payload_hash(parse_event(fields)) == payload_hash(null)


def test_money_and_moments_are_written_exactly():
    event = accrual("a", "12345678901234567890.000000000000000001", "k", occurred_at="2026-01-31T23:59:59.999999Z")
    assert money(event.amount) == "12345678901234567890.000000000000000001"
    assert micros(event.occurred_at) == "1769903999999999"
