"""Deliveries into batches, outcomes into acknowledgements and events.

Every message becomes a real Celery request, so that Flower and `celery inspect` see each event; what runs is not one
task a time but one database transaction a batch. A batch is what arrived while the last one committed: one event when
idle, `batch_size` under load, and no timer in between. Messages are read in the event loop while the ledger's thread
commits; a message is acknowledged when its outcome is durable, and not before.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from time import monotonic
from typing import Any, Final, cast

import structlog
from celery import bootsteps
from celery.worker import state

from worker.config import Settings, settings
from worker.ledger.errors import Interrupted, SuspiciousBatch
from worker.ledger.outcomes import Applied, Locked, Outcome, Undecided
from worker.ledger.settle import Ledger
from worker.ledger.store import stripe_of
from worker.queue.intake import Intake, Item
from worker.queue.patience import LOOK_EVERY
from worker.queue.waiting import ABSENT, SLOW, Look, Part, Seen, Waiting

log = structlog.get_logger(__name__)

#: Bytes of message bodies in hand, beyond which no more are fetched.
MOST_BYTES: Final = 64 * 1024 * 1024

#: Bytes of message bodies in one batch; a larger message is a batch of its own.
BATCH_BYTES: Final = 16 * 1024 * 1024

#: Messages a worker may have in hand, if two batches are not more: a fetch for the next batch, and one behind it.
LEAST_PREFETCH: Final = 1000

#: How often a message was given back by dead workers before it is applied alone.
SUSPECT: Final = 2


class Batcher:
    """What one worker process has in hand. Methods run in the event loop's thread unless they say otherwise."""

    def __init__(self, settings: Settings, hostname: str) -> None:
        self._settings = settings
        self._stop = threading.Event()
        stripe = stripe_of(socket.gethostname(), os.getpid(), settings.stripes)
        self._ledger = Ledger(settings, stripe=stripe, stop=self._stop, degraded=self._on_degraded)
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._running: Future[list[Outcome]] | Future[Seen] | None = None
        self._batch: list[Part] = []
        self._looking: Look | None = None  # what runs is a look, and no batch
        self._began = 0.0
        self._unread: deque[Any] = deque()  # messages in order of arrival, and overdue burns behind them
        self._queue: deque[Part] = deque()
        self._queued = 0  # events
        self._waiting = Waiting(settings)
        self._finished: deque[tuple[Item, float]] = deque()  # with the seconds it took
        self._bytes = 0
        self._degraded: str | None = None
        self._suspended = False
        self._paused = ""
        self._channel: Any = None
        self._ticks: Any = None
        self._intake = Intake(settings, hostname)
        self._bell, self._ears = socket.socketpair()
        self._bell.setblocking(False)
        self._ears.setblocking(False)

    # In the event loop

    def attach(self, consumer: Any) -> None:
        """Work for a consumer's new connection. What an old one brought is decided and acknowledged all the same; what
        waited is forgotten, for it is put back with its connection and would wait twice.
        """
        self._channel = consumer.task_consumer.channel
        self._intake.attach(consumer)
        for item in {part.item: None for part in self._waiting.take_all()}:
            self._let_go(item)
            self._intake.forget(item)
        self._paused = ""
        consumer.hub.add_reader(self._ears, self._on_bell)
        if self._ticks is not None:
            self._ticks.cancel()
        self._ticks = consumer.hub.call_repeatedly(LOOK_EVERY, self._tick)
        # Two batches at least: one in the ledger's hands, one that fills up meanwhile. Celery's loop sets `value` anew.
        consumer.qos.value = max(2 * self._settings.batch_size, LEAST_PREFETCH)
        consumer.qos.update()
        self._mind_intake()

    def receive(self, message: Any) -> None:
        """Take a message in; it is decided as soon as the ledger is free."""
        self._unread.append(message)
        self._read()
        if self._running is None:
            self._ring()  # not at once: what else this turn of the loop brings belongs into the same batch
        if self._bytes > MOST_BYTES or self._unread:
            self._mind_intake()

    def _read(self) -> None:
        """Read what is unread until two batches are ready. To read a thousand bulk messages takes half a minute and a
        gigabyte, while the ledger has nothing to do and another worker nothing to fetch.
        """
        while self._unread and self._queued < 2 * self._settings.batch_size:
            next_ = self._unread.popleft()
            if isinstance(next_, Part):
                part = next_
            else:
                item = self._intake.read(next_)
                self._bytes += item.size
                part = Part(item, item.work.deliveries, item.work.places)
            self._queue.append(part)
            self._queued += part.events

    def _put_first(self, parts: list[Part]) -> None:
        """Before all others, in this order."""
        self._queue.extendleft(reversed(parts))
        self._queued += sum(part.events for part in parts)

    def _on_bell(self) -> None:
        try:
            self._ears.recv(4096)
        except BlockingIOError:
            return
        if self._running is not None and self._running.done():
            self._finish_batch()
        self._begin_batch()
        self._tell()  # while the ledger works again
        self._read()
        self._begin_batch()  # had there been nothing
        self._mind_intake()

    def _tick(self) -> None:
        overdue = self._waiting.overdue(
            stalled=bool(self._degraded) or self._suspended or self._stalled(), elsewhere=[*self._batch, *self._queue]
        )
        self._unread.extend(overdue)  # behind all that was fetched by now
        self._read()
        self._begin_batch()

    def _stalled(self) -> bool:
        """Whether the ledger waits for something: a lock, a server that is frozen. Then little can be fetched."""
        longest = ABSENT + SLOW * sum(part.events for part in self._batch)
        return self._running is not None and monotonic() - self._began > longest

    def _begin_batch(self) -> None:
        """Have the ledger do what is next: look what became of that which waits, if it is time for that, or decide."""
        if self._running is not None or self._suspended or self._stop.is_set():
            return
        self._began = monotonic()
        self._looking = self._waiting.look(idle=not self._queue, anyway=bool(self._degraded))
        if self._looking:
            self._running = self._thread.submit(self._look, self._looking)
        elif parts := self._next_parts():
            self._batch = parts
            self._running = self._thread.submit(self._settle, parts)
        else:
            return
        self._running.add_done_callback(lambda _: self._ring())

    def _next_parts(self) -> list[Part]:
        """From the front of the queue, as much as a batch holds. Only for a locked account is a bulk message cut; a
        suspect goes alone.
        """
        parts: list[Part] = []
        events = size = 0
        while self._queue:
            part = self._queue[0]
            same = bool(parts) and parts[-1].item is part.item
            more = 0 if same else part.item.size
            full = events + part.events > self._settings.batch_size or size + more > BATCH_BYTES
            if parts and (full or (not same and (_suspect(part) or _suspect(parts[-1])))):
                break
            self._queue.popleft()
            self._queued -= part.events
            if not self._waiting.keep_locked(part):
                continue
            events += part.events
            size += more
            parts.append(part)
            if _suspect(part) and not part.item.alone:
                self._tell()  # whom it kills with it must not be those that are decided
                self._intake.try_alone(part.item)
        return parts

    def _finish_batch(self) -> None:
        """Take in what the ledger has done."""
        assert self._running is not None
        running, batch, look = self._running, self._batch, self._looking
        self._running, self._batch, self._looking = None, [], None
        if look:
            self._put_first(self._waiting.seen(look, cast(Seen, running.result())))
            return
        try:
            outcomes = iter(cast(list[Outcome], running.result()))
        except Interrupted:
            self._put_first(batch)
            return
        except SuspiciousBatch as suspicion:
            self._suspend(batch, suspicion)
            return
        accrued: list[str] = []
        for part in batch:
            self._settled(part, outcomes, accrued)
        self._waiting.say_what_is_locked()
        for user_id in accrued:
            self._put_first(self._waiting.accrued(user_id))

    def _settled(self, part: Part, outcomes: Iterator[Outcome], accrued: list[str]) -> None:
        item = part.item
        for delivery, place in zip(part.deliveries, part.places, strict=True):
            outcome = next(outcomes)
            if isinstance(outcome, Locked):
                self._waiting.for_lock(item, delivery, place)
                continue
            if isinstance(outcome, Undecided):
                self._waiting.for_tokens(item, delivery, place, part)
                continue
            item.work.outcomes[place] = outcome
            if isinstance(outcome, Applied) and not outcome.repeated and delivery.event.type == "accrual":
                accrued.append(delivery.event.user_id)
        item.work.letters.clear()
        if item.finished:
            self._let_go(item)
            self._finished.append((item, monotonic() - self._began))
        elif item.alone:
            self._intake.try_alone(item, -item.alone)  # survived: what it waits for may be behind the culprit

    def _let_go(self, item: Item) -> None:
        """Its bytes are no longer in hand. Nothing happens the second time."""
        self._bytes -= item.size
        item.size = 0

    def _tell(self) -> None:
        """Acknowledge what is decided, and say so to Flower."""
        while self._finished:
            self._intake.finish(*self._finished.popleft())

    def _suspend(self, batch: list[Part], suspicion: SuspiciousBatch) -> None:
        self._suspended = True
        self._put_first(batch)
        log.critical("this worker takes no more work", reason=str(suspicion))
        self._mind_intake()
        self._requeue_all()

    def _mind_intake(self) -> None:
        """Fetch no more than can be decided: nothing while the database is away, or while enough is in hand."""
        away = bool(self._degraded) or self._suspended
        enough = bool(self._unread) or self._waiting.full or self._bytes > MOST_BYTES
        paused = "at once" if away else "soon" if enough else ""
        if paused != self._paused and hasattr(self._channel, "pause"):
            self._paused = paused
            if paused:
                self._channel.pause(requeue_fetched=away)
            else:
                self._channel.resume()

    # The end

    def drain(self) -> None:
        """Finish the batch in hand, acknowledge it, and put everything else back. The event loop no longer runs.

        Nothing happens the second time.
        """
        if self._stop.is_set():
            return
        self._stop.set()  # also out of waiting for a database that is away
        if hasattr(self._channel, "pause"):
            self._channel.pause()
        if self._running is not None:
            self._running.exception()  # waits
            self._finish_batch()
        self._tell()
        self._requeue_all()
        self._thread.shutdown()
        self._ledger.close()

    def _requeue_all(self) -> None:
        """Put all that is undecided back where it came from, in its old order; it does not count as a death."""
        overdue = [part for part in self._unread if isinstance(part, Part)]
        unread = [message for message in self._unread if not isinstance(message, Part)]
        items = {id(part.item): part.item for part in [*self._queue, *overdue, *self._waiting.take_all()]}
        ordered = sorted(items.values(), key=lambda item: item.number)
        self._queue.clear()
        self._unread.clear()
        self._bytes = self._queued = 0
        if not ordered and not unread:
            return
        log.info("putting undecided messages back", messages=len(ordered) + len(unread))
        self._intake.requeue(ordered, unread)

    # In the ledger's thread

    def _settle(self, batch: list[Part]) -> list[Outcome]:
        """The outcomes of all deliveries of `batch`."""
        deliveries = [delivery for part in batch for delivery in part.deliveries]
        letters = [letter for part in batch for letter in part.item.work.letters]
        return self._ledger.settle(deliveries, letters, leave_locked=True)

    def _look(self, look: Look) -> Seen:
        """What of all that waits need wait no longer."""
        if not look.burns and not look.locked:
            self._ledger.probe()
        covered = self._ledger.covered([part.deliveries[0] for part in look.burns]) if look.burns else []
        return Seen(
            [part for part, is_covered in zip(look.burns, covered, strict=True) if is_covered],
            self._ledger.unlocked(look.locked) if look.locked else set(),
        )

    def _on_degraded(self, trouble: str | None) -> None:
        self._degraded = trouble
        self._ring()

    def _ring(self) -> None:
        """Wake the event loop, from any thread. A full pipe has woken it already."""
        with suppress(BlockingIOError):
            self._bell.send(b"!")


def _suspect(part: Part) -> bool:
    return part.item.restores >= SUSPECT


class Batching(bootsteps.StartStopStep):
    """The part of Celery's consumer that batches: started with each connection, drained when the worker stops."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        consumer.batcher = Batcher(settings(), consumer.hostname)

    def start(self, consumer: Any) -> None:
        consumer.batcher.attach(consumer)

    def stop(self, consumer: Any) -> None:
        if state.should_stop is not None or state.should_terminate is not None:
            consumer.batcher.drain()

    def terminate(self, consumer: Any) -> None:
        self.stop(consumer)
