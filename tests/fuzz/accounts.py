"""What must have become of each message: for each of its events a decision under its key, or a dead letter."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import kombu
import structlog

from worker.config import Settings
from worker.ledger.dead_letters import NewDeadLetter
from worker.queue.intake import Intake
from worker.transport.fetching import Fetched, Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import psycopg


class Accounts:
    """Every event of every message, by the fingerprint that its dead letter has or would have.

    What a message is, is read here as a worker reads it, but one by one, by nobody who could be killed by it unseen,
    and before anything is decided: what is compared is what became of the message in the end.
    """

    def __init__(self, broker_url: str, database_url: str) -> None:
        self._connection = kombu.Connection(broker_url, transport="worker.transport.channel:Transport")
        self._channel = self._connection.channel()
        self._intake = Intake(Settings(DATABASE_URL=database_url), "accounts")
        #: By fingerprint, which is of task, id and body: the rest of a message may keep it from being decided, so that
        #: the same event is refused here and decided there.
        self.refused: Counter[bytes] = Counter()
        self.decidable: Counter[bytes] = Counter()
        self.keys: dict[bytes, tuple[str, str]] = {}  # of the decidable
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
            self.refused[letter.fingerprint] += 1
        for delivery in work.deliveries:
            event = delivery.event
            entered.append(NewDeadLetter.of_event("conflict", "", event, delivery.origin).fingerprint)
            self.decidable[entered[-1]] += 1
            self.keys[entered[-1]] = event.user_id, event.idempotency_key
        if raw in self.of:
            self.of[raw] = entered

    def events(self) -> set[bytes]:
        """The fingerprints of all events."""
        return self.refused.keys() | self.decidable.keys()

    @property
    def total(self) -> int:
        """How many events were sent, the same ones again counted again."""
        return self.refused.total() + self.decidable.total()

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
        letters = Counter(dict(connection.execute("SELECT fingerprint, deliveries FROM dead_letter").fetchall()))
        trouble = [f"{found.hex()}: a letter that nobody sent" for found in letters.keys() - self.events()]
        for name in self.events():
            refused, decidable = self.refused[name], self.decidable[name]
            key = self.keys.get(name)
            # What can be decided gets the same answer each time: a decision or a letter (conflict, moment too far).
            if letters[name] == refused + decidable or (letters[name] == refused and key in decided):
                continue
            trouble.append(
                f"{name.hex()}: {letters[name]} in letters, of {refused} refused and {decidable} others;"
                f" {key!a} is {'decided' if key in decided else 'not decided'}"
            )
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
