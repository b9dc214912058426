"""Text that may hold anything, made fit for one line of a sentence, a log or a table."""

from __future__ import annotations


def ascii_line(text: str, limit: int) -> str:
    """The text in ASCII and on one line, at most `limit` characters; what was cut off ends in `...`."""
    line = ascii(text[:limit])[1:-1]
    return line if len(text) <= limit and len(line) <= limit else f"{line[: limit - 3]}..."
