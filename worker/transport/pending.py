"""What this process has yet to tell a broker, kept while there is no connection to tell it by. Below `unacked.py`."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

#: Tags per call of a script: Lua's `unpack` ends at about 8,000, and one call should not block Redis for long.
TAGS_PER_CALL = 1000

#: Messages per call that puts messages back; the caller calls again until all is done.
RESTORES_PER_CALL = 500

#: Where `unacked_restores` counts the times that a message was taken in hand alone, before its sha1.
ALONE = "alone:"


class PendingBrokerOps:
    """What this process has yet to tell Redis: which messages are finished, and which it could not give back.

    Outlives channels and connections, so that an acknowledgement after a commit survives a lost connection. However
    late it comes, it is safe: a tag is given to one delivery only, so that when the message was restored meanwhile,
    and is in another worker's hands, the record of that delivery is not touched. And what a lost connection tore from
    us goes back as soon as there is another one, uncounted: an outage of Redis is not the fault of a message.
    """

    _of_brokers: dict[Hashable, PendingBrokerOps] = {}  # noqa: RUF012 - one per broker and process

    def __init__(self) -> None:
        self._finished: deque[tuple[str, str | None]] = deque()
        self._given_up: list[str] = []
        self._forgiven: deque[tuple[str, int]] = deque()

    @classmethod
    def of(cls, broker: Hashable) -> PendingBrokerOps:
        """What this process owes `broker`."""
        return cls._of_brokers.setdefault(broker, cls())

    def __len__(self) -> int:
        return len(self._finished) + len(self._given_up) + len(self._forgiven)

    def acknowledge(self, tag: str, fingerprint: str | None) -> None:
        """Remember a tag, and the sha1 of its message if that had been restored before. Any thread may call it."""
        self._finished.append((tag, fingerprint))

    def requeue_later(self, tags: Iterable[str]) -> None:
        """Remember tags of messages, oldest first, that are to be served again. There need not be such messages."""
        self._given_up.extend(tags)

    def forgive(self, fingerprint: str, by: int) -> None:
        """Remember that a message's worker lives, which had counted itself `by` times as possibly dying of it."""
        self._forgiven.append((fingerprint, by))

    def settle(self, channel: Any) -> None:
        """Tell Redis all of it; what it raises for is kept, and raised."""
        while self._finished:
            batch = [self._finished.popleft() for _ in range(min(len(self._finished), TAGS_PER_CALL))]
            tags = [tag for tag, _ in batch]
            fingerprints = [fingerprint for _, fingerprint in batch if fingerprint]
            try:
                channel.acknowledge([str(len(tags)), *tags, *fingerprints, *map(ALONE.__add__, fingerprints)])
            except BaseException:
                self._finished.extendleft(reversed(batch))
                raise
        while self._given_up:  # only now: what was finished meanwhile has no record any more
            chunk = self._given_up[-RESTORES_PER_CALL:]
            left = int(channel.requeue(["RPUSH", *chunk]))
            del self._given_up[len(self._given_up) - len(chunk) + left :]
        while self._forgiven:
            fingerprint, by = self._forgiven[0]
            channel.count(ALONE + fingerprint, -by)
            self._forgiven.popleft()
