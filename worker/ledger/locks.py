"""Row locks on accounts: taken by batches in order of user_id, and polled when another session holds them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final

import psycopg
from psycopg import Connection, Cursor

from .errors import LOCK_NOT_AVAILABLE, blames_event
from .pgtext import array
from .rows import Account

#: Transactions of `insert_missing_within` that may fail: enough to isolate 3 accounts among 500 by bisection.
MAX_FAILED_INSERTS: Final = 25

_LOCK_ACCOUNTS: Final = f"""
    SELECT {", ".join(field.name for field in fields(Account))}
    FROM account WHERE user_id = ANY(%s)
    ORDER BY user_id FOR UPDATE
""".encode()  # noqa: S608 - our own column names


def lock_accounts(cursor: Cursor[Any], users: Sequence[str]) -> dict[str, Account]:
    """The accounts that exist, locked in order of user_id until the transaction ends.

    A row whose lock had to be waited for is returned as it is after the wait: under READ COMMITTED, FOR UPDATE reads
    the newest version of a row again (PostgreSQL's manual, 13.2.1).
    """
    cursor.execute(_LOCK_ACCOUNTS, (array(users),))
    return {row[0]: Account(*row) for row in cursor}


def insert_missing_accounts(cursor: Cursor[Any], users: Sequence[str]) -> None:
    """Make sure that each account exists. Inserts in the order of locking, so that batches do not deadlock."""
    cursor.execute(
        """
        INSERT INTO account (user_id)
        SELECT x.user_id FROM unnest(%s::text[]) AS x (user_id)
        WHERE NOT EXISTS (SELECT FROM account a WHERE a.user_id = x.user_id)
        ORDER BY x.user_id COLLATE "C" ON CONFLICT DO NOTHING
        """,
        (array(users),),
    )


def insert_missing_within(connection: Connection[Any], users: Sequence[str], lock_timeout: float) -> set[str]:
    """Make sure that each account exists, except those whose insert another session has not committed within
    `lock_timeout` seconds, and those that the database refuses; returns the refused ones.

    Takes bounded time: gives up after MAX_FAILED_INSERTS failures. The order differs at each call, so that repeated
    calls make progress.
    """
    rows = connection.execute(
        """
        SELECT x.user_id FROM unnest(%s::text[]) AS x (user_id)
        WHERE NOT EXISTS (SELECT FROM account a WHERE a.user_id = x.user_id)
        """,
        (array(users),),
    )
    missing = [row[0] for row in rows]
    random.shuffle(missing)
    parts = [missing] if missing else []
    refused = set()
    failed = 0
    while parts and failed < MAX_FAILED_INSERTS:
        part = parts.pop()
        try:
            with connection.transaction(), connection.cursor() as cursor:
                cursor.execute("SELECT set_config('lock_timeout', %s, true)", (f"{round(lock_timeout * 1000)}ms",))
                insert_missing_accounts(cursor, part)
        except psycopg.Error as error:
            if not blames_event(error) and error.sqlstate != LOCK_NOT_AVAILABLE:
                raise
            failed += 1
            if len(part) > 1:
                parts += [part[len(part) // 2 :], part[: len(part) // 2]]
            elif blames_event(error):
                refused.add(part[0])
    return refused


def lock_holders(connection: Connection[Any], users: Sequence[str]) -> dict[str, str | None]:
    """Maps each existing account to the id of the transaction that holds its row lock (its xmax), None if it is free.

    The locks that this probe takes are released when it returns. An account whose holder changes between two polls is
    busy, not stuck.
    """
    rows = connection.execute(
        """
        WITH free AS MATERIALIZED (SELECT user_id FROM account WHERE user_id = ANY(%(users)s) FOR UPDATE SKIP LOCKED)
        SELECT a.user_id, CASE WHEN free.user_id IS NULL THEN a.xmax::text END
        FROM account a LEFT JOIN free ON free.user_id = a.user_id WHERE a.user_id = ANY(%(users)s)
        """,
        {"users": array(users)},
    )
    return {row[0]: row[1] for row in rows}


def terminate_frozen_sessions(connection: Connection[Any], after: float) -> list[int]:
    """Terminate the sessions of workers that began a COPY `after` seconds ago and have not sent its lines; returns
    their process ids.

    PostgreSQL has no timeout for a session that waits for the lines of a COPY: neither statement_timeout nor
    idle_in_transaction_session_timeout nor transaction_timeout ends it (tried with 18). A worker that freezes at that
    point would lock its accounts for as long as its machine is up.
    """
    # Materialized: PostgreSQL evaluates conditions in any order, pg_terminate_backend first if it likes.
    rows = connection.execute(
        """
        WITH frozen AS MATERIALIZED (
            SELECT pid FROM pg_stat_activity
            WHERE datname = current_database() AND usename = current_user AND application_name = %s
                AND state = 'active' AND wait_event = 'ClientRead' AND query LIKE 'COPY %%'
                AND query_start < clock_timestamp() - make_interval(secs => %s)
        )
        SELECT pid FROM frozen WHERE pg_terminate_backend(pid)
        """,
        (connection.info.parameter_status("application_name"), after),
    )
    return [row[0] for row in rows]
