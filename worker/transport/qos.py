"""Messages in flight: prefetch, acknowledgements, requeues, heartbeats, and the restore of other workers' messages.

In Redis, each message in flight is a record in the hash `unacked` and a time in the sorted set `unacked_index`, as with
kombu's own transport.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib import import_module
from time import monotonic
from typing import Any, Final

from .pending import PendingOperations
from .scripts import Scripts

stock: Any = import_module("kombu.transport.redis")

logger = logging.getLogger(__name__)

#: Calls of restore.lua in one sweep: the event loop has other things to do.
MAX_RESTORE_CALLS: Final = 20


class QoS(stock.QoS):
    """The messages in flight of one channel. Only the consuming thread may call it, but any thread may acknowledge."""

    def __init__(self, channel: Any, prefetch_count: int = 0) -> None:
        self._scripts: Scripts = channel.scripts
        self._pending: PendingOperations = channel.pending
        self._parked: set[str] = set()
        self._fingerprints: dict[str, str] = {}  # of restored messages: the sha1 under which their restores are counted
        self._solo_attempts: dict[str, int] = {}
        #: The next time, as of monotonic(), at which `heartbeat_if_due` does something.
        self.heartbeat_due = 0.0
        super().__init__(channel, prefetch_count)

    # Prefetch

    def park(self, tag: str) -> None:
        """Stop counting a message against prefetch. It stays in flight, with heartbeats."""
        if tag in self._delivered and tag not in self._dirty:
            self._parked.add(tag)

    def in_flight(self) -> list[str]:
        """The tags of all messages that are neither acknowledged nor requeued, oldest first."""
        return [tag for tag in list(self._delivered) if tag not in self._dirty]

    def can_consume(self) -> bool:
        """Whether prefetch allows for another message."""
        return not self.prefetch_count or self._counted() < self.prefetch_count

    def can_consume_max_estimate(self) -> int | None:
        """How many more messages prefetch allows for; None if there is no limit."""
        return max(self.prefetch_count - self._counted(), 0) if self.prefetch_count else None

    def _counted(self) -> int:
        return len(self._delivered) - len(self._dirty) - len(self._parked)

    # Acknowledge, requeue

    def append(self, message: Any, delivery_tag: str) -> None:
        """Add a message; Redis has its record since it was fetched."""
        stock.virtual.QoS.append(self, message, delivery_tag)

    def remember_restored(self, tag: str, fingerprint: str) -> None:
        """Remember the sha1 under which a message's restores are counted: its acknowledgement ends the count."""
        self._fingerprints[tag] = fingerprint

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message: for prefetch at once, in Redis with the next flush of pending operations."""
        self._pending.acknowledge(delivery_tag, self._fingerprints.pop(delivery_tag, None))
        self.release(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Acknowledge a message, or requeue it where it is served last."""
        if requeue:
            self.restore_by_tag(delivery_tag, leftmost=True)
        else:
            self.ack(delivery_tag)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:  # noqa: ARG002
        """Requeue a message: it is served next, or last if `leftmost`. Raises what redis-py raises."""
        for requeued in self._scripts.requeue([tag], "LPUSH" if leftmost else "RPUSH"):
            self.release(requeued)

    def requeue(self, tags: Iterable[str]) -> int:
        """Requeue messages in the order they came in. Returns how many of them were in flight.

        Raises what redis-py raises; messages that were not requeued by then are still in flight.
        """
        ordered = self._in_order(tags)
        for tag in self._scripts.requeue(ordered):
            self.release(tag)
        return len(ordered)

    def requeue_later(self, tags: Iterable[str]) -> None:
        """Release messages that Redis did not take back; they are requeued with the next connection that works."""
        ordered = self._in_order(tags)
        self._pending.requeue_later(ordered)
        for tag in ordered:
            self.release(tag)

    def release(self, tag: str) -> None:
        """Drop the local bookkeeping of a message."""
        self._parked.discard(tag)
        self._fingerprints.pop(tag, None)
        self._solo_attempts.pop(tag, None)
        self._quick_ack(tag)

    def _in_order(self, tags: Iterable[str]) -> list[str]:
        chosen = set(tags) - self._dirty
        return [tag for tag in self._delivered if tag in chosen]

    # Solo attempts on messages that were restored

    def record_solo_attempt(self, tag: str) -> None:
        """Count in Redis that this worker applies a restored message alone. Raises what redis-py raises.

        An attempt that is neither undone nor acknowledged is the death of a worker.
        """
        if fingerprint := self._fingerprints.get(tag):
            # Acknowledge first: if this message kills the process, messages whose batch is committed must not be
            # restored, and the restore counted against them.
            self._pending.flush(self._scripts)
            self._scripts.count_solo_attempts(fingerprint, 1)
            self._solo_attempts[tag] = self._solo_attempts.get(tag, 0) + 1

    def undo_solo_attempts(self, tag: str, count: int) -> None:
        """Subtract up to `count` of the recorded attempts, for this worker survived them. Never raises.

        Redis gets this with the next flush of pending operations.
        """
        recorded = self._solo_attempts.get(tag, 0)
        if undone := min(count, recorded):
            self._pending.undo_solo_attempts(self._fingerprints[tag], undone)
            self._solo_attempts[tag] = recorded - undone

    # Heartbeats, and messages whose worker sends none

    def heartbeat(self) -> None:
        """Refresh the time of all messages in flight. Raises what redis-py raises."""
        self._scripts.heartbeat(self.in_flight())
        self.heartbeat_due = monotonic() + 0.3 * self.visibility_timeout

    def heartbeat_if_due(self) -> None:
        """Do so if almost a third of the visibility timeout has passed since the last time."""
        if monotonic() >= self.heartbeat_due:
            self.heartbeat()

    def restore_visible(self, start: int = 0, num: int = 10, interval: int = 10) -> None:  # noqa: ARG002
        """Restore the messages of all workers whose heartbeats stopped, at every `interval`th call.

        kombu calls this every `unacked_restore_interval` seconds.
        """
        self._vrestore_count += 1
        if (self._vrestore_count - 1) % (interval or 1):
            return
        for _ in range(MAX_RESTORE_CALLS):
            restored, stuck, more = self._scripts.restore(timeout := self.visibility_timeout)
            if restored:
                logger.warning("Restored %d messages: their worker sent no heartbeat for %s s.", restored, timeout)
            if stuck:
                logger.error(
                    "%d messages in %s fit no queue and stay there: check them and the bindings of their exchange.",
                    stuck,
                    self.unacked_key,
                )
            if not more:
                break

    # The end of the channel

    def restore_unacked(self, client: Any = None) -> None:  # noqa: ARG002
        """Requeue all messages in flight. Raises what redis-py raises."""
        self.requeue(self.in_flight())
        self._flush()

    def restore_unacked_once(self, stderr: Any = None) -> None:  # noqa: ARG002
        """Requeue all messages in flight when the channel closes. Never raises.

        Messages that Redis does not take are requeued over this process' next connection; if there is none, another
        worker restores them after the visibility timeout.
        """
        self._on_collect.cancel()
        if self._delivered.restored:
            return
        self._delivered.restored = True
        for tag, attempts in self._solo_attempts.items():  # the process is alive, whatever becomes of the messages
            self._pending.undo_solo_attempts(self._fingerprints[tag], attempts)
        self._solo_attempts.clear()
        messages = len(self.in_flight())
        try:
            if messages and self.restore_at_shutdown and self.channel.do_restore:
                self._pending.flush(self._scripts)
                self.restore_unacked()
                logger.info("Requeued %d unacknowledged messages.", messages)
        except Exception as error:  # noqa: BLE001 - an unreachable broker must not end the worker
            self._pending.requeue_later(self.in_flight())
            logger.warning(
                "Could not requeue %d unacknowledged messages (%r): "
                "they are requeued with the next connection, or restored after %s s.",
                messages,
                error,
                self.visibility_timeout,
            )
        self._delivered.clear()
        self._dirty.clear()
        self._parked.clear()
