"""The dead letters as operators meet them: found, taken for a replay, discarded, their bodies purged.

    open → replayed    its events are in the queue again          (`mark_replayed`)
    replayed → open    the replay came to nothing, too            (`dead_letters.keep`)
    open → discarded   an operator says that it needs no outcome  (`discard`)

Each transition names its origin in the WHERE, so that two operators at once do not undo each other's work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from psycopg import Connection, Cursor
from psycopg.rows import class_row

#: Rows that one statement purges: so many locks, and so much to do again when it is interrupted.
PURGED_AT_ONCE: Final = 500

#: An event longer than this, in bytes as it is stored, is read when its letter's turn comes: many would fill memory.
_LONG_EVENT: Final = 64 * 1024

_COLUMNS: Final = """
    id, fingerprint, reason, detail, task, message_id, event_index, user_id, idempotency_key, first_seen_at,
    last_seen_at, deliveries, state, state_changed_at, state_changed_by, state_note, replays, purged_at,
    octet_length(body) AS body_bytes
"""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One row, without the message itself."""

    id: int
    fingerprint: bytes
    reason: str
    detail: str
    task: str | None
    message_id: str | None
    event_index: int | None
    user_id: str | None
    idempotency_key: str | None
    first_seen_at: datetime
    last_seen_at: datetime
    deliveries: int
    state: str
    state_changed_at: datetime | None
    state_changed_by: str | None
    state_note: str | None
    replays: int
    purged_at: datetime | None
    body_bytes: int | None


