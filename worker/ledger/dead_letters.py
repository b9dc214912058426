"""Dead letters: messages without an outcome, kept with the reason, and what operators do with them.

    (new) → open       a worker writes it: one row a message, however often it is delivered   (`write`)
    open → replayed    an operator published its events again                                 (`mark_replayed`)
    replayed → open    the replay has no outcome either                                       (`write`)
    open → discarded   an operator decided that it needs no outcome                           (`discard`)

Each transition names its origin in the WHERE clause, so that two operators at once do not undo each other's work.
Rows are never deleted; `purge` removes only the original bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from psycopg import Connection, Cursor
from psycopg.rows import class_row

from schema.canonical import read_json
from schema.events import Event, InvalidEvent, event_json, parse_event
from schema.reasons import DeadLetterReason
from schema.text import storable

from .deliveries import Origin
from .rules import BALANCE_LIMIT

#: The largest amount that any setting allows.
MAX_TOKENS: Final = int(BALANCE_LIMIT)

#: Longer headers are stored with the first dead letter of a bulk message only: a thousand copies are too much.
_MAX_REPEATED_HEADERS: Final = 4096  # characters of JSON

#: Rows that one statement of `purge` locks and changes.
PURGE_BATCH_ROWS: Final = 500

#: Longer events are read one by one, with `read_message`: many of them together would fill memory.
_LONG_EVENT_BYTES: Final = 64 * 1024  # as PostgreSQL stores them

_COLUMNS: Final = """
    id, fingerprint, reason, detail, task, message_id, event_index, user_id, idempotency_key, first_seen_at,
    last_seen_at, deliveries, state, state_changed_at, state_changed_by, state_note, replays, purged_at,
    octet_length(body) AS body_bytes
