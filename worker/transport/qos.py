"""What this process holds unacknowledged: prefetch, acknowledgements, signs of life, and giving messages back.

Between `transport.py`, which hands messages over, and `batching.py`, which says what became of them. In Redis each held
message is a record in the hash `unacked` and a time in the sorted set `unacked_index`, as with kombu's own transport.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

import logging
from importlib import import_module
from time import monotonic
from typing import TYPE_CHECKING, Any

from worker.transport.pending import ALONE, RESTORES_PER_CALL, TAGS_PER_CALL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

stock: Any = import_module("kombu.transport.redis")

logger = logging.getLogger(__name__)

#: So many calls of the restore script at most in one sweep: the loop has other things to do.
RESTORE_CALLS_PER_SWEEP = 20


class QoS(stock.QoS):
    """The messages one channel holds. Only the consuming thread may call it, but any may acknowledge."""

    def __init__(self, channel: Any, prefetch_count: int = 0) -> None:
        self._aside: set[str] = set()
        self._fingerprints: dict[str, str] = {}
        self._alone: dict[str, int] = {}
        self._touch_due = 0.0
        super().__init__(channel, prefetch_count)

    # Prefetch

    def park(self, tag: str) -> None:
        """Let a held message wait without counting it against prefetch; it stays unacknowledged and kept alive."""
        if tag in self._delivered and tag not in self._dirty:
            self._aside.add(tag)

    def held(self) -> list[str]:
        """The tags of all messages that are neither acknowledged nor given back, oldest first."""
        return [tag for tag in list(self._delivered) if tag not in self._dirty]

    def can_consume(self) -> bool:
        """Whether prefetch allows for another message."""
        return not self.prefetch_count or self._counted() < self.prefetch_count

    def can_consume_max_estimate(self) -> int | None:
        """How many more messages prefetch allows for; None: as many as there are."""
        return max(self.prefetch_count - self._counted(), 0) if self.prefetch_count else None

    def _counted(self) -> int:
        return len(self._delivered) - len(self._dirty) - len(self._aside)

    # What becomes of a message

    def append(self, message: Any, delivery_tag: str) -> None:
        """Hold a message; Redis has its record since it was fetched."""
        stock.virtual.QoS.append(self, message, delivery_tag)

    def remember_restored(self, tag: str, fingerprint: str) -> None:
        """Note the sha1 under which this message's restores are counted, so that its acknowledgement ends the count."""
        self._fingerprints[tag] = fingerprint

    def count_alone(self, tag: str, by: int) -> None:
        """Count that a restored message is taken in hand alone (1), or given back by a worker that lives (-1).

        What was counted and never taken back or acknowledged is a death. Raises when Redis does, but only for 1.
        """
        if fingerprint := self._fingerprints.get(tag):
            if by > 0:
                # Those before it are decided: were Redis not told, they would be blamed for what this one does.
                self.channel.settle()
                self.channel.count(ALONE + fingerprint, by)
            elif by := -min(-by, self._alone.get(tag, 0)):  # what was not counted, or was forgiven, is not again
                self.channel.owed.forgive(fingerprint, -by)
            self._alone[tag] = self._alone.get(tag, 0) + by

    def ack(self, delivery_tag: str) -> None:
        """Forget a message for good: at the next tick of the loop in Redis, at once for prefetch."""
        self.channel.owed.acknowledge(delivery_tag, self._fingerprints.pop(delivery_tag, None))
        self._let_go(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Forget a message for good, or put it where it is served last."""
        if not requeue:
            self.ack(delivery_tag)
        else:
            self.restore_by_tag(delivery_tag, leftmost=True)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:  # noqa: ARG002
        """Put a message back, uncounted: where it is served next, or (leftmost) last. Raises when Redis does."""
        for done in self.put_back([tag], "LPUSH" if leftmost else "RPUSH"):
            self._let_go(done)

    def requeue(self, tags: Iterable[str]) -> int:
        """Put messages back where they are served next, in the order they came in, without counting it against them.

        Returns how many. Raises when Redis does: what was not put back by then is still held.
        """
        wanted = set(tags) - self._dirty
        ordered = [tag for tag in self._delivered if tag in wanted]
        for tag in self.put_back(ordered, "RPUSH"):
            self._let_go(tag)
        return len(ordered)

    def requeue_later(self, tags: Iterable[str]) -> None:
        """Let go of messages that Redis would not take back: they go back, uncounted, as soon as it does."""
        wanted = set(tags) - self._dirty
        ordered = [tag for tag in self._delivered if tag in wanted]
        self.channel.owed.requeue_later(ordered)
        for tag in ordered:
            self._let_go(tag)

    def put_back(self, tags: list[str], push: str) -> Iterator[str]:
        """Yield each tag once it is back; newest first, as each ends up in front of those before it."""
        while tags:
            chunk = tags[-RESTORES_PER_CALL:]
            left = int(self.channel.requeue([push, *chunk]))
            yield from chunk[left:]
            tags = tags[: len(tags) - len(chunk) + left]

    def _let_go(self, tag: str) -> None:
        self._aside.discard(tag)
        self._fingerprints.pop(tag, None)
        self._alone.pop(tag, None)
        self._quick_ack(tag)

    # Signs of life

    def touch(self) -> None:
        """Tell Redis that all held messages are in good hands, if a third of the visibility timeout has passed."""
        if monotonic() >= self._touch_due:
            held = self.held()
            for start in range(0, len(held), TAGS_PER_CALL):
                self.channel.touch([str(start), *held[start : start + TAGS_PER_CALL]])
            self._touch_due = monotonic() + 0.3 * self.visibility_timeout

    def restore_visible(self, start: int = 0, num: int = 10, interval: int = 10) -> None:  # noqa: ARG002
        """Put back what no worker gave a sign of life for, oldest first, and count it against each message.

        Does so at every `interval`th call, as kombu's own, which is called every `unacked_restore_interval` seconds.
        """
        self._vrestore_count += 1
        if (self._vrestore_count - 1) % (interval or 1):
            return
        most = RESTORES_PER_CALL
        for _ in range(RESTORE_CALLS_PER_SWEEP):
            restored, stuck, more = self.channel.restore([str(self.visibility_timeout), str(most)])
            if restored:
                logger.warning("Put %d messages back: their worker gave no sign of life.", restored)
            if stuck:
                logger.error(
                    "%d messages in %s fit no queue and stay there: look at them, and at their exchange's bindings.",
                    stuck,
                    self.unacked_key,
                )
            if not more:
                break

    # The end

    def restore_unacked(self, client: Any = None) -> None:  # noqa: ARG002
        """Put all held messages back, as `requeue` does."""
        self.requeue(self.held())
        self._flush()

    def restore_unacked_once(self, stderr: Any = None) -> None:  # noqa: ARG002
        """Put all held messages back when the channel closes, however the broker fares: never raises.

        What cannot be put back now goes back with this process' next connection, or else after the visibility timeout.
        """
        self._on_collect.cancel()
        if self._delivered.restored:
            return
        self._delivered.restored = True
        held = self.held()
        for tag, times in self._alone.items():  # whatever becomes of the message, this process did not die of it
            self.channel.owed.forgive(self._fingerprints[tag], times)
        self._alone.clear()
        try:
            if held and self.restore_at_shutdown and self.channel.do_restore:
                self.channel.settle()
                self.restore_unacked()
                logger.info("Put %d unacknowledged messages back.", len(held))
        except Exception as error:  # noqa: BLE001 - a worker must not die of a broker that is away
            self.channel.owed.requeue_later(self.held())
            logger.warning(
                "Could not put %d unacknowledged messages back (%r): they go with the next connection, else in %s s.",
                len(held),
                error,
                self.visibility_timeout,
            )
        self._delivered.clear()
        self._dirty.clear()
        self._aside.clear()