@dataclass(frozen=True, slots=True)
class Message:
    """What a letter keeps of its message; each part may be missing."""

    event: str | None  # JSON text: an event, or the arguments of a call that was refused whole
    headers: Any
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters; what is empty does not matter."""

    states: Sequence[str] = ()
    reasons: Sequence[str] = ()
    user_id: str | None = None
    since: datetime | None = None  # seen at or after

    def where(self) -> tuple[str, dict[str, Any]]:
        """Conditions joined by AND, and their parameters."""
        conditions: list[str] = ["true"]
        parameters: dict[str, Any] = {}
        if self.states:
            conditions.append("state = ANY(%(states)s)")
            parameters["states"] = list(self.states)
        if self.reasons:
            conditions.append("reason = ANY(%(reasons)s)")
            parameters["reasons"] = list(self.reasons)
        if self.user_id is not None:
            conditions.append("user_id = %(user_id)s")
            parameters["user_id"] = self.user_id
        if self.since is not None:
            conditions.append("last_seen_at >= %(since)s")
            parameters["since"] = self.since
        return " AND ".join(conditions), parameters


def newest(connection: Connection[Any], which: Filter, limit: int, before: int | None = None) -> list[DeadLetter]:
    """At most `limit` letters, newest first, numbered below `before`."""
    where, parameters = which.where()
    if before is not None:
        where, parameters["before"] = f"{where} AND id < %(before)s", before
    with connection.cursor(row_factory=class_row(DeadLetter)) as cursor:
        return cursor.execute(
            f"SELECT {_COLUMNS} FROM dead_letter WHERE {where} ORDER BY id DESC LIMIT %(limit)s".encode(),  # noqa: S608
            parameters | {"limit": limit},
        ).fetchall()


def numbers(connection: Connection[Any], which: Filter) -> list[int]:
    """The numbers of all letters there are at this moment, oldest first."""
    where, parameters = which.where()
    rows = connection.execute(
        f"SELECT id FROM dead_letter WHERE {where} ORDER BY id".encode(),  # noqa: S608 - our own words
        parameters,
    )
    return [row[0] for row in rows]


def find(connection: Connection[Any], number: int) -> tuple[DeadLetter, Message] | None:
    """One letter with its message."""
    with connection.cursor(row_factory=class_row(DeadLetter)) as cursor:
        found = cursor.execute(f"SELECT {_COLUMNS} FROM dead_letter WHERE id = %s".encode(), (number,)).fetchone()  # noqa: S608
    with connection.cursor() as cursor:
        return None if found is None else (found, message(cursor, number))


def message(cursor: Cursor[Any], number: int) -> Message:
    """The message of a letter that exists."""
    cursor.execute("SELECT event::text, headers, body FROM dead_letter WHERE id = %s", (number,))
    row = cursor.fetchone()
    assert row is not None  # rows are never deleted
    return Message(*row)


def take(cursor: Cursor[Any], wanted: Sequence[int]) -> list[tuple[DeadLetter, str | None]]:
    """The letters with these numbers, oldest first, locked until the transaction ends, with their events.

    The event is None where there is none, and where it is long: `message` has it.
    """
    cursor.execute(
        f"""
        SELECT {_COLUMNS}, CASE WHEN pg_column_size(event) < {_LONG_EVENT} THEN event::text END
        FROM dead_letter WHERE id = ANY(%s) ORDER BY id FOR UPDATE
        """.encode(),  # noqa: S608 - our own words
        (list(wanted),),
    )
    return [(DeadLetter(*row[:-1]), row[-1]) for row in cursor]


def mark_replayed(cursor: Cursor[Any], taken: Sequence[int], by: str) -> None:
    """The events of these letters are in the queue again; in the transaction that took them."""
    cursor.execute(
        """
        UPDATE dead_letter SET state = 'replayed', replays = replays + 1, state_changed_at = clock_timestamp(),
            state_changed_by = %s, state_note = NULL
        WHERE id = ANY(%s) AND state IN ('open', 'replayed')
        """,
        (by, list(taken)),
    )


def discard(connection: Connection[Any], wanted: Sequence[int], by: str, note: str) -> set[int]:
    """Close open letters that need no outcome; the numbers of those that this call closed."""
    rows = connection.execute(
        """
        UPDATE dead_letter SET state = 'discarded', state_changed_at = clock_timestamp(), state_changed_by = %s,
            state_note = %s
        WHERE id = ANY(%s) AND state = 'open' RETURNING id
        """,
        (by, note, list(wanted)),
    )
    return {row[0] for row in rows}


def purgeable(connection: Connection[Any], age: timedelta) -> tuple[int, int]:
    """How many bodies `purge` would remove, and how many as old it would leave, for they are all there is."""
    row = connection.execute(
        """
        SELECT count(*) FILTER (WHERE state <> 'open' OR event IS NOT NULL),
               count(*) FILTER (WHERE state = 'open' AND event IS NULL)
        FROM dead_letter WHERE body IS NOT NULL AND last_seen_at < clock_timestamp() - %s
        """,
        (age,),
    ).fetchone()
    assert row is not None  # an aggregate has one row
    return int(row[0]), int(row[1])


def purge(connection: Connection[Any], age: timedelta) -> Iterator[int]:
    """Remove the bodies of letters last seen longer ago than `age`, batch by batch; yields how many at a time.

    Nothing else is removed: reason, event, user, key, and what was done about it stay for ever. The body of an open
    letter without an event stays too: it is the only trace of a message that has no outcome.
    """
    after = 0
    while True:
        rows: Iterable[tuple[int]] = connection.execute(
            """
            UPDATE dead_letter SET body = NULL, purged_at = clock_timestamp()
            WHERE id IN (
                SELECT id FROM dead_letter
                WHERE id > %(after)s AND body IS NOT NULL AND last_seen_at < clock_timestamp() - %(age)s
                    AND (state <> 'open' OR event IS NOT NULL)
                ORDER BY id LIMIT %(most)s FOR UPDATE
            ) RETURNING id
            """,
            {"after": after, "age": age, "most": PURGED_AT_ONCE},
        )
        purged = [row[0] for row in rows]
        if not purged:
            return
        after = max(purged)
        yield len(purged)
