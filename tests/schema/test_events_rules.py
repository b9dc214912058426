"""Every rule of an event, as the sentence that a producer reads who breaks it: field, value (shortened), rule.

What passes, and more values against each rule, are in tests/schema/test_events.py.
"""

from __future__ import annotations

import pytest

from schema.canonical import read_json
from schema.events import InvalidEvent, parse_event

FIELDS = {
    "type": '"burn"',
    "user_id": '"ann"',
    "amount": '"1"',
    "idempotency_key": '"k"',
    "action": '"render"',
}

DIGITS = 'must be digits with at most 20 before and 18 after the point, such as "12.5"'
RANGE = "must be more than 0 and at most 1000000000000"
NUMBER = 'must be a string such as "1.5" or a JSON integer: other numbers lose digits on their way'
MOMENT = 'must be RFC 3339 with an offset and at most microseconds, such as "2026-01-31T12:00:00Z"'
CALENDAR = "must be a moment that the calendar has"
SURROGATE = "must not hold half of a surrogate pair, which is not a character"
LONG = "must be at most 16384 bytes long as compact JSON"
E_ACUTE = "\\xe9"  # as it is shown
PLAIN = "metadata is an object: must be plain JSON at most 8 deep, but"


def sentence(**changes: str) -> str:
    """The refusal of the event whose fields are these JSON texts; `...` leaves one out."""
    fields = {name: text for name, text in (FIELDS | changes).items() if text != "..."}
    with pytest.raises(InvalidEvent) as refused:
        parse_event(read_json("{" + ",".join(f'"{name}":{text}' for name, text in fields.items()) + "}"))
    return str(refused.value)


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        # The type
        ("type", "...", "type is missing: must be accrual or burn."),
        ("type", "null", "type is null: must be accrual or burn."),
        ("type", '"Burn"', "type is 'Burn': must be accrual or burn."),
        # Which fields there are
        ("user_id", "...", "user_id is missing."),
        ("source", '"x"', "'source' is not a field of this event."),
        ("\\u202e\\n", "1", "'\\u202e\\n' is not a field of this event."),
        ("\\ud800", "1", "'\\ud800' is not a field of this event."),
        # Names and labels
        *((name, '""', f"{name} is '': must not be empty.") for name in ("user_id", "idempotency_key", "action")),
        *((name, "7", f"{name} is 7: must be a string.") for name in ("user_id", "idempotency_key", "action")),
        *((name, "null", f"{name} is null: must be a string.") for name in ("user_id", "idempotency_key", "action")),
        ("user_id", "true", "user_id is true: must be a string."),
        ("user_id", '["a"]', "user_id is a list: must be a string."),
        ("user_id", f'"{"é" * 128}x"', f"user_id is '{E_ACUTE * 14}...': must be at most 128 characters long."),
        ("action", f'"{"x" * 201}"', f"action is '{'x' * 56}...': must be at most 200 characters long."),
        ("idempotency_key", '"a\\u0000b"', "idempotency_key is 'a\\x00b': must not hold a NUL character."),
        ("action", '"\\ud800"', f"action is '\\ud800': {SURROGATE}."),
        # The amount
        *(
            ("amount", f'"{text}"', f"amount is '{text}': {DIGITS}.")
            for text in ("", "-1", "+1", "1e3", "1_000", " 1", "1.", ".5")
        ),
        ("amount", '"\\u0663"', f"amount is '\\u0663': {DIGITS}."),
        ("amount", '"NaN"', f"amount is 'NaN': {DIGITS}."),
        ("amount", f'"0.{"1" * 19}"', f"amount is '0.{'1' * 19}': {DIGITS}."),
        ("amount", "-1", f"amount is -1: {DIGITS}."),
        ("amount", "1" + "0" * 400, f"amount is an integer of more than 40 digits: {DIGITS}."),
        ("amount", "1" + "0" * 5000, f"amount is a number of 5001 characters: {DIGITS}."),
        ("amount", "null", f"amount is null: {DIGITS}."),
        ("amount", "{}", f"amount is an object: {DIGITS}."),
        ("amount", '{"__type__":"decimal","__value__":"NaN"}', f"amount is an object: {DIGITS}."),
        ("amount", '{"__type__":"decimal","__type__":"decimal","__value__":"1"}', f"amount is an object: {DIGITS}."),
        *(
            ("amount", text, f"amount is {shown}: {NUMBER}.")
            for text, shown in {
                "1.5": "1.5",
                "1.0": "1.0",
                "1e3": "1E+3",
                "NaN": "NaN",
                "-Infinity": "-Infinity",
                "true": "true",
                "1e9999999999999999999999": "Infinity",
                "-1e-9999999999999999999999": "-Infinity",
            }.items()
        ),
        ("amount", "0", f"amount is 0: {RANGE}."),
        ("amount", '"0.000"', f"amount is '0.000': {RANGE}."),
        ("amount", "1000000000001", f"amount is 1000000000001: {RANGE}."),
        ("amount", '"1000000000000.000000000000000001"', f"amount is '1000000000000.000000000000000001': {RANGE}."),
        # The moment
        *(
            ("occurred_at", f'"{text}"', f"occurred_at is '{text}': {MOMENT}.")
            for text in (
                "",
                "now",
                "2026-01-31",
                "2026-01-31T12:00:00",
                "2026-01-31T12:00:00.1234567Z",
                "1700000000",
                "2026-01-31T24:00:00Z",
                "2026-01-31T12:00:00+05:60",
                "2026-01-31T12:00:00+24:00",
            )
        ),
        ("occurred_at", "1700000000", f"occurred_at is 1700000000: {MOMENT}."),
        *(
            ("occurred_at", f'"{text}"', f"occurred_at is '{text}': {CALENDAR}.")
            for text in (
                "2026-02-30T00:00:00Z",
                "2026-01-31T12:00:60Z",
                "0000-01-01T00:00:00Z",
                "0001-01-01T00:00:00+14:00",
                "9999-12-31T23:59:59-14:00",
            )
        ),
        (
            "occurred_at",
            '"1999-12-31T23:59:59Z"',
            "occurred_at is '1999-12-31T23:59:59Z': must not be before 2000-01-01.",
        ),
        # The metadata
        ("metadata", "[]", "metadata is a list: must be a JSON object."),
        ("metadata", '"{}"', "metadata is '{}': must be a JSON object."),
        ("metadata", f'{{"a":"{"x" * 16384}"}}', f"metadata is an object: {LONG}."),
        ("metadata", '{"a":1,"a":2}', f"{PLAIN} it has the key 'a' twice."),
        ("metadata", '{"a":NaN}', f"{PLAIN} a is NaN, which is not a number."),
        ("metadata", '{"a":1e401}', f"{PLAIN} a is 1E+401, beyond ten to the power of ±400."),
        ("metadata", '{"a":{"b":[1e9999999999999999999999]}}', f"{PLAIN} a.b[0] is Infinity, which is not a number."),
        ("metadata", '{"a":"\\u0000"}', f"{PLAIN} a holds a NUL character, which PostgreSQL cannot store."),
        (
            "metadata",
            '{"\\u202e\\n":"\\ud800"}',
            f"{PLAIN} \\u202e\\n holds half of a surrogate pair, which is not a character.",
        ),
        ("metadata", '{"a":[[[[[[[[1]]]]]]]]}', f"{PLAIN} a[0][0][0][0][0][0][0] is nested too deep."),
        ("metadata", '{"a":{"__type__":"uuid","__value__":"x"}}', f"{PLAIN} a holds a Python 'uuid'; send plain JSON."),
    ],
)
def test_a_broken_rule_is_one_sentence_with_field_value_and_rule(field, text, expected):
    assert sentence(**{field: text}) == expected


def test_several_broken_rules_are_all_said_up_to_three():
    assert sentence(user_id="5", amount='"x"', action="...", more="1") == (
        f"user_id is 5: must be a string; amount is 'x': {DIGITS}; action is missing."
    )


def test_what_is_no_object_at_all_is_said_so():
    for text, shown in {"null": "null", "[]": "a list", '"x"': "'x'", "1.5": "1.5", "true": "true"}.items():
        with pytest.raises(InvalidEvent, match=rf"^An event must be a JSON object, not {shown}\.$"):
            parse_event(read_json(text))


def test_a_field_that_stands_twice_is_named():
    with pytest.raises(InvalidEvent, match=r"^The event has the field 'user_id' twice\.$"):
        parse_event(read_json('{"type":"burn","user_id":"a","user_id":"a"}'))
