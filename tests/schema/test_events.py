"""What is an event and what is not, and the one text that a JSON value has."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Context, Decimal, Inexact, Rounded, localcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.canonical import MAX_EXPONENT, JsonText, NotCanonical, plain_number, read_json, write_json
from schema.events import MAX_METADATA_BYTES, Accrual, Burn, InvalidEvent, event_json, parse_event
from tests.ledger.support import repeatable

FIELDS = {"type": "burn", "user_id": "ann", "amount": "1", "idempotency_key": "k", "action": "render"}


def parsed(**changes):
    return parse_event(FIELDS | changes)


def as_sent(**changes):
    """As it arrives: through the JSON of a message."""
    return parse_event(read_json(json.dumps(FIELDS | changes)))


def refusal(**changes):
    with pytest.raises(InvalidEvent) as refused:
        parse_event({name: value for name, value in (FIELDS | changes).items() if value is not ...})
    return str(refused.value)


def test_an_event_is_what_was_sent():
    event = parsed(amount="12.50", occurred_at="2026-01-31T12:00:00.5+01:00", metadata={"b": 1, "a": [True, None]})
    assert event == Burn(
        **FIELDS | {"amount": "12.5", "occurred_at": event.occurred_at, "metadata": {"a": [True, None], "b": 1}}
    )
    assert (event.type, event.user_id, event.idempotency_key, event.what) == ("burn", "ann", "k", "render")
    assert event.amount == Decimal("12.5")
    assert event.occurred_at == datetime(2026, 1, 31, 11, 0, 0, 500_000, tzinfo=UTC)
    assert event.metadata == '{"a":[true,null],"b":1}'


def test_the_tasks_name_implies_the_type_and_must_not_be_contradicted():
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
        event = parsed(amount=amount) if isinstance(amount, Decimal) else as_sent(amount=amount)
        text = plain_number(event.amount)
    assert text == value


DIGITS = 'must be digits with at most 20 before and 18 after the point, such as "12.5"'
RANGE = "must be more than 0 and at most 1000000000000"
FLOAT = 'must be a string such as "1.5" or a JSON integer: other numbers lose digits on their way'


@pytest.mark.parametrize(
    ("amount", "rule"),
    [
        ("1000000000000.000000000000000001", RANGE),
        (1_000_000_000_001, RANGE),
        ("0", RANGE),
        (0, RANGE),
        ("0.000000000000000000", RANGE),
        (-1, DIGITS),
        *((text, DIGITS) for text in ("", "-1", "+1", "1e3", "1.", ".5", " 1", "1 ", "1\n", "1_000", "1,5", "0x1")),
        *((text, DIGITS) for text in ("٣", "１", "NaN", "Infinity", "1" * 21, "1." + "1" * 19, "9" * 5000)),
        pytest.param(10**5000, DIGITS, id="an integer that Python will not print"),
        pytest.param(-(10**5000), DIGITS, id="a negative one"),
        *((value, FLOAT) for value in (1.5, 1.0, float("nan"), True, False)),
        (None, DIGITS),
        ([], DIGITS),
        ({}, DIGITS),
        ({"__type__": "datetime", "__value__": "1"}, DIGITS),
        ({"__type__": "decimal", "__value__": "1", "more": 1}, DIGITS),
        *(
            ({"__type__": "decimal", "__value__": value}, DIGITS)
            for value in ("NaN", "1_0", "1e5", "-1", "1E-19", "1E+999", "1..1", "١", "9" * 90, 1, None, "1E+40")
        ),
        *((Decimal(value), DIGITS) for value in ("NaN", "Infinity", "-1", "1E-19", "1E+999999", "1E-999999")),
    ],
)
def test_what_is_no_amount_is_refused_in_a_sentence_that_says_why(amount, rule):
    sentence = refusal(amount=amount)
    assert sentence.startswith("amount is ")
    assert sentence.endswith(f": {rule}.")
    assert len(sentence) < 250
    assert sentence.isascii()


def test_a_json_fraction_is_no_amount_however_exact_it_was_written():
    with pytest.raises(InvalidEvent, match=r"^amount is 1\.50: must be a string"):
        parse_event(read_json('{"type":"burn","user_id":"a","amount":1.50,"idempotency_key":"k","action":"x"}'))


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
    "text",
    [
        *(
            "",
            "2026-01-31",
            "2026-01-31T12:00:00",
            "2026-01-31T12:00Z",
            "2026-01-31T12:00:00.1234567Z",
            "20260131T120000Z",
        ),
        *("2026-02-30T00:00:00Z", "2026-01-31T24:00:01Z", "2026-01-31T12:00:61Z", "2026-01-31T12:00:00+25:00"),
        *("0001-01-01T00:00:00+10:00", "9999-12-31T23:59:59-10:00", "1999-12-31T23:59:59.999999Z"),
        *("٢٠٢٦-01-31T12:00:00Z", "2026-01-31T12:00:00Z\n", "now", 1769860800, 1.5, True, [], {}),
        *({"__type__": "decimal", "__value__": "2026-01-31T12:00:00Z"}, datetime(2026, 1, 31)),  # noqa: DTZ001 - the point
    ],
)
def test_what_is_no_moment_is_refused(text):
    assert refusal(occurred_at=text).startswith("occurred_at is ")


@pytest.mark.parametrize("name", ["user_id", "idempotency_key", "action"])
@pytest.mark.parametrize("value", ["", "x" * 201, "a\x00b", "\ud800", 1, None, True, [], {}, b"x", 1.5])
def test_a_text_that_is_empty_long_or_no_text_is_refused(name, value):
    sentence = refusal(**{name: value})
    assert sentence.startswith(f"{name} is ")
    assert sentence.isascii()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"user_id": "x" * 129}, f"user_id is '{'x' * 56}...': must be at most 128 characters long."),
        ({"action": ...}, "action is missing."),
        ({"acton": "typo"}, "'acton' is not a field of this event."),
        ({"source": "x"}, "'source' is not a field of this event."),
        ({"type": "mint"}, "type is 'mint': must be accrual or burn."),
        ({"type": ...}, "type is missing: must be accrual or burn."),
        ({"type": ["burn"]}, "type is a list: must be accrual or burn."),
        ({"user_id": 7, "amount": ..., "x" * 99: 1}, None),
    ],
)
def test_a_refusal_names_the_field_the_value_and_the_rule(changes, sentence):
    found = refusal(**changes)
    assert sentence in {None, found}
    assert len(found) < 300


@pytest.mark.parametrize("data", [None, [], "burn", 1, True, 1.5, [FIELDS]])
def test_what_is_no_object_is_no_event(data):
    with pytest.raises(InvalidEvent, match=r"^An event must be a JSON object, not "):
        parse_event(data)


def test_a_field_that_stands_twice_is_refused_for_nobody_knows_which_was_meant():
    text = '{"type":"burn","user_id":"a","amount":"1","amount":"2","idempotency_key":"k","action":"x"}'
    with pytest.raises(InvalidEvent, match=r"^The event has the field 'amount' twice\.$"):
        parse_event(read_json(text))


@pytest.mark.parametrize("metadata", ["{}", [], 1, True])
def test_metadata_that_is_no_object_is_refused(metadata):
    assert refusal(metadata=metadata).endswith("must be a JSON object.")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a":{"b":{"c":{"d":{"e":{"f":{"g":{"h":1}}}}}}}}', None),
        ('{"a":{"b":{"c":{"d":{"e":{"f":{"g":{"h":{}}}}}}}}}', "a.b.c.d.e.f.g.h is nested too deep"),
        ('{"a":[[[[[[[[]]]]]]]]}', "is nested too deep"),
        ('{"a":{"b":1,"b":1}}', "a has the key 'b' twice"),
        ('{"a":1,"a":1}', "it has the key 'a' twice"),
        ('{"a":NaN}', "a is NaN, which is not a number"),
        ('{"a":[1,-Infinity]}', "a[1] is -Infinity, which is not a number"),
        ('{"a":1e400}', None),
        ('{"a":1e-400}', None),
        ('{"a":1e401}', "a is 1E+401, beyond ten to the power of ±400"),
        ('{"a":1e-401}', "a is 1E-401, beyond"),
        ('{"a":1e999999999999}', "beyond"),
        ('{"a":%s}' % ("9" * 5000), "beyond"),
        ('{"a":"\\u0000"}', "a holds a NUL character"),
        ('{"\\u0000":1}', "holds a NUL character"),
        ('{"a":"\\ud800"}', "a holds half of a surrogate pair"),
        ('{"a":"\\ud83c\\udf89"}', None),
        ('{"a":{"__type__":"uuid","__value__":"x"}}', "a holds a Python 'uuid'; send plain JSON"),
        ('{"a":{"__type__":"\\ud800\\u0000","__value__":"x"}}', "a holds a Python '\\ud800\\x00'; send plain JSON"),
    ],
)
def test_metadata_is_plain_json_of_bounded_depth_and_size(text, why):
    data = read_json(text)
    if why is None:
        assert parsed(metadata=data).metadata is not None
    else:
        assert why in refusal(metadata=data)


def test_metadata_nested_as_deep_as_json_can_be_read_is_refused_like_any_other():
    deep = "[" * 900 + "]" * 900
    assert "nested too deep" in refusal(metadata=read_json(f'{{"a":{deep}}}'))
    assert "Python list" in refusal(metadata=read_json(f'{{"__type__":{deep},"__value__":1}}'))


def test_metadata_is_measured_in_bytes_of_its_canonical_text():
    fits = MAX_METADATA_BYTES - len('{"a":""}')
    assert len(parsed(metadata={"a": "x" * fits}).metadata) == MAX_METADATA_BYTES
    assert f"at most {MAX_METADATA_BYTES} bytes" in refusal(metadata={"a": "x" * (fits + 1)})
    assert parsed(metadata={"a": "é" * (fits // 2)}).metadata
    assert f"at most {MAX_METADATA_BYTES} bytes" in refusal(metadata={"a": "é" * (fits // 2 + 1)})


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ('{"b":1,"a":2,"A":3,"é":4,"Z":5}', '{"A":3,"Z":5,"a":2,"b":1,"é":4}'),
        ('{"\ue000":1,"\U0001f389":2}', '{"\ue000":1,"\U0001f389":2}'),  # by code point, not by UTF-16
        ("[1.0, 1.50, -0, -0.0, 0.00, 1E2, 1e+2, 12e-1, 0e99, -1.10]", "[1,1.5,0,0,0,100,100,1.2,0,-1.1]"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("1e400", "1" + "0" * 400),
        ("1e-400", "0." + "0" * 399 + "1"),
        (' { "a" : [ ] , "b" : { } , "c" : [ null , true , false ] } ', '{"a":[],"b":{},"c":[null,true,false]}'),
        (
            '"\\u00e9 e\\u0301 \\/ \\n \\u001f \\u007f \\u2028 \\ud83c\\udf89"',
            '"é e\u0301 / \\n \\u001f \x7f \u2028 🎉"',
        ),
        ("123456789012345678901234567890123456789", "123456789012345678901234567890123456789"),
    ],
)
def test_a_value_has_one_text(text, canonical):
    assert write_json(read_json(text)) == canonical
    assert write_json(read_json(canonical)) == canonical


def test_a_python_float_is_written_as_it_reads():
    assert write_json([0.1, 1e22, 1.0, -0.0]) == "[0.1,10000000000000000000000,1,0]"


def test_a_text_that_is_json_already_goes_in_as_it_is():
    assert write_json({"a": JsonText('{"n":1.50}')}) == '{"a":{"n":1.50}}'


def test_without_sorting_keys_stay_as_they_came():
    assert write_json({"b": 1, "a": {"d": 1, "c": 2}}, sort_keys=False) == '{"b":1,"a":{"d":1,"c":2}}'


@pytest.mark.parametrize("value", [{1: 2}, {"a": {None: 1}}, {1: 1, "a": 1}, {"a": {1, 2}}, [b"x"], object()])
def test_what_json_does_not_have_is_refused(value):
    with pytest.raises(NotCanonical):
        write_json(value)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), inner, max_size=4
        )
    ),
    max_leaves=15,
)


def same(one, other):
    """Equal as JSON: 1 is 1.0, but never True."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, bool | str | None):
        return type(one) is type(other) and one == other
    exact = Decimal(repr(one)) if isinstance(one, float) else Decimal(one)
    return not isinstance(other, bool | str | None) and exact == other


