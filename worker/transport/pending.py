"""Operations that Redis has not been sent yet: acknowledgements, requeues, and corrections of solo attempts."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Final

from .scripts import MAX_TAGS_PER_CALL, Scripts


class PendingOperations:
    """Operations of this process that wait to be sent to one Redis database.

    However late an acknowledgement is sent, it is safe: a tag belongs to one delivery only. If the message was restored
    in the meantime and is in flight in another worker, that delivery's record is not touched. Messages that a lost
    connection interrupted are requeued over the next one, uncounted: an outage of Redis is not a message's fault.
    """

    def __init__(self) -> None:
        self._acknowledged: deque[tuple[str, str | None]] = deque()  # tag; fingerprint of a restored message
        self._requeued: dict[str, None] = {}  # tags, oldest first
        self._survived: deque[tuple[str, int]] = deque()  # fingerprint, number of solo attempts

    def __len__(self) -> int:
        return len(self._acknowledged) + len(self._requeued) + len(self._survived)

    def acknowledge(self, tag: str, fingerprint: str | None) -> None:
        """Acknowledge a message; `fingerprint` ends the counts of a restored one. May be called from any thread."""
        self._acknowledged.append((tag, fingerprint))

    def requeue_later(self, tags: Iterable[str]) -> None:
        """Requeue messages, oldest first. Tags without a message are allowed and have no effect."""
        self._requeued.update(dict.fromkeys(tags))

    def undo_solo_attempts(self, fingerprint: str, count: int) -> None:
        """Subtract recorded solo attempts on a message that its worker survived."""
        self._survived.append((fingerprint, count))

    def flush(self, scripts: Scripts) -> None:
        """Send all operations. Raises what redis-py raises, and keeps the operations that were not done."""
        while self._acknowledged:
            batch = [self._acknowledged.popleft() for _ in range(min(len(self._acknowledged), MAX_TAGS_PER_CALL))]
            try:
                scripts.acknowledge([tag for tag, _ in batch], [fingerprint for _, fingerprint in batch if fingerprint])
            except BaseException:
                self._acknowledged.extendleft(reversed(batch))
                raise
        # Requeues come second: a message that was acknowledged in the meantime has no record left to requeue.
        for tag in scripts.requeue(list(self._requeued)):
            del self._requeued[tag]
        while self._survived:
            fingerprint, count = self._survived[0]
            scripts.count_solo_attempts(fingerprint, -count)
            self._survived.popleft()


#: The operations of this process, by database. They live as long as the process and not as long as a channel: a worker
#: that commits while its connection is lost acknowledges over the next connection, which has a new channel.
_PENDING: Final[dict[Hashable, PendingOperations]] = {}


def pending_operations(database: Hashable) -> PendingOperations:
    """The operations of this process that wait for `database`; always the same object for the same database."""
    return _PENDING.setdefault(database, PendingOperations())
