"""schema/canonical.py: the one text of a JSON value."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given, settings

from schema.canonical import JsonText, NotCanonical, plain_number, read_json, write_json
from tests.ledger.support import repeatable
from tests.schema.strategies import json_values


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


@pytest.mark.parametrize("number", ["1.50", "-0", "1E+3", "0E-9", "1E-18", "100", "-0.10"])
def test_a_plain_number_has_no_exponent_no_trailing_zeros_and_no_negative_zero(number):
    text = plain_number(Decimal(number))
    assert Decimal(text) == Decimal(number)
    assert "E" not in text
    assert text != "-0"
    assert not ("." in text and text.endswith(("0", ".")))
