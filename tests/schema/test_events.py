"""schema/events.py: which data is an event, and the sentence that names field, value and rule of data that is not."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Context, Decimal, Inexact, Rounded, localcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.canonical import plain_number, read_json
from schema.events import MAX_METADATA_BYTES, Accrual, Burn, InvalidEvent, event_json, parse_event
from tests.ledger.support import repeatable
from tests.schema.strategies import json_values, texts

FIELDS = {"type": "burn", "user_id": "ann", "amount": "1", "idempotency_key": "k", "action": "render"}

DIGITS = 'must be digits with at most 20 before and 18 after the point, such as "12.5"'
RANGE = "must be more than 0 and at most 1000000000000"
NUMBER = 'must be a string such as "1.5" or a JSON integer: other numbers lose digits on their way'
MOMENT = 'must be RFC 3339 with an offset and at most microseconds, such as "2026-01-31T12:00:00Z"'
CALENDAR = "must be a moment that the calendar has"
EARLIEST = "must not be before 2000-01-01"
SURROGATE = "must not hold half of a surrogate pair, which is not a character"
BYTES = "must be at most 16384 bytes long as compact JSON"
PLAIN = "metadata is an object: must be plain JSON at most 8 deep, but"
E_ACUTE = "\\xe9"  # as an error shows it


def parsed(**changes):
    return parse_event(FIELDS | changes)


def refusal(data):
    with pytest.raises(InvalidEvent) as refused:
        parse_event(data)
    return str(refused.value)


def of_json(**changes):
    """The event of these JSON texts, as a worker reads it; `...` leaves a field out."""
    fields = {name: json.dumps(value) for name, value in FIELDS.items()} | changes
    return read_json("{" + ",".join(f'"{name}":{text}' for name, text in fields.items() if text != "...") + "}")


def test_an_event_has_what_was_sent():
    event = parsed(amount="12.50", occurred_at="2026-01-31T12:00:00.5+01:00", metadata={"b": 1, "a": [True, None]})
    assert event == Burn(
        **FIELDS | {"amount": "12.5", "occurred_at": event.occurred_at, "metadata": {"a": [True, None], "b": 1}}
    )
    assert (event.type, event.user_id, event.idempotency_key, event.purpose) == ("burn", "ann", "k", "render")
    assert event.amount == Decimal("12.5")
    assert event.occurred_at == datetime(2026, 1, 31, 11, 0, 0, 500_000, tzinfo=UTC)
    assert event.metadata == '{"a":[true,null],"b":1}'


def test_the_name_of_the_task_says_the_type():
    accrual = {"user_id": "ann", "amount": 1, "idempotency_key": "k", "source": "payroll"}
    assert parse_event(accrual, type_="accrual") == parse_event(accrual | {"type": "accrual"}) == Accrual(**accrual)
    with pytest.raises(InvalidEvent, match=r"^type is 'burn': must be 'accrual'\.$"):
        parse_event(accrual | {"type": "burn"}, type_="accrual")


@pytest.mark.parametrize(
    ("amount", "value"),
    [
        ("1", "1"),
        ("0001", "1"),
        ("1.50", "1.5"),
        ("0.000000000000000001", "0.000000000000000001"),
        ("999999999999.999999999999999999", "999999999999.999999999999999999"),
        (1_000_000_000_000, "1000000000000"),
        ({"__type__": "decimal", "__value__": "12.50"}, "12.5"),
        ({"__type__": "decimal", "__value__": "1E+3"}, "1000"),
        ({"__type__": "decimal", "__value__": "1E-18"}, "0.000000000000000001"),
        (Decimal("1E-18"), "0.000000000000000001"),
    ],
)
def test_an_amount_is_exact_whatever_the_ambient_context(amount, value):
    with localcontext(Context(prec=4, Emax=2, Emin=-2, traps=[Inexact, Rounded])):
        event = (
            parsed(amount=amount) if isinstance(amount, Decimal) else parse_event(of_json(amount=json.dumps(amount)))
        )
        text = plain_number(event.amount)
    assert text == value


def test_the_largest_amount_is_a_setting():
    fields = FIELDS | {"amount": "99999999999999999999.0"}
    assert parse_event(fields, max_amount=10**20 - 1).amount == 10**20 - 1
    with pytest.raises(InvalidEvent, match="at most 5"):
        parse_event(FIELDS | {"amount": "5.000000000000000001"}, max_amount=5)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2000-01-01T00:00:00Z", datetime(2000, 1, 1, tzinfo=UTC)),
        ("1999-12-31T23:00:00-01:00", datetime(2000, 1, 1, tzinfo=UTC)),
        ("2026-01-31t12:00:00.000001z", datetime(2026, 1, 31, 12, 0, 0, 1, tzinfo=UTC)),
        ("2026-01-31 12:00:00.1+00:00", datetime(2026, 1, 31, 12, 0, 0, 100_000, tzinfo=UTC)),
        ({"__type__": "datetime", "__value__": "2026-01-31T12:00:00+02:00"}, datetime(2026, 1, 31, 10, tzinfo=UTC)),
        (datetime(2026, 1, 31, 12, tzinfo=UTC), datetime(2026, 1, 31, 12, tzinfo=UTC)),
        ("9999-12-31T23:59:59.999999Z", datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        (None, None),
    ],
)
def test_a_moment_is_an_instant_with_microseconds(text, moment):
    assert parsed(occurred_at=text).occurred_at == moment


@pytest.mark.parametrize(
    ("field", "text", "sentence"),
    [
        # The type
        ("type", "...", "type is missing: must be accrual or burn."),
        ("type", "null", "type is null: must be accrual or burn."),
        ("type", '"Burn"', "type is 'Burn': must be accrual or burn."),
        ("type", '["burn"]', "type is a list: must be accrual or burn."),
        # The fields
        ("user_id", "...", "user_id is missing."),
        ("action", "...", "action is missing."),
        ("acton", '"typo"', "'acton' is not a field of this event."),
        ("source", '"x"', "'source' is not a field of this event."),
        ("\\u202e\\n", "1", "'\\u202e\\n' is not a field of this event."),
        ("\\ud800", "1", "'\\ud800' is not a field of this event."),
        # Texts
        *(
            (name, text, f"{name} is {shown}: {rule}.")
            for name in ("user_id", "idempotency_key", "action")
            for text, shown, rule in (
                ('""', "''", "must not be empty"),
                ("7", "7", "must be a string"),
                ("1.5", "1.5", "must be a string"),
                ("null", "null", "must be a string"),
                ("true", "true", "must be a string"),
                ('["a"]', "a list", "must be a string"),
                ("{}", "an object", "must be a string"),
                ('"a\\u0000b"', "'a\\x00b'", "must not hold a NUL character"),
                ('"\\ud800"', "'\\ud800'", SURROGATE),
            )
        ),
        ("user_id", f'"{"é" * 128}x"', f"user_id is '{E_ACUTE * 14}...': must be at most 128 characters long."),
        ("action", f'"{"x" * 201}"', f"action is '{'x' * 56}...': must be at most 200 characters long."),
        # The amount
        *(
            ("amount", json.dumps(text), f"amount is {text!a}: {DIGITS}.")
            for text in (
                *("", "-1", "+1", "1e3", "1.", ".5", " 1", "1 ", "1\n", "1_000", "1,5", "0x1"),
                *("٣", "１", "NaN", "Infinity", "1" * 21, "1." + "1" * 19),
            )
        ),
        ("amount", '"' + "9" * 5000 + '"', f"amount is '{'9' * 56}...': {DIGITS}."),
        ("amount", "-1", f"amount is -1: {DIGITS}."),
        ("amount", "1" + "0" * 400, f"amount is an integer of more than 40 digits: {DIGITS}."),
        ("amount", "1" + "0" * 5000, f"amount is a number of 5001 characters: {DIGITS}."),
        ("amount", "-1" + "0" * 5000, f"amount is a number of 5002 characters: {DIGITS}."),
        ("amount", "null", f"amount is null: {DIGITS}."),
        ("amount", "[]", f"amount is a list: {DIGITS}."),
        *(
            ("amount", text, f"amount is an object: {DIGITS}.")
            for text in (
                "{}",
                '{"__type__":"decimal","__type__":"decimal","__value__":"1"}',
                '{"__type__":"datetime","__value__":"1"}',
                '{"__type__":"decimal","__value__":"1","more":1}',
                *(
                    f'{{"__type__":"decimal","__value__":{json.dumps(value)}}}'
                    for value in ("NaN", "1_0", "1e5", "-1", "1E-19", "1E+999", "1..1", "١", "9" * 90, 1, None, "1E+40")
                ),
            )
        ),
        *(
            ("amount", text, f"amount is {shown}: {NUMBER}.")
            for text, shown in {
                "1.5": "1.5",
                "1.0": "1.0",
                "1e3": "1E+3",
                "NaN": "NaN",
                "-Infinity": "-Infinity",
                "true": "true",
                "false": "false",
                "1e9999999999999999999999": "Infinity",
                "-1e-9999999999999999999999": "-Infinity",
            }.items()
        ),
        *(
            ("amount", text, f"amount is {text.replace(chr(34), chr(39))}: {RANGE}.")
            for text in ("0", '"0"', '"0.000"', "1000000000001", '"1000000000000.000000000000000001"')
        ),
        # The moment
        *(
            ("occurred_at", json.dumps(text), f"occurred_at is {text!a}: {rule}.")
            for rule, values in {
                MOMENT: (
                    *("", "now", "2026-01-31", "2026-01-31T12:00:00", "2026-01-31T12:00Z", "20260131T120000Z"),
                    *("2026-01-31T12:00:00.1234567Z", "1700000000", "2026-01-31T24:00:00Z", "2026-01-31T24:00:01Z"),
                    *("2026-01-31T12:00:00+05:60", "2026-01-31T12:00:00+24:00", "2026-01-31T12:00:00+25:00"),
                    *("٢٠٢٦-01-31T12:00:00Z", "2026-01-31T12:00:00Z\n"),
                ),
                CALENDAR: (
                    *("2026-02-30T00:00:00Z", "2026-01-31T12:00:60Z", "2026-01-31T12:00:61Z", "0000-01-01T00:00:00Z"),
                    *("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"),
                ),
                EARLIEST: ("1999-12-31T23:59:59Z", "1999-12-31T23:59:59.999999Z"),
            }.items()
            for text in values
        ),
        *(
            ("occurred_at", text, f"occurred_at is {shown}: {MOMENT}.")
            for text, shown in {
                "1700000000": "1700000000",
                "1.5": "1.5",
                "true": "true",
                "[]": "a list",
                "{}": "an object",
                '{"__type__":"decimal","__value__":"2026-01-31T12:00:00Z"}': "an object",
            }.items()
        ),
        # The metadata
        *(
            ("metadata", text, f"metadata is {shown}: must be a JSON object.")
            for text, shown in {"[]": "a list", '"{}"': "'{}'", "1": "1", "true": "true"}.items()
        ),
        ("metadata", f'{{"a":"{"x" * 16384}"}}', f"metadata is an object: {BYTES}."),
        *(
            ("metadata", text, f"{PLAIN} {why}.")
            for text, why in {
                '{"a":1,"a":2}': "it has the key 'a' twice",
                '{"a":{"b":1,"b":1}}': "a has the key 'b' twice",
                '{"a":NaN}': "a is NaN, which is not a number",
                '{"a":[1,-Infinity]}': "a[1] is -Infinity, which is not a number",
                '{"a":{"b":[1e9999999999999999999999]}}': "a.b[0] is Infinity, which is not a number",
                '{"a":1e401}': "a is 1E+401, beyond ten to the power of ±400",
                '{"a":1e-401}': "a is 1E-401, beyond ten to the power of ±400",
                '{"a":%s}' % ("9" * 5000): f"a is {'9' * 40}, beyond ten to the power of ±400",
                '{"a":"\\u0000"}': "a holds a NUL character, which PostgreSQL cannot store",
                '{"\\u0000":1}': "it holds a NUL character, which PostgreSQL cannot store",
                '{"a":"\\ud800"}': "a holds half of a surrogate pair, which is not a character",
                '{"\\u202e\\n":"\\ud800"}': "\\u202e\\n holds half of a surrogate pair, which is not a character",
                '{"a":[[[[[[[[1]]]]]]]]}': "a[0][0][0][0][0][0][0] is nested too deep",
                '{"a":{"b":{"c":{"d":{"e":{"f":{"g":{"h":{}}}}}}}}}': "a.b.c.d.e.f.g.h is nested too deep",
                '{"a":{"__type__":"uuid","__value__":"x"}}': "a holds a Python 'uuid'; send plain JSON",
                '{"a":{"__type__":"\\ud800\\u0000","__value__":"x"}}': (
                    "a holds a Python '\\ud800\\x00'; send plain JSON"
                ),
            }.items()
        ),
    ],
)
def test_a_broken_rule_is_one_sentence_with_field_value_and_rule(field, text, sentence):
    assert refusal(of_json(**{field: text})) == sentence


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        *(("amount", Decimal(value), DIGITS) for value in ("NaN", "Infinity", "-1", "1E-19", "1E+999999", "1E-999999")),
        *(("amount", value, NUMBER) for value in (1.5, float("nan"))),
        pytest.param("amount", 10**5000, DIGITS, id="an integer that Python does not print"),
        ("occurred_at", datetime(2026, 1, 31), MOMENT),  # noqa: DTZ001 - without an offset
        ("action", b"x", "must be a string"),
    ],
)
def test_values_of_python_break_the_same_rules(field, value, rule):
    sentence = refusal(FIELDS | {field: value})
    assert sentence.startswith(f"{field} is ")
    assert sentence.endswith(f": {rule}.")
    assert len(sentence) < 250


def test_up_to_three_broken_rules_are_in_the_sentence():
    assert refusal(of_json(user_id="5", amount='"x"', action="...", more="1")) == (
        f"user_id is 5: must be a string; amount is 'x': {DIGITS}; action is missing."
    )
    assert len(refusal(of_json(user_id=f'"{"x" * 999}"', amount="...", action="...", **{"x" * 99: "1"}))) < 300


@pytest.mark.parametrize(
    ("text", "shown"),
    {"null": "null", "[]": "a list", '"x"': "'x'", "1": "1", "1.5": "1.5", "true": "true", "[{}]": "a list"}.items(),
)
def test_an_event_is_a_json_object(text, shown):
    assert refusal(read_json(text)) == f"An event must be a JSON object, not {shown}."


def test_an_event_has_no_field_twice():
    text = '{"type":"burn","user_id":"a","amount":"1","amount":"2","idempotency_key":"k","action":"x"}'
    assert refusal(read_json(text)) == "The event has the field 'amount' twice."


@pytest.mark.parametrize(
    "text",
    ['{"a":{"b":{"c":{"d":{"e":{"f":{"g":{"h":1}}}}}}}}', '{"a":1e400}', '{"a":1e-400}', '{"a":"\\ud83c\\udf89"}'],
)
def test_metadata_at_its_limits_is_accepted(text):
    assert parsed(metadata=read_json(text)).metadata is not None


def test_metadata_nested_as_deep_as_json_can_be_read_is_refused():
    deep = "[" * 900 + "]" * 900
    assert "nested too deep" in refusal(FIELDS | {"metadata": read_json(f'{{"a":{deep}}}')})
    assert "Python list" in refusal(FIELDS | {"metadata": read_json(f'{{"__type__":{deep},"__value__":1}}')})


def test_metadata_is_measured_in_bytes_of_its_canonical_text():
    fits = MAX_METADATA_BYTES - len('{"a":""}')
    assert len(parsed(metadata={"a": "x" * fits}).metadata) == MAX_METADATA_BYTES
    assert f"at most {MAX_METADATA_BYTES} bytes" in refusal(FIELDS | {"metadata": {"a": "x" * (fits + 1)}})
    assert parsed(metadata={"a": "é" * (fits // 2)}).metadata
    assert f"at most {MAX_METADATA_BYTES} bytes" in refusal(FIELDS | {"metadata": {"a": "é" * (fits // 2 + 1)}})


any_field = st.one_of(
    json_values,
    st.text(),
    st.sampled_from(["1", "ann", "2026-01-01T00:00:00Z", "accrual", "burn", float("inf")]),
)


@settings(repeatable, max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([*FIELDS, "source", "occurred_at", "metadata", "__type__", "\ud800"]), any_field, max_size=9
    ),
    st.booleans(),
)
def test_any_data_is_an_event_or_refused_in_one_short_sentence(data, mostly_right):
    if mostly_right:
        data = FIELDS | data
    try:
        event = parse_event(data)
    except InvalidEvent as refused:
        sentence = str(refused)
        assert sentence.endswith(".")
        assert len(sentence) < 600
        assert "\x00" not in sentence
        sentence.encode()  # it goes to logs and task events
    else:
        assert parse_event(read_json(event_json(event)), max_amount=10**20) == event


@settings(repeatable, max_examples=100)
@given(
    st.sampled_from([Accrual, Burn]),
    texts,
    st.integers(1, 10**30),
    texts,
    texts,
    st.none() | st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    st.none() | st.dictionaries(texts, json_values, max_size=3),
)
def test_an_event_sent_as_its_json_is_the_same_event(model, user, units, key, purpose, occurred_at, metadata):
    fields = {
        "user_id": user,
        "amount": f"{units // 10**18}.{units % 10**18:018d}",
        "idempotency_key": key,
        "source" if model is Accrual else "action": purpose,
        "occurred_at": occurred_at,
    }
    try:
        event = model(**fields, metadata=metadata)
    except ValueError:
        event = model(**fields)  # that metadata was too deep
    sent = event_json(event)
    assert parse_event(read_json(sent), max_amount=10**20) == event
    assert event_json(parse_event(read_json(sent))) == sent
