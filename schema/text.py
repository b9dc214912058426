"""Text that may hold anything, made fit for a sentence, a log line, a table or PostgreSQL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Final

#: What redis-py appends to an error: the command with its arguments (AUTH has the password), or its client objects.
_REDIS_DETAILS: Final = re.compile(r",? with args beginning with| : <redis")

#: What PostgreSQL's text type refuses: NUL, and half of a surrogate pair, which has no UTF-8.
_NOT_STORABLE: Final = re.compile("[\x00\ud800-\udfff]")


def ascii_line(text: str, limit: int) -> str:
    """The text in ASCII and on one line, at most `limit` characters; what was cut off ends in `...`."""
    return _cut(ascii(text[: limit + 1])[1:-1], limit)


def printable_line(text: str, limit: int) -> str:
    """`ascii_line`, but printable text of any script stays as it is."""
    return _cut(text, limit) if text.isprintable() else ascii_line(text, limit)


def quote(value: object, limit: int = 60) -> str:
    """Any value as an error's sentence shows it: ASCII, one line, at most `limit` characters and the quotes of text.

    JSON's scalars look as in JSON; an object or a list is named, not shown, so that no depth or size matters.
    """
    if isinstance(value, str):
        text = ascii(value[:limit])
        return (
            text
            if len(text) <= limit + 2 and len(value) <= limit
            else f"{text[: limit - 3].rstrip(chr(92))}...{text[0]}"
        )
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "an integer of more than 40 digits"
    if isinstance(value, Decimal | float):
        text = str(value)
        return text if len(text) <= limit else f"a number of {len(text)} characters"
    return "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else type(value).__name__


def one_line_error(error: BaseException) -> str:
    """An error's message on one line, without the commands and arguments that redis-py repeats in it."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return _REDIS_DETAILS.split(text)[0].rstrip(".") or type(error).__name__


def is_storable(text: str) -> bool:
    """Whether PostgreSQL can store the text: no NUL character, no half of a surrogate pair."""
    return _NOT_STORABLE.search(text) is None


def storable(text: str | None) -> str | None:
    """The text with U+FFFD for each NUL and `?` for each half of a surrogate pair; None stays None."""
    return None if text is None else text.replace("\x00", "\ufffd").encode(errors="replace").decode()


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
