"""Hostile text: each helper's result is one short line, or text that PostgreSQL stores."""

from __future__ import annotations

from decimal import Decimal

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from schema.text import ascii_line, is_storable, one_line_error, printable_line, quote, storable


@given(st.text(), st.integers(4, 30))
def test_a_line_is_ascii_or_printable_and_no_longer_than_its_limit(text, limit):
    for line in (ascii_line(text, limit), printable_line(text, limit)):
        assert len(line) <= limit
        assert line.isprintable()
    assert ascii_line(text, limit).isascii()
    if text.isascii() and text.isprintable() and len(text) <= limit:
        assert printable_line(text, limit) == text


@pytest.mark.parametrize("line", [ascii_line, printable_line])
def test_a_line_is_cut_only_where_it_is_longer_than_its_limit(line):
    assert line("abcdef", 6) == "abcdef"
    assert line("abcdefg", 6) == "abc..."


def test_printable_text_of_any_script_stays_as_it_is():
    assert printable_line("żółć", 10) == "żółć"


@given(st.text(max_size=80))
def test_quoted_text_is_one_short_ascii_line_in_quotes(text):
    quoted = quote(text, 20)
    assert quoted.isascii()
    assert quoted.isprintable()
    assert quoted[0] == quoted[-1] in {"'", '"'}
    assert len(quoted) <= 22


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb\u202e", r"'a\nb\u202e'"),
        ("x" * 61, f"'{'x' * 56}...'"),
        (None, "null"),
        (True, "true"),
        (10**39, "1" + "0" * 39),
        (10**50, "an integer of more than 40 digits"),
        (Decimal("1E+3"), "1E+3"),
        (Decimal(10**100), "a number of 101 characters"),
        ({"a": 1}, "an object"),
        ([1], "a list"),
        (b"x", "bytes"),
    ],
)
def test_any_value_is_shown_short(value, text):
    assert quote(value) == text


@given(st.text(st.characters(), max_size=20))
def test_what_is_storable_is_utf_8_without_nul(text):
    kept = storable(text)
    assert is_storable(kept)
    assert len(kept) == len(text)
    assert (kept == text) == is_storable(text)
    assert b"\x00" not in kept.encode()


def test_an_error_is_one_line_without_the_arguments_of_its_command():
    error = redis.ConnectionError("refused.\n  twice, with args beginning with: ['AUTH', 'secret']")
    assert one_line_error(error) == "refused.; twice"
    assert one_line_error(ValueError(".pgpass names no host X.")) == ".pgpass names no host X"
    assert one_line_error(TimeoutError()) == "TimeoutError"
