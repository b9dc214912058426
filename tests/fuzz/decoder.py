"""The decoding functions alone, by coverage: what they take is storable, what they refuse they refuse in words.

`make fuzz` runs this with atheris, in an environment of its own; not pytest. Arguments are libFuzzer's. An input that
breaks a promise ends it with a traceback and is written to a file `crash-…`.
"""

# ruff: noqa: PT017 - pytest is not there

from __future__ import annotations

import json
import sys
from decimal import Decimal

import atheris

with atheris.instrument_imports(
    include=["schema", "worker.transport.envelope", "worker.queue.parsing", "kombu.utils.json"]
):
    from schema.canonical import NotCanonical, read_json, write_json
    from schema.events import MAX_AMOUNT, MAX_METADATA_BYTES, InvalidEvent, event_json, parse_event
    from schema.messages import ACCRUE, APPLY_MANY, BURN
    from worker.queue.parsing import Unreadable, read_call, read_work
    from worker.transport import envelope

from worker.ledger.deliveries import Origin

TYPES = {ACCRUE: "accrual", BURN: "burn", None: None}


def try_all(data: bytes) -> None:
    """As bytes from the list, and as the body of a message."""
    try:
        payload = envelope.parse(data, "tokens")
    except envelope.NotAMessage as no:
        assert str(no).isascii()
        assert str(no).isprintable()
    else:
        assert isinstance(payload["properties"]["delivery_info"], dict)
        assert isinstance(payload["headers"], dict)
    try:
        call = read_call(data)
    except Unreadable as no:
        assert_sentence(str(no))
        return
    try_text(call)
    for type_ in TYPES.values():
        try_event(call, type_)
    parts = call if isinstance(call, list) and len(call) == 3 else [[], call, {}]
    for task in (ACCRUE, BURN, APPLY_MANY):
        try:
            work = read_work(task, parts[0], parts[1], Origin(task, body=data), max_amount=MAX_AMOUNT)
        except Unreadable as no:
            assert_sentence(str(no))
            continue
        assert work.outcomes
        assert len(work.letters) + len(work.deliveries) == len(work.outcomes)
        for letter in work.letters:
            assert_sentence(letter.detail)
            for text in (letter.user_id, letter.idempotency_key, letter.event):
                assert text is None or storable(text)
            assert len(letter.fingerprint) == 32


def try_text(value: object) -> None:
    try:
        text = write_json(value)
    except NotCanonical:
        return
    assert storable(text)
    assert write_json(read_json(text)) == text
    json.loads(text)


def try_event(data: object, type_: str | None) -> None:
    try:
        event = parse_event(data, type_=type_)
    except InvalidEvent as no:
        assert_sentence(str(no))
        return
    assert 1 <= len(event.user_id) <= 128
    assert all(1 <= len(text) <= 200 for text in (event.idempotency_key, event.what))
    assert all(storable(text) for text in (event.user_id, event.idempotency_key, event.what, event.metadata or ""))
    assert 0 < event.amount <= MAX_AMOUNT
    assert event.amount == round(event.amount, 18)
    assert isinstance(event.amount, Decimal)
    assert event.occurred_at is None or event.occurred_at.year >= 2000
    assert event.metadata is None or len(event.metadata.encode()) <= MAX_METADATA_BYTES
    assert parse_event(read_json(event_json(event))) == event


def storable(text: str) -> bool:
    """Whether PostgreSQL takes it as text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def assert_sentence(text: str) -> None:
    assert 10 < len(text) < 1000, text
    assert text.endswith("."), text
    assert text.isprintable(), ascii(text)
    assert set(text) <= {*map(chr, range(128)), "±"}, ascii(text)


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_all)
    atheris.Fuzz()
