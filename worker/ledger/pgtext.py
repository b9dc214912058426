"""Values as PostgreSQL reads them from text: lines for COPY and array literals, whatever the values hold.

psycopg writes the same several times slower. A mistake here is an injection: tests/ledger/test_pgtext.py.
Both work column by column, so that one check for special characters covers a column: most columns hold none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Final, TypeAlias, cast

Value: TypeAlias = str | int | Decimal | datetime | bytes | None

_COPY_ESCAPES: Final = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def copy_lines(rows: Iterable[tuple[Value, ...]]) -> str:
    """Rows, at least one, in COPY's text format."""
    columns = map(_copy_column, zip(*rows, strict=True))
    return "\n".join(map("\t".join, zip(*columns, strict=True))) + "\n"


def array(values: Sequence[Value]) -> str:
    """An array literal."""
    kinds = set(map(type, values))
    if kinds == {str}:
        texts = cast("Sequence[str]", values)
        joined = "".join(texts)
        if "\\" in joined or '"' in joined:
            texts = [text.replace("\\", r"\\").replace('"', r"\"") for text in texts]
        return '{"' + '","'.join(texts) + '"}'
    if kinds & {str, bytes}:
        return f"{{{','.join([_array_element(value) for value in values])}}}"
    return f"{{{','.join(['NULL' if value is None else str(value) for value in values])}}}"


def _array_element(value: Value) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return rf"\\x{value.hex()}"
    escaped = str(value).replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'


def _copy_column(values: tuple[Value, ...]) -> Sequence[str]:
    kinds = set(map(type, values))
    if kinds == {str}:
        texts = cast("tuple[str, ...]", values)
        joined = "".join(texts)
        special = "\\" in joined or "\t" in joined or "\n" in joined or "\r" in joined
        return [text.translate(_COPY_ESCAPES) for text in texts] if special else texts
    return [_copy_field(value) for value in values]


def _copy_field(value: Value) -> str:
    if value is None:
        return r"\N"
    if isinstance(value, bytes):
        return rf"\\x{value.hex()}"
    return value.translate(_COPY_ESCAPES) if isinstance(value, str) else str(value)
