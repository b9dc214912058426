"""Whether a database of other software has the tables of before the trail, so that migrations can begin from there.

They are compared with what revision 0001 makes: it runs among the temporary tables, and is rolled back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import psycopg
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, pool

from schema.tables import Base
from worker.schema_version import LEGACY_REVISION, alembic_config

if TYPE_CHECKING:
    from collections.abc import Iterator

_COLUMNS: Final = """
    SELECT attname, format_type(atttypid, atttypmod), collname, attnotnull, attgenerated <> '',
        attidentity <> '' OR atthasdef, pg_get_expr(adbin, adrelid)
    FROM pg_attribute
        LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
        LEFT JOIN pg_collation c ON c.oid = attcollation
    WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped
    ORDER BY attnum
"""

_CONSTRAINTS: Final = """
    SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = to_regclass(%s) AND contype IN ('p', 'c')
"""


class Column(NamedTuple):
    type: str
    collation: str | None
    required: bool
    generated: bool
    filled: bool  # in a row that is inserted without it
    default: str | None


class Table(NamedTuple):
    columns: dict[str, Column]
    constraints: set[str]  # primary key and CHECKs, by what they say: names are anybody's


def differences(url: str) -> list[str] | None:
    """What the tables lack of those before the trail, a clause each; None when there are no such tables at all.

    Tables, columns and constraints of the other software's own are no difference, unless they are in the way.
    """
    with psycopg.connect(url, connect_timeout=5) as connection:
        declared = _declared(connection)
        there = {name for name in declared if _is_there(connection, name)}
        if not there:
            return None
        found: list[str] = []
        for name, table in declared.items():
            if name in there:
                found += _differences(connection, name, table)
            else:
                found.append(f"there is no table {name}")
        found += [
            f"there is a table {name} already, which the trail brings"
            for name in Base.metadata.tables
            if name not in declared and _is_there(connection, name)
        ]
        return found


def _declared(connection: psycopg.Connection) -> dict[str, Table]:
    """The tables that revision 0001 makes."""
    script = ScriptDirectory.from_config(alembic_config()).get_revision(LEGACY_REVISION)
    assert script is not None
    engine = create_engine("postgresql+psycopg://", creator=lambda: connection, poolclass=pool.StaticPool)
    with engine.connect() as there:
        there.exec_driver_sql("SET LOCAL search_path = pg_temp")
        with Operations.context(MigrationContext.configure(there)):
            script.module.upgrade()
        names = connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = pg_my_temp_schema() AND relkind = 'r' ORDER BY 1"
        ).fetchall()
        declared = {name: _look(connection, name) for (name,) in names}
        there.rollback()
    return declared


def _look(connection: psycopg.Connection, name: str) -> Table:
    columns = connection.execute(_COLUMNS, [name]).fetchall()
    constraints = connection.execute(_CONSTRAINTS, [name]).fetchall()
    return Table({column: Column(*what) for column, *what in columns}, {text for (text,) in constraints})


def _is_there(connection: psycopg.Connection, name: str) -> bool:
    return connection.execute("SELECT to_regclass(%s)", [name]).fetchone() != (None,)


def _differences(connection: psycopg.Connection, name: str, declared: Table) -> Iterator[str]:
    kind = connection.execute("SELECT relkind, relpersistence FROM pg_class WHERE oid = to_regclass(%s)", [name])
    if kind.fetchone() != ("r", "p"):
        yield f"{name} is no ordinary table"
        return
    found = _look(connection, name)
    for column, wanted in declared.columns.items():
        if column not in found.columns:
            yield f"{name} has no column {column}"
        else:
            yield from (f"{name}.{column} {text}" for text in _difference(connection, found.columns[column], wanted))
    yield from (f"{name} has no {text}" for text in sorted(declared.constraints - found.constraints))
    brought = {column.name for column in Base.metadata.tables[name].columns} - declared.columns.keys()
    for column, theirs in found.columns.items():
        if column in brought:
            yield f"{name} has a column {column} already, which the trail brings"
        elif column not in declared.columns and theirs.required and not theirs.filled:
            yield f"{name}.{column} is NOT NULL and has no default, so that workers could insert no row"
    if name == "global_token_balance" and "id" in found.columns:
        yield from _difference_of_rows(connection)


def _difference(connection: psycopg.Connection, found: Column, wanted: Column) -> Iterator[str]:
    if found.type != wanted.type:
        yield f"is {found.type} and not {wanted.type}"
    elif wanted.collation not in {None, "default", found.collation}:
        yield f"has the collation {found.collation} and not {wanted.collation}"
    elif wanted.required and not found.required:
        yield "may be NULL"
    elif found.generated:
        yield "is generated"
    elif wanted.filled and not found.filled:
        yield "has no default"
    elif wanted.default == "0" and not _is_zero(connection, found.default):
        yield f"has the default {found.default} and not 0"


def _is_zero(connection: psycopg.Connection, default: str | None) -> bool:
    """What PostgreSQL says of a default is an expression: '0'::numeric is one of 0."""
    return connection.execute(f"SELECT ({default}) = 0".encode()).fetchone() == (True,)


def _difference_of_rows(connection: psycopg.Connection) -> Iterator[str]:
    """Workers add rows with ids below zero; the downgrade adds what these hold to the one of before."""
    ids = [number for (number,) in connection.execute("SELECT id FROM global_token_balance LIMIT 2")]
    if len(ids) != 1:
        yield f"global_token_balance holds {'several rows' if ids else 'no row'} and not one"
    elif ids[0] < 0:
        yield f"the row of global_token_balance has the id {ids[0]} and not one from 0 up"
