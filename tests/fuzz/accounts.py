"""What must have become of each message: for each of its events a decision under its key, or a dead letter."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import kombu
import structlog

from worker.config import Settings
from worker.ledger.dead_letters import Letter
from worker.queue.fetching import Fetched, Source
from worker.queue.intake import Intake

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import psycopg


class Accounts:
    """Every event of every message, by the fingerprint that its dead letter has or would have.

    What a message is, is read here as a worker reads it, but one by one, by nobody who could be killed by it unseen,
    and before anything is decided: what is compared is what became of the message in the end.
    """

    def __init__(self, broker_url: str, database_url: str) -> None:
        self._connection = kombu.Connection(broker_url, transport="worker.queue.transport:Transport")
        self._channel = self._connection.channel()
        self._intake = Intake(Settings(DATABASE_URL=database_url), "accounts")
        self.sent: Counter[bytes] = Counter()  # events by fingerprint
        self.keys: dict[bytes, tuple[str, str]] = {}  # of those that can be decided
        self.reasons: dict[bytes, str] = {}  # of those that cannot
        self.messages = 0
        self.of: dict[bytes, list[bytes]] = {}  # message → fingerprints

    def remember(self, messages: Iterable[bytes]) -> None:
        """Say of these, once they are entered, which fingerprints their events have."""
        self.of = {raw: [] for raw in messages}

    def enter(self, messages: Iterable[bytes]) -> None:
        """Expect an outcome for each event of these messages."""
        with silence():
            for raw in messages:
                self._enter(raw)

    def _enter(self, raw: bytes) -> None:
        fetched = Fetched(Source("tokens", "tokens", "]"), "a-tag", raw, 0, 0)
        work = self._intake.read(self._channel._message(fetched)).work
        assert work.outcomes, "a message without an event would vanish"
        self.messages += 1
        entered = []
        for letter in work.letters:
            entered.append(letter.fingerprint)
            self.reasons[letter.fingerprint] = letter.reason
        for delivery in work.deliveries:
            event = delivery.event
            entered.append(Letter.of_event("conflict", "", event, delivery.origin).fingerprint)
            self.keys[entered[-1]] = event.user_id, event.idempotency_key
        self.sent.update(entered)
        if raw in self.of:
            self.of[raw] = entered

    def close(self) -> None:
        self._connection.release()

    def wrong(self, connection: psycopg.Connection[Any], ours: Sequence[tuple[str, str]]) -> list[str]:
        """Events without an outcome, with two, or counted otherwise than sent; letters that nobody sent."""
        decided = set(
            connection.execute(
                "SELECT user_id, idempotency_key FROM transaction_record"
                " UNION ALL SELECT user_id, idempotency_key FROM rejected_event"
            ).fetchall()
        )
        letters = dict(connection.execute("SELECT fingerprint, deliveries FROM dead_letter").fetchall())
        trouble = [
            f"{found.hex()[:12]}: {letters[found]} deliveries of {self.sent[found]}"
            for found in letters
            if letters[found] != self.sent[found]
        ]
        trouble += [
            f"{name}: no outcome, sent {self.sent[name]} times, {self.keys.get(name, self.reasons.get(name))}"
            for name in self.sent
            if name not in letters and self.keys.get(name) not in decided
        ]
        trouble += [
            f"{name.hex()[:12]}: {why} and yet no letter" for name, why in self.reasons.items() if name not in letters
        ]
        nobody = decided - set(self.keys.values()) - set(ours)
        return trouble + [f"{key!a}: decided, and nobody sent it" for key in nobody]


@contextmanager
def silence() -> Iterator[None]:
    """Reading a message says in the log why it is refused, which here is everything."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)
