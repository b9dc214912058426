"""Messages without an outcome, kept whole with the reason: at most one row for a message, however often it comes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import Cursor

from schema.events import Event, event_json

from .outcomes import Origin


@dataclass(frozen=True, slots=True)
class Letter:
    """A message, or one event of a bulk message, that could not be decided, and why."""

    reason: str
    detail: str  # one sentence
    origin: Origin
    user_id: str | None = None
    idempotency_key: str | None = None
    event: str | None = None  # JSON text, where the message parses

    @classmethod
    def of_event(cls, reason: str, detail: str, event: Event, origin: Origin) -> Letter:
        """A letter for an event that parsed."""
        return cls(reason, detail, origin, event.user_id, event.idempotency_key, event_json(event))

    @property
    def fingerprint(self) -> bytes:
        """The same for every delivery of the same message: sha256 of task, id, body and the event's place."""
        origin = self.origin
        digest = hashlib.sha256()
        for part in (origin.task, origin.message_id, origin.body, origin.event_index):
            text = (
                part if isinstance(part, bytes) else b"" if part is None else str(part).encode(errors="surrogatepass")
            )
            digest.update(b"%d:%b" % (len(text), text) if part is not None else b"~")
        return digest.digest()


def keep(cursor: Cursor[Any], letters: Sequence[Letter], now: datetime | None = None) -> None:
    """Write the letters down; one that is there already counts the delivery.

    Rows are taken in order of fingerprint, so that two batches with the same letters do not deadlock.
    """
    distinct: dict[bytes, Letter] = {}
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
            last_seen_at = greatest(kept.last_seen_at, excluded.last_seen_at)
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
            "headers": [letter.origin.headers for _, letter in rows],
            "body": [letter.origin.body for _, letter in rows],
            "deliveries": [count[fingerprint] for fingerprint, _ in rows],
        },
    )


def _storable(text: str | None) -> str | None:
    """What PostgreSQL can store of a text that may hold anything; the body keeps the original bytes."""
    if text is None:
        return None
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