"""


@dataclass(frozen=True, slots=True)
class NewDeadLetter:
    """A message, or one event of a bulk message, that could not be decided, and why: to be written."""

    reason: DeadLetterReason
    detail: str  # one sentence
    origin: Origin
    user_id: str | None = None
    idempotency_key: str | None = None
    event: str | None = None  # JSON text, where the message parses

    @classmethod
    def of_event(cls, reason: DeadLetterReason, detail: str, event: Event, origin: Origin) -> NewDeadLetter:
        """The dead letter of an event that parsed."""
        return cls(reason, detail, origin, event.user_id, event.idempotency_key, event_json(event))

    @property
    def fingerprint(self) -> bytes:
        """The same for every delivery of the same message: sha256 of task, id, body and the event's place."""
        origin = self.origin
        digest = hashlib.sha256(_digest(origin.body))
        for part in (origin.task, origin.message_id, origin.event_index):
            text = b"" if part is None else str(part).encode(errors="surrogatepass")
            digest.update(b"~" if part is None else b"%d:%b" % (len(text), text))
        return digest.digest()


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
class StoredMessage:
    """What the row of a dead letter holds of its message; each part may be missing."""

    event: str | None  # JSON text: an event, or the arguments of a bulk message that was refused as a whole
    headers: Any
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects dead letters; an empty field selects all."""

    states: Sequence[str] = ()
    reasons: Sequence[str] = ()
    user_id: str | None = None
    since: datetime | None = None  # last seen at or after

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
    """At most `limit` dead letters, newest first, with ids below `before`."""
    where, parameters = which.where()
    if before is not None:
        where, parameters["before"] = f"{where} AND id < %(before)s", before
    with connection.cursor(row_factory=class_row(DeadLetter)) as cursor:
        return cursor.execute(
            f"SELECT {_COLUMNS} FROM dead_letter WHERE {where} ORDER BY id DESC LIMIT %(limit)s".encode(),  # noqa: S608
            parameters | {"limit": limit},
        ).fetchall()


def ids(connection: Connection[Any], which: Filter) -> list[int]:
    """The ids of all dead letters that `which` selects now, oldest first."""
    where, parameters = which.where()
    rows = connection.execute(
        f"SELECT id FROM dead_letter WHERE {where} ORDER BY id".encode(),  # noqa: S608 - our own words
        parameters,
    )
    return [row[0] for row in rows]


def find(connection: Connection[Any], id_: int) -> tuple[DeadLetter, StoredMessage] | None:
    """One dead letter with its message."""
    with connection.cursor(row_factory=class_row(DeadLetter)) as cursor:
        letter = cursor.execute(f"SELECT {_COLUMNS} FROM dead_letter WHERE id = %s".encode(), (id_,)).fetchone()  # noqa: S608
    with connection.cursor() as cursor:
        return None if letter is None else (letter, read_message(cursor, id_))


def read_message(cursor: Cursor[Any], id_: int) -> StoredMessage:
    """The message of a dead letter that exists."""
    cursor.execute("SELECT event::text, headers, body FROM dead_letter WHERE id = %s", (id_,))
    row = cursor.fetchone()
    assert row is not None  # rows are never deleted
    return StoredMessage(*row)


def lock(cursor: Cursor[Any], ids: Sequence[int]) -> list[tuple[DeadLetter, str | None]]:
    """The dead letters with these ids, oldest first, locked until the transaction ends, each with its event.

    The event is None where there is none, and where it is long: `read_message` reads it.
    """
    cursor.execute(
        f"""
        SELECT {_COLUMNS}, CASE WHEN pg_column_size(event) < {_LONG_EVENT_BYTES} THEN event::text END
        FROM dead_letter WHERE id = ANY(%s) ORDER BY id FOR UPDATE
        """.encode(),  # noqa: S608 - our own words
        (list(ids),),
    )
    return [(DeadLetter(*row[:-1]), row[-1]) for row in cursor]


def mark_replayed(cursor: Cursor[Any], ids: Sequence[int], by: str) -> None:
    """Note that the events of these dead letters were published again, in the transaction that locked them."""
    cursor.execute(
        """
        UPDATE dead_letter SET state = 'replayed', replays = replays + 1, state_changed_at = clock_timestamp(),
            state_changed_by = %s, state_note = NULL
        WHERE id = ANY(%s) AND state IN ('open', 'replayed')
        """,
        (by, list(ids)),
    )


def discard(connection: Connection[Any], ids: Sequence[int], by: str, note: str) -> set[int]:
    """Close open dead letters that need no outcome; returns the ids of those that this call closed."""
    rows = connection.execute(
        """
        UPDATE dead_letter SET state = 'discarded', state_changed_at = clock_timestamp(), state_changed_by = %s,
            state_note = %s
        WHERE id = ANY(%s) AND state = 'open' RETURNING id
        """,
        (by, note, list(ids)),
    )
    return {row[0] for row in rows}


def count_purgeable(connection: Connection[Any], age: timedelta) -> tuple[int, int]:
    """How many bodies `purge` would remove, and how many bodies of that age it would keep."""
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
    """Remove the bodies of dead letters last seen longer ago than `age`, in batches; yields the size of each batch.

    Reason, event, user, key, and what operators did are never removed. The body of an open dead letter without an event
    stays too: it is the only trace of a message that has no outcome.
    """
    last_id = 0
    while True:
        rows = connection.execute(
            """
            UPDATE dead_letter SET body = NULL, purged_at = clock_timestamp()
            WHERE id IN (
                SELECT id FROM dead_letter
                WHERE id > %(last_id)s AND body IS NOT NULL AND last_seen_at < clock_timestamp() - %(age)s
                    AND (state <> 'open' OR event IS NOT NULL)
                ORDER BY id LIMIT %(limit)s FOR UPDATE
            ) RETURNING id
            """,
            {"last_id": last_id, "age": age, "limit": PURGE_BATCH_ROWS},
        )
        purged = [row[0] for row in rows]
        if not purged:
            return
        last_id = max(purged)
        yield len(purged)


def write(cursor: Cursor[Any], letters: Sequence[NewDeadLetter], now: datetime | None = None) -> None:
    """Write dead letters. For a message that has a row already, count the delivery, and open the row again if it was
    replayed.

    Rows are locked in order of fingerprint, so that two batches with the same dead letters do not deadlock.
    """
    letters = _reopen(cursor, letters, now)
    deliveries = Counter(letter.fingerprint for letter in letters)
    distinct = {letter.fingerprint: letter for letter in reversed(letters)}  # the first of each fingerprint
    rows = sorted(distinct.items())
    cursor.execute(
        """
        INSERT INTO dead_letter AS stored (fingerprint, reason, detail, task, message_id, event_index, user_id,
                                           idempotency_key, event, headers, body, deliveries,
                                           first_seen_at, last_seen_at)
        SELECT x.*, now, now
        FROM unnest(%(fingerprint)s::bytea[], %(reason)s::text[], %(detail)s::text[], %(task)s::text[],
                    %(message_id)s::text[], %(event_index)s::int[], %(user_id)s::text[], %(key)s::text[],
                    %(event)s::json[], %(headers)s::json[], %(body)s::bytea[], %(deliveries)s::bigint[]) AS x,
             coalesce(%(now)s, clock_timestamp()) AS now
        ORDER BY 1
        ON CONFLICT (fingerprint) DO UPDATE SET
            deliveries = stored.deliveries + excluded.deliveries,
            last_seen_at = greatest(stored.last_seen_at, excluded.last_seen_at),
            reason = CASE stored.state WHEN 'replayed' THEN excluded.reason ELSE stored.reason END,
            detail = CASE stored.state WHEN 'replayed' THEN excluded.detail ELSE stored.detail END,
            state = CASE stored.state WHEN 'replayed' THEN 'open' ELSE stored.state END
        """,
        {
            "now": now,
            "fingerprint": [fingerprint for fingerprint, _ in rows],
            "reason": [letter.reason for _, letter in rows],
            "detail": [storable(letter.detail) for _, letter in rows],
            "task": [storable(letter.origin.task) for _, letter in rows],
            "message_id": [storable(letter.origin.message_id) for _, letter in rows],
            "event_index": [letter.origin.event_index for _, letter in rows],
            "user_id": [letter.user_id for _, letter in rows],
            "key": [letter.idempotency_key for _, letter in rows],
            "event": [letter.event for _, letter in rows],
            "headers": _headers([letter for _, letter in rows]),
            "body": _bodies([letter for _, letter in rows]),
            "deliveries": [deliveries[fingerprint] for fingerprint, _ in rows],
        },
    )


def _reopen(cursor: Cursor[Any], letters: Sequence[NewDeadLetter], now: datetime | None) -> list[NewDeadLetter]:
    """Open the rows again whose replays failed; returns the letters that belong to no such row.

    A message names the dead letter that it is a replay of. That is believed only if the row holds the same event:
    otherwise this message's event would be lost.
    """
    ids = sorted({letter.origin.replay_of for letter in letters if letter.origin.replay_of is not None})
    if not ids:
        return list(letters)
    cursor.execute(
        """
        SELECT id, event::text FROM dead_letter
        WHERE id = ANY(%s) AND state <> 'discarded'
        ORDER BY id FOR UPDATE
        """,
        (ids,),
    )
    events = {id_: _content(event) for id_, event in cursor}
    others: list[NewDeadLetter] = []
    failed: dict[int, list[NewDeadLetter]] = {}
    for letter in letters:
        id_ = letter.origin.replay_of
        if id_ is None or letter.event is None or events.get(id_) != _content(letter.event):
            others.append(letter)
        else:
            failed.setdefault(id_, []).append(letter)
    cursor.execute(
        """
        UPDATE dead_letter AS stored SET state = 'open', reason = x.reason, detail = x.detail,
            deliveries = stored.deliveries + x.deliveries,
            last_seen_at = greatest(stored.last_seen_at, coalesce(%(now)s, clock_timestamp()))
        FROM unnest(%(id)s::bigint[], %(reason)s::text[], %(detail)s::text[], %(deliveries)s::bigint[])
            AS x (id, reason, detail, deliveries)
        WHERE stored.id = x.id
        """,
        {
            "now": now,
            "id": list(failed),
            "reason": [letters[-1].reason for letters in failed.values()],
            "detail": [storable(letters[-1].detail) for letters in failed.values()],
            "deliveries": [len(letters) for letters in failed.values()],
        },
    )
    return others


def _content(event: str | None) -> Event | str | None:
    """The event in a JSON text, whatever its spelling; the text itself where it is no valid event."""
    if event is None:
        return None
    try:
        return parse_event(read_json(event), max_amount=MAX_TOKENS)
    except InvalidEvent:
        return event


def _bodies(letters: Sequence[NewDeadLetter]) -> list[bytes | None]:
    """The original bytes to store with each letter.

    An event of a bulk message is stored as its own JSON instead; if it has none, the first such letter stores the
    message. A message of 16 MiB with a thousand bad events must not become 16 GiB.
    """
    bodies: list[bytes | None] = []
    stored: set[bytes] = set()
    for letter in letters:
        origin = letter.origin
        whole = origin.event_index is None or (letter.event is None and _digest(origin.body) not in stored)
        bodies.append(origin.body if whole else None)
        if origin.event_index is not None and whole:
            stored.add(_digest(origin.body))
    return bodies


def _headers(letters: Sequence[NewDeadLetter]) -> list[str | None]:
    """The headers to store with each letter, as JSON; long ones only with the first letter of a message."""
    texts: list[str | None] = []
    by_message: dict[int, str | None] = {}
    for letter in letters:
        headers = letter.origin.headers
        if id(headers) not in by_message:
            texts.append(by_message.setdefault(id(headers), _json(headers)))
        else:
            text = by_message[id(headers)]
            texts.append(None if text is not None and len(text) > _MAX_REPEATED_HEADERS else text)
    return texts


@lru_cache(maxsize=2)
def _digest(body: bytes) -> bytes:
    # Cached: a bulk message of 16 MiB may have a thousand dead letters.
    return hashlib.sha256(body).digest()


def _json(headers: Mapping[str, Any] | None) -> str | None:
    """Headers as JSON in ASCII, which PostgreSQL can store whatever they hold."""
    if headers is None:
        return None
    try:
        return json.dumps(headers, default=str, allow_nan=False)
    except (ValueError, RecursionError):
        return json.dumps({"unreadable": _ascii(headers)})


def _ascii(headers: Mapping[str, Any]) -> str:
    try:
        return ascii(headers)[:1000]
    except RecursionError:
        return "nested too deep"
