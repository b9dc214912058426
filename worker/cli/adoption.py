"""Whether tables that other software made are the legacy schema (revision 0001), so that migrations can start there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from schema.tables import Base

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psycopg

_KEY: Final = ("text", 'COLLATE "C"', "NOT NULL")
_BALANCE: Final = ("numeric(38,18)", "NOT NULL", "DEFAULT 0")

#: What each column of revision 0001 must be. Further columns, and defaults of further columns, do not matter.
COLUMNS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "account": {"user_id": _KEY, "balance": _BALANCE},
    "burned_credit": {
        "user_id": _KEY,
        "id": ("bigint", "NOT NULL", "DEFAULT"),
        "amount": ("numeric(38,18)", "NOT NULL"),
        "action": ("text", "NOT NULL"),
        "created_at": ("timestamp with time zone", "NOT NULL", "DEFAULT"),
    },
    "global_token_balance": {"id": ("integer", "NOT NULL"), "balance": _BALANCE},
}

#: As PostgreSQL prints them. Names do not matter.
CONSTRAINTS: Final[dict[str, tuple[str, ...]]] = {
    "account": ("PRIMARY KEY (user_id)", "CHECK ((balance >= (0)::numeric))"),
    "burned_credit": ("PRIMARY KEY (user_id, id)", "CHECK ((amount > (0)::numeric))"),
    "global_token_balance": ("PRIMARY KEY (id)",),
}

_FOUND_COLUMNS: Final = r"""
    SELECT attname, array_remove(ARRAY[
        format_type(atttypid, atttypmod),
        CASE collname WHEN 'C' THEN 'COLLATE "C"' END,
        CASE WHEN attnotnull THEN 'NOT NULL' END,
        CASE WHEN attgenerated <> '' THEN 'GENERATED'
             WHEN pg_get_expr(adbin, adrelid) ~ '^\W*0(\.0*)?\W*(numeric\W*)?$' THEN 'DEFAULT 0'
             WHEN attidentity <> '' OR atthasdef THEN 'DEFAULT' END
    ], NULL)
    FROM pg_attribute
        LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
        LEFT JOIN pg_collation c ON c.oid = attcollation
    WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped
    ORDER BY attnum
"""


def differences(connection: psycopg.Connection) -> list[str] | None:
    """How the tables differ from the legacy schema, a clause each; None when there are none of its tables."""
    existing = {name for name in Base.metadata.tables if _exists(connection, name)}
    if not existing & COLUMNS.keys():
        return None
    clauses = [f"there is a table {name} already, which the audit trail adds" for name in existing - COLUMNS.keys()]
    for name in COLUMNS:
        clauses += _differences(connection, name) if name in existing else [f"there is no table {name}"]
    return clauses


def _exists(connection: psycopg.Connection, table: str) -> bool:
    return connection.execute("SELECT to_regclass(%s)", [table]).fetchone() != (None,)


def _differences(connection: psycopg.Connection, table: str) -> Iterator[str]:
    kind = connection.execute("SELECT relkind, relpersistence FROM pg_class WHERE oid = to_regclass(%s)", [table])
    if kind.fetchone() != ("r", "p"):
        yield f"{table} is no ordinary table"
        return
    columns: dict[str, list[str]] = dict(connection.execute(_FOUND_COLUMNS, [table]).fetchall())
    for column, required in COLUMNS[table].items():
        if column not in columns:
            yield f"{table} has no column {column}"
        elif "GENERATED" in columns[column] or not set(required) <= set(columns[column]):
            yield f"{table}.{column} is {' '.join(columns[column])} and must be {' '.join(required)}"
    added = {column.name for column in Base.metadata.tables[table].columns} - COLUMNS[table].keys()
    for column in columns.keys() - COLUMNS[table].keys():
        if column in added:
            yield f"{table} has a column {column} already, which the audit trail adds"
        elif "NOT NULL" in columns[column] and not {"DEFAULT", "DEFAULT 0", "GENERATED"} & set(columns[column]):
            yield f"{table}.{column} is NOT NULL and has no default, so workers could insert no row"
    constraints = {
        row[0]
        for row in connection.execute(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = to_regclass(%s)", [table]
        )
    }
    yield from (f"{table} has no {required}" for required in CONSTRAINTS[table] if required not in constraints)
    if table == "global_token_balance" and "id" in columns:
        ids = [row[0] for row in connection.execute("SELECT id FROM global_token_balance LIMIT 2")]
        if len(ids) != 1 or ids[0] < 0:  # workers add rows with ids below 0
            yield "global_token_balance must hold one row, with an id from 0 up"