@settings(repeatable, max_examples=200)
@given(json_values)
def test_the_canonical_text_says_the_value_and_only_it(value):
    """Read back it is the same value, written again the same text, and any JSON reader agrees it is JSON."""
    text = write_json(value)
    assert same(value, read_json(text))
    assert write_json(read_json(text)) == text
    json.loads(text)


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
def test_whatever_is_sent_is_an_event_or_refused_in_one_short_sentence(data, mostly_right):
    if mostly_right:
        data = FIELDS | data
    try:
        event = parse_event(data)
    except InvalidEvent as refused:
        sentence = str(refused)
        assert sentence.endswith(".")
        assert len(sentence) < 600
        assert "\x00" not in sentence
        sentence.encode()  # no half of a surrogate pair: it goes to logs and events
    else:
        assert parse_event(read_json(event_json(event)), max_amount=10**20) == event


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=128)


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
def test_an_event_sent_as_its_json_is_the_same_event(model, user, units, key, what, moment, metadata):
    fields = {
        "user_id": user,
        "amount": f"{units // 10**18}.{units % 10**18:018d}",
        "idempotency_key": key,
        "source" if model is Accrual else "action": what,
        "occurred_at": moment,
    }
    try:
        event = model(**fields, metadata=metadata)
    except ValueError:
        event = model(**fields)  # that metadata was too deep
    sent = event_json(event)
    assert parse_event(read_json(sent), max_amount=10**20) == event
    assert event_json(parse_event(read_json(sent))) == sent


@pytest.mark.parametrize("number", ["1.50", "-0", "1E+3", "0E-9", "1E-18", "100", "-0.10"])
def test_a_plain_number_has_no_exponent_no_trailing_zeros_and_no_negative_zero(number):
    text = plain_number(Decimal(number))
    assert Decimal(text) == Decimal(number)
    assert "E" not in text
    assert text != "-0"
    assert not ("." in text and text.endswith(("0", ".")))
    assert MAX_EXPONENT == 400
