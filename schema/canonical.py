"""Canonical JSON: the form in which metadata is compared, hashed, stored and returned by the API.

Each value has one text: keys sorted by code point, no spaces, plain numbers (no exponent, no trailing
zeros, no -0), strings unchanged (no Unicode normalisation). Numbers never pass through a binary float,
so 0.1 stays 0.1 and 18 decimals stay 18.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from json.encoder import encode_basestring
from typing import Any, Final, TypeAlias

from .text import ascii_line, quote

#: The largest power of ten of a number, and the smallest below zero; beyond, its plain text would exceed every limit.
MAX_EXPONENT: Final = 400

#: Longest run of digits that int() gets: Python raises ValueError beyond 4,300.
_MAX_DIGITS: Final = MAX_EXPONENT + 2
_LONG_INTEGER: Final = 10**_MAX_DIGITS

_quote: Final[Callable[[str], str]] = encode_basestring


class NotCanonical(ValueError):
    """The value has no canonical text; the message names the place in the value, and the reason."""


class JsonNumber(Decimal):
    """A JSON number that was written with a fraction or an exponent, with all its digits."""

    __slots__ = ()


class JsonText(str):
    """JSON text, such as stored metadata, that `write_json` copies unchanged."""

    __slots__ = ()


class DuplicateKeys(dict[str, Any]):
    """A JSON object in which the key `name` occurs twice: not an error, so that only its own event is refused."""

    name: str


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text, numbers exact.

    Raises ValueError or RecursionError for text that is not JSON. NaN and duplicate keys become values that
    `write_json` and the event models refuse, so that one bad event does not spoil the others of its message.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    return _DECODER.decode(text)


def write_json(value: object, *, max_depth: int = 64, sort_keys: bool = True) -> str:
    """The canonical text of a value; without `sort_keys` just as exact, with the keys in their own order, for a reader.

    Raises NotCanonical for NaN, Infinity, an exponent beyond ±400, duplicate keys, a NUL or a lone surrogate
    in a string, a key that is not a string, nesting deeper than `max_depth`, and kombu's type tags.
    """
    parts: list[str] = []
    _write(value, parts.append, sorted if sort_keys else list, max_depth, None)
    return "".join(parts)


def plain_number(number: Decimal) -> str:
    """The number without exponent, trailing zeros or a negative zero: 1.50 → 1.5, 1E+2 → 100."""
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in {"-0", ""} else text


def _read_int(digits: str) -> int | JsonNumber:
    return int(digits) if len(digits) <= _MAX_DIGITS else JsonNumber(digits)


def _read_fraction(text: str) -> JsonNumber:
    try:
        return JsonNumber(text)
    except InvalidOperation:  # its exponent has 19 digits or more
        return JsonNumber("-Infinity" if text.startswith("-") else "Infinity")


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = [name for name, _ in pairs]
    duplicate = DuplicateKeys(value)
    duplicate.name = next(name for i, name in enumerate(names) if name in names[:i])
    return duplicate


#: Made once: json.loads makes a decoder for each text, which takes as long as reading a short text.
_DECODER: Final = json.JSONDecoder(
    parse_float=_read_fraction, parse_int=_read_int, parse_constant=JsonNumber, object_pairs_hook=_read_object
)


#: A place in a value: the place of the object or list around it, and its own key or index. Only an error formats it.
_Place: TypeAlias = tuple["_Place", str | int] | None


def _write(value: object, emit: Any, order: Any, depth: int, at: _Place) -> None:  # noqa: C901, PLR0912 - one straight list of kinds
    if isinstance(value, str):
        emit(value if isinstance(value, JsonText) else write_text(value, at))
    elif isinstance(value, dict):
        if depth == 0:
            raise NotCanonical(f"{_path(at)} is nested too deep")
        if isinstance(value, DuplicateKeys):
            raise NotCanonical(f"{_path(at)} has the key {quote(value.name)} twice")
        if "__type__" in value and "__value__" in value:
            tag = value["__type__"]
            kind = quote(tag) if isinstance(tag, str) else type(tag).__name__
            raise NotCanonical(f"{_path(at)} holds a Python {kind}; send plain JSON")
        separator = "{"
        try:
            names = order(value)
        except TypeError:
            raise NotCanonical(f"{_path(at)} has a key that is not a string") from None
        for name in names:
            if not isinstance(name, str):
                raise NotCanonical(f"{_path(at)} has the key {quote(name)}, which is not a string")
            emit(f"{separator}{write_text(name, at)}:")
            separator = ","
            _write(value[name], emit, order, depth - 1, (at, name))
        emit("}" if names else "{}")
    elif value is None:
        emit("null")
    elif value is True:
        emit("true")
    elif value is False:
        emit("false")
    elif isinstance(value, int):
        emit(_number(Decimal(value), at) if abs(value) >= _LONG_INTEGER else str(value))
    elif isinstance(value, Decimal):
        emit(_number(value, at))
    elif isinstance(value, float):
        emit(_number(Decimal(repr(value)), at))
    elif isinstance(value, list | tuple):
        if depth == 0:
            raise NotCanonical(f"{_path(at)} is nested too deep")
        separator = "["
        for index, item in enumerate(value):
            emit(separator)
            separator = ","
            _write(item, emit, order, depth - 1, (at, index))
        emit("]" if value else "[]")
    else:
        raise NotCanonical(f"{_path(at)} is a {type(value).__name__}, which JSON does not have")


def write_text(text: str, at: _Place = None) -> str:
    """The canonical text of a string. Raises NotCanonical, naming the place `at`, for a NUL or a lone surrogate."""
    if "\x00" in text:
        raise NotCanonical(f"{_path(at)} holds a NUL character, which PostgreSQL cannot store")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise NotCanonical(f"{_path(at)} holds half of a surrogate pair, which is not a character") from None
    return _quote(text)


def _number(number: Decimal, at: _Place) -> str:
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int):
        raise NotCanonical(f"{_path(at)} is {number!s:.20}, which is not a number")
    if exponent < -MAX_EXPONENT or abs(number.adjusted()) > MAX_EXPONENT:
        raise NotCanonical(f"{_path(at)} is {number!s:.40}, beyond ten to the power of ±{MAX_EXPONENT}")
    return plain_number(number)


def _path(at: _Place) -> str:
    """The place as an error names it: order.items[3], or `it` for the whole value."""
    text = ""
    while at is not None:
        at, step = at
        text = f"[{step}]{text}" if isinstance(step, int) else f".{ascii_line(step, 40)}{text}"
    return text.removeprefix(".") or "it"
