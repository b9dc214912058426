"""What a database is made of, as PostgreSQL itself says it: lines that two databases can be compared by."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psycopg

#: Name → what to list. The order of columns is left out: a column that was dropped and added again is the same.
QUERIES = {
    "column": """
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod),
               CASE WHEN a.attnotnull THEN 'NOT NULL' ELSE 'NULL' END,
               'collation ' || coalesce(l.collname, 'none'), 'identity ' || a.attidentity::text,
               'default ' || coalesce(pg_get_expr(d.adbin, d.adrelid), 'none')
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
            LEFT JOIN pg_collation l ON l.oid = a.attcollation
            LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
    """,
    # contype n: PostgreSQL 18 lists NOT NULL here too, under names that depend on how the column came about
    "constraint": """
        SELECT conrelid::regclass, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype <> 'n' AND conrelid <> 0
    """,
    "index": """
        SELECT pg_get_indexdef(i.indexrelid), CASE WHEN i.indisvalid AND i.indisready THEN 'valid' ELSE 'INVALID' END
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relnamespace = 'public'::regnamespace
    """,
    "trigger": """
        SELECT pg_get_triggerdef(t.oid), 'enabled ' || t.tgenabled::text
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
        WHERE NOT t.tgisinternal AND c.relnamespace = 'public'::regnamespace
    """,
    "function": "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
    "statistics": """
        SELECT c.relname, a.attname, option
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid CROSS JOIN unnest(a.attoptions) AS option
        WHERE c.relnamespace = 'public'::regnamespace
            AND option NOT LIKE 'pg\\_%' -- the server's own notes: Debian's 15.20 has pg_attver there
    """,
    "options": """
        SELECT relname, array_to_string(reloptions, ', ') FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND reloptions IS NOT NULL
    """,
}


def catalog(connection: psycopg.Connection, *kinds: str) -> list[str]:
    """Everything in the schema `public`, or only these kinds of it, sorted; as the connection's transaction sees it."""
    return sorted(
        f"{kind}: {' | '.join(map(str, row))}"
        for kind in kinds or QUERIES
        for row in connection.execute(QUERIES[kind].encode())
    )
