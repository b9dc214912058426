"""The expected outcome of each message: for each of its events a decision under its key, or a dead letter."""

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
from worker.transport.scripts import Fetched, QueueList

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import psycopg


class Expected:
    """Every event of every message sent, by the fingerprint of the dead letter that it is or would be.

    The test's process reads the messages as a worker does, one by one and before any is applied, and compares what it
    read with what PostgreSQL holds in the end.
    """

    def __init__(self, broker_url: str, database_url: str) -> None:
        self._connection = kombu.Connection(broker_url, transport="worker.transport.channel:Transport")
        self._channel = self._connection.channel()
        self._intake = Intake(Settings(DATABASE_URL=database_url), "expected")
        #: Events by fingerprint, which is of task, id and body. Other parts of a message may refuse it, so that one
        #: fingerprint may be refused in one message and valid in another.
        self.refused: Counter[bytes] = Counter()
        self.valid: Counter[bytes] = Counter()
        self.keys: dict[bytes, tuple[str, str]] = {}  # of the valid
        self.messages = 0
        self.fingerprints: dict[bytes, list[bytes]] = {}  # of the events of each remembered message

    def remember(self, messages: Iterable[bytes]) -> None:
        """Keep the fingerprints of these messages' events when they are added."""
        self.fingerprints = {raw: [] for raw in messages}

    def add(self, messages: Iterable[bytes]) -> None:
        """Expect an outcome for each event of these messages."""
        with silent_logs():
            for raw in messages:
                self._add(raw)

    def _add(self, raw: bytes) -> None:
        fetched = Fetched(QueueList("tokens", "tokens", "]"), "a-tag", raw, 0, 0)
        part = self._intake.read(self._channel._message(fetched))
        assert part.message.outcomes, "a message without an event would vanish"
        self.messages += 1
        for letter in part.message.letters:
            self.refused[letter.fingerprint] += 1
        valid = {
            NewDeadLetter.of_event("conflict", "", delivery.event, delivery.origin).fingerprint: delivery.event
            for delivery in part.deliveries
        }
        self.valid.update(valid.keys())
        self.keys |= {fingerprint: (event.user_id, event.idempotency_key) for fingerprint, event in valid.items()}
        if raw in self.fingerprints:
            self.fingerprints[raw] = [*(letter.fingerprint for letter in part.message.letters), *valid]

    @property
    def total(self) -> int:
        """Events sent; one that was sent twice counts twice."""
        return self.refused.total() + self.valid.total()

    def close(self) -> None:
        self._connection.release()

    def differences(self, connection: psycopg.Connection[Any], regular: Sequence[tuple[str, str]]) -> list[str]:
        """Events without an outcome, with two, or counted otherwise than sent; outcomes of events that were not sent.
        `regular` has user and key of events sent besides.
        """
        decided = set(
            connection.execute(
                "SELECT user_id, idempotency_key FROM transaction_record"
                " UNION ALL SELECT user_id, idempotency_key FROM rejected_event"
            ).fetchall()
        )
        letters = Counter(dict(connection.execute("SELECT fingerprint, deliveries FROM dead_letter").fetchall()))
        sent = self.refused.keys() | self.valid.keys()
        differences = [f"{fingerprint.hex()}: a dead letter of no message" for fingerprint in letters.keys() - sent]
        for fingerprint in sent:
            refused, valid, key = self.refused[fingerprint], self.valid[fingerprint], self.keys.get(fingerprint)
            # A valid event gets the same outcome each time: a decision, or a dead letter (conflict, time too late).
            if letters[fingerprint] == refused + valid or (letters[fingerprint] == refused and key in decided):
                continue
            differences.append(
                f"{fingerprint.hex()}: {letters[fingerprint]} dead letters, of {refused} refused and {valid} valid;"
                f" {key!a} is {'decided' if key in decided else 'not decided'}"
            )
        not_sent = decided - set(self.keys.values()) - set(regular)
        return differences + [f"{key!a}: decided, but never sent" for key in not_sent]


@contextmanager
def silent_logs() -> Iterator[None]:
    """Reading a message logs why it is refused; here nearly all are."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)
