"""Values as PostgreSQL reads them from text: lines for COPY and array literals, whatever the values hold.

psycopg writes the same several times slower. A mistake here is an injection: tests/ledger/test_pgtext.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Final, TypeAlias

Value: TypeAlias = str | int | Decimal | datetime | bytes | None

_COPY_ESCAPES: Final = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})
_COPY_SPECIAL: Final = re.compile(r"[\\\t\n\r]")


def copy_lines(rows: Iterable[tuple[Value, ...]]) -> str:
    """Rows in COPY's text format."""
    # Column by column: one check for special characters covers a column, and most columns hold none.
    columns = map(_copy_column, zip(*rows, strict=True))
    return "".join([f"{line}\n" for line in map("\t".join, zip(*columns, strict=True))])


def array(values: Sequence[Value]) -> str:
    """An array literal."""
    if set(map(type, values)) == {str}:
        return f"{{{','.join([_quoted(text) for text in values])}}}"  # type: ignore[arg-type]
    return f"{{{','.join([_array_element(value) for value in values])}}}"


def _copy_column(values: tuple[Value, ...]) -> Sequence[str]:
    if set(map(type, values)) == {str} and not _COPY_SPECIAL.search("".join(values)):  # type: ignore[arg-type]
        return values  # type: ignore[return-value]
    return [_copy_field(value) for value in values]


def _copy_field(value: Value) -> str:
    if value is None:
        return r"\N"
    if isinstance(value, bytes):
        return rf"\\x{value.hex()}"
    text = str(value)
    return text.translate(_COPY_ESCAPES) if _COPY_SPECIAL.search(text) else text  # to translate is five times slower


def _array_element(value: Value) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return rf"\\x{value.hex()}"
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'
