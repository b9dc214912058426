"""Messages without an outcome, kept whole with the reason: at most one row for a message, however often it comes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from psycopg import Cursor

from schema.canonical import read_json
from schema.events import Event, InvalidEvent, event_json, parse_event
from schema.reasons import DeadLetterReason

from .deliveries import Origin
from .rules import BALANCE_LIMIT

#: No amount is larger, whatever the setting says now.
MAX_TOKENS: Final = int(BALANCE_LIMIT)


#: Characters of headers that every letter of a bulk message keeps; a thousand times a megabyte is no statement.
_LONG_HEADERS: Final = 4096


@dataclass(frozen=True, slots=True)
class NewDeadLetter:
    """A message, or one event of a bulk message, that could not be decided, and why."""

    reason: DeadLetterReason
    detail: str  # one sentence
    origin: Origin
    user_id: str | None = None
    idempotency_key: str | None = None
    event: str | None = None  # JSON text, where the message parses

    @classmethod
    def of_event(cls, reason: DeadLetterReason, detail: str, event: Event, origin: Origin) -> NewDeadLetter:
        """A letter for an event that parsed."""
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


@lru_cache(maxsize=2)
def _digest(body: bytes) -> bytes:
    # A bulk message of 16 MiB may have a thousand letters: hash it once.
    return hashlib.sha256(body).digest()


def keep(cursor: Cursor[Any], letters: Sequence[NewDeadLetter], now: datetime | None = None) -> None:
    """Write the letters down; one that is there already counts the delivery, and is open again if it was replayed.

    Rows are taken in order of fingerprint, so that two batches with the same letters do not deadlock.
    """
    letters = _reopen(cursor, letters, now)
    distinct: dict[bytes, NewDeadLetter] = {}
    count: dict[bytes, int] = {}
    for letter in letters:
        fingerprint = letter.fingerprint
        distinct.setdefault(fingerprint, letter)
        count[fingerprint] = count.get(fingerprint, 0) + 1
    rows = sorted(distinct.items())
    cursor.execute(
        """
        INSERT INTO dead_letter AS kept (fingerprint, reason, detail, task, message_id, event_index, user_id,
                                         idempotency_key, event, headers, body, deliveries, first_seen_at, last_seen_at)
        SELECT x.*, moment, moment
        FROM unnest(%(fingerprint)s::bytea[], %(reason)s::text[], %(detail)s::text[], %(task)s::text[],
                    %(message_id)s::text[], %(event_index)s::int[], %(user_id)s::text[], %(key)s::text[],
                    %(event)s::json[], %(headers)s::json[], %(body)s::bytea[], %(deliveries)s::bigint[]) AS x,
             coalesce(%(now)s, clock_timestamp()) AS moment
        ORDER BY 1
        ON CONFLICT (fingerprint) DO UPDATE SET
            deliveries = kept.deliveries + excluded.deliveries,
            last_seen_at = greatest(kept.last_seen_at, excluded.last_seen_at),
            reason = CASE kept.state WHEN 'replayed' THEN excluded.reason ELSE kept.reason END,
            detail = CASE kept.state WHEN 'replayed' THEN excluded.detail ELSE kept.detail END,
            state = CASE kept.state WHEN 'replayed' THEN 'open' ELSE kept.state END
        """,
        {
            "now": now,
            "fingerprint": [fingerprint for fingerprint, _ in rows],
            "reason": [letter.reason for _, letter in rows],
            "detail": [_storable(letter.detail) for _, letter in rows],
            "task": [_storable(letter.origin.task) for _, letter in rows],
            "message_id": [_storable(letter.origin.message_id) for _, letter in rows],
            "event_index": [letter.origin.event_index for _, letter in rows],
            "user_id": [letter.user_id for _, letter in rows],
            "key": [letter.idempotency_key for _, letter in rows],
            "event": [letter.event for _, letter in rows],
            "headers": _headers([letter for _, letter in rows]),
            "body": _bodies([letter for _, letter in rows]),
            "deliveries": [count[fingerprint] for fingerprint, _ in rows],
        },
    )


def _reopen(cursor: Cursor[Any], letters: Sequence[NewDeadLetter], now: datetime | None) -> list[NewDeadLetter]:
    """Open the rows again whose replays came to nothing; the letters that no row stands for are left to write.

    A message says itself whose replay it is, so it is believed only if the row holds the very same event: else what
    this one holds would be lost.
    """
    numbers = sorted({letter.origin.replay_of for letter in letters if letter.origin.replay_of is not None})
    if not numbers:
        return list(letters)
    cursor.execute(
        """
        SELECT id, event::text FROM dead_letter
        WHERE id = ANY(%s) AND state <> 'discarded'
        ORDER BY id FOR UPDATE
        """,
        (numbers,),
    )
    events = {number: _content(event) for number, event in cursor}
    left: list[NewDeadLetter] = []
    failed: dict[int, list[NewDeadLetter]] = {}
    for letter in letters:
        number = letter.origin.replay_of
        if number is None or letter.event is None or events.get(number) != _content(letter.event):
            left.append(letter)
        else:
            failed.setdefault(number, []).append(letter)
    cursor.execute(
        """
        UPDATE dead_letter AS kept SET state = 'open', reason = x.reason, detail = x.detail,
            deliveries = kept.deliveries + x.deliveries,
            last_seen_at = greatest(kept.last_seen_at, coalesce(%(now)s, clock_timestamp()))
        FROM unnest(%(id)s::bigint[], %(reason)s::text[], %(detail)s::text[], %(deliveries)s::bigint[])
            AS x (id, reason, detail, deliveries)
        WHERE kept.id = x.id
        """,
        {
            "now": now,
            "id": list(failed),
            "reason": [letters[-1].reason for letters in failed.values()],
            "detail": [_storable(letters[-1].detail) for letters in failed.values()],
            "deliveries": [len(letters) for letters in failed.values()],
        },
    )
    return left


def _content(event: str | None) -> Event | str | None:
    """What an event says, however it is spelled; its text where it is none."""
    if event is None:
        return None
    try:
        return parse_event(read_json(event), max_amount=MAX_TOKENS)
    except InvalidEvent:
        return event


def _bodies(letters: Sequence[NewDeadLetter]) -> list[bytes | None]:
    """The original bytes of each letter's message.

    Events of a bulk message keep their own JSON instead, and where they have none, the first keeps the message: a
    message of 16 MiB and a thousand bad events must not become 16 GiB.
    """
    bodies: list[bytes | None] = []
    kept: set[bytes] = set()
    for letter in letters:
        origin = letter.origin
        whole = origin.event_index is None or (letter.event is None and _digest(origin.body) not in kept)
        bodies.append(origin.body if whole else None)
        if origin.event_index is not None and whole:
            kept.add(_digest(origin.body))
    return bodies


def _headers(letters: Sequence[NewDeadLetter]) -> list[str | None]:
    """The headers of each letter's message; long ones are kept by the first letter of a bulk message alone."""
    found: list[str | None] = []
    texts: dict[int, str | None] = {}
    for letter in letters:
        headers = letter.origin.headers
        if id(headers) not in texts:
            found.append(texts.setdefault(id(headers), _json(headers)))
        else:
            text = texts[id(headers)]
            found.append(None if text is not None and len(text) > _LONG_HEADERS else text)
    return found


def _storable(text: str | None) -> str | None:
    """What PostgreSQL can store of a text that may hold anything; the body keeps the original bytes."""
    if text is None:
        return None
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def _json(headers: Mapping[str, Any] | None) -> str | None:
    """Headers may hold anything that JSON, or kombu's reading of it, can; ASCII escapes make all of it storable."""
    if headers is None:
        return None
    try:
        return json.dumps(headers, default=str, allow_nan=False)
    except (ValueError, RecursionError):
        return json.dumps({"unreadable": _shown(headers)})


def _shown(headers: Mapping[str, Any]) -> str:
    try:
        return ascii(headers)[:1000]
    except RecursionError:
        return "nested too deep"
