"""Whatever a value holds, PostgreSQL reads it from COPY lines and array literals as that value."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from worker.ledger.pgtext import array, copy_lines

from .support import repeatable

#: Every text that PostgreSQL can store, most of them made of what COPY and arrays treat specially.
texts = st.one_of(
    st.text(st.sampled_from("\\\t\n\r\"{},NUL.x\b\f\v'é"), max_size=8),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    st.sampled_from([r"\N", r"\.", "NULL", "null", "", " ", "{}"]),
)
whole_numbers = st.integers(-(2**63), 2**63 - 1)
amounts = st.integers(-(10**38) + 1, 10**38 - 1).map(lambda units: Decimal(units).scaleb(-18))
moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))  # noqa: DTZ001

COLUMNS = {
    "text": texts,
    "bytea": st.binary(max_size=9),
    "bigint": st.integers(-(2**63), 2**63 - 1),
    "numeric": st.integers(-(10**38) + 1, 10**38 - 1).map(lambda units: Decimal(units).scaleb(-18)),
    "timestamptz": st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)),  # noqa: DTZ001
}


def rows(null):
    return st.lists(st.tuples(*[null | column for column in COLUMNS.values()]), min_size=1, max_size=6)


@repeatable
@given(rows(st.nothing()) | rows(st.none()))
def test_copy_lines_are_read_as_the_values_they_were_made_of(connection, written):
    with connection.transaction(force_rollback=True), connection.cursor() as cursor:
        columns = ", ".join(f"c_{name} {name}" for name in COLUMNS)
        cursor.execute(f"CREATE TEMPORARY TABLE lines ({columns}, place serial)")
        with cursor.copy(f"COPY lines ({', '.join(f'c_{name}' for name in COLUMNS)}) FROM STDIN") as copy:
            copy.write(copy_lines(written))
        *columns, _ = zip(*cursor.execute("SELECT * FROM lines ORDER BY place"), strict=True)
        assert list(zip(*columns, strict=True)) == written


@repeatable
@given(rows(st.nothing()) | rows(st.none()))
def test_an_array_literal_is_read_as_the_values_it_was_made_of(connection, written):
    for name, values in zip(COLUMNS, zip(*written, strict=True), strict=True):
        assert connection.execute(f"SELECT %s::{name}[]", (array(values),)).fetchone() == (list(values),)


def test_an_empty_array_is_one(connection):
    assert connection.execute("SELECT %s::text[]", (array([]),)).fetchone() == ([],)
