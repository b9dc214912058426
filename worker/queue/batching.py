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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from math import inf
from time import monotonic
from typing import Any, Final, NamedTuple

import structlog
from celery import bootsteps
from celery.worker import state

from worker.config import Settings, settings
from worker.ledger.errors import Interrupted, SuspiciousBatch
from worker.ledger.outcomes import Applied, Delivery, Locked, Outcome, Undecided
from worker.ledger.settle import Ledger
from worker.ledger.store import stripe_of

from .intake import Intake, Item
from .patience import LOOK_EVERY, Patience, WaitingRoom

log = structlog.get_logger(__name__)

#: Bytes of message bodies in hand, beyond which no more are fetched.
MOST_BYTES: Final = 64 * 1024 * 1024

#: Bytes of message bodies in one batch; a larger message is a batch of its own.
BATCH_BYTES: Final = 16 * 1024 * 1024

#: Messages a worker may have in hand, if two batches are not more: a fetch for the next batch, and one behind it.
LEAST_PREFETCH: Final = 1000

#: Seconds between two looks at patience after which this process must have been frozen, or without a connection.
ABSENT: Final = 4 * LOOK_EVERY

#: Seconds between two looks at whether accounts are still locked, and, while batches follow each other without a pause,
#: between two looks at what waiting burns' accounts hold: one look at ten thousand of them takes a tenth of a second.
LOOK_SELDOM: Final = 4 * LOOK_EVERY

#: How often a message was given back by dead workers before it is applied alone.
SUSPECT: Final = 2


class Part:
    """What of one message goes into one batch: all of it, or one event that waited."""

    __slots__ = ("deadline", "deliveries", "grace", "item", "places")

    def __init__(self, item: Item, deliveries: list[Delivery], places: list[int]) -> None:
        self.item = item
        self.deliveries = deliveries
        self.places = places
        self.deadline: float | None = None
        self.grace = 0.0

    @property
    def events(self) -> int:
        """How many rows it may become. A letter is a row like any other."""
        return len(self.deliveries) + len(self.item.work.letters)

    @property
    def user_id(self) -> str:
        """Whose account the one event waits for."""
        return self.deliveries[0].event.user_id

    def finally_(self) -> None:
        """No more patience: too small a balance is the answer now."""
        self.deliveries = [delivery._replace(final=True) for delivery in self.deliveries]


class Settled(NamedTuple):
    """What the ledger's thread brings back."""

    outcomes: list[Outcome]
    covered: list[Part]  # burns that waited, and for which there is an answer now
    unlocked: set[str]  # accounts that were locked


class Batcher:
    """What one worker process has in hand. Methods run in the event loop's thread unless they say otherwise."""

    def __init__(self, settings: Settings, hostname: str) -> None:
        self._settings = settings
        self._stop = threading.Event()
        stripe = stripe_of(socket.gethostname(), os.getpid(), settings.stripes)
        self._ledger = Ledger(settings, stripe=stripe, stop=self._stop, degraded=self._on_degraded)
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._running: Future[Settled] | None = None
        self._batch: list[Part] = []
        self._began = 0.0
        self._unread: deque[Any] = deque()  # messages in order of arrival, and overdue burns behind them
        self._queue: deque[Part] = deque()
        self._queued = 0  # events
        self._patience: Patience[Part] = Patience(settings.burn_patience)
        self._locked: WaitingRoom[Part] = WaitingRoom()
        self._said_locked = False
        self._ticked = monotonic()
        self._look = False  # at what waiting burns' accounts hold, with the next batch
        self._look_due = 0.0  # when to look even though the ledger has other things to do
        self._locked_due = 0.0  # when to look at what is locked
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
        waited = [*self._patience.take_all(), *self._locked.take_all()]
        for item in {part.item: None for part in waited}:
            self._bytes -= item.size
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

    def _requeue(self, parts: list[Part]) -> None:
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
        now = monotonic()
        absent, self._ticked = now - self._ticked > ABSENT, now
        if absent or self._degraded or self._suspended:
            self._patience.begin_again()
            for part in (*self._batch, *self._queue):
                part.deadline = None
        for part in self._patience.take_overdue():
            part.finally_()
            self._unread.append(part)  # behind all that was fetched by now
        self._read()
        self._look = self._look or self._running is None or self._ticked >= self._look_due
        self._begin_batch()

    def _begin_batch(self) -> None:
        """Have the ledger decide what is next, and look what became of that which waits, if it is time for that."""
        if self._running is not None or self._suspended or self._stop.is_set():
            return
        self._began = monotonic()
        burns = list(self._patience) if self._look else []
        locked = list(self._locked.users) if self._began >= self._locked_due else []
        self._batch = self._next_parts()
        self._look = False
        if not self._batch and not burns and not locked:
            return
        if burns:
            self._look_due = inf
        if locked:
            self._locked_due = inf
        self._running = self._thread.submit(self._settle, self._batch, burns, locked)
        self._running.add_done_callback(lambda _: self._ring())

    def _next_parts(self) -> list[Part]:
        """From the front of the queue, as much as a batch holds. Only for a locked account is a bulk message cut; a
        suspect goes alone.
        """
        parts: list[Part] = []
        events = size = 0
        while self._queue:
            part = self._queue[0]
            suspect = part.item.restores >= SUSPECT
            more = 0 if parts and parts[-1].item is part.item else part.item.size
            full = events + part.events > self._settings.batch_size or size + more > BATCH_BYTES
            if parts and (suspect or full):
                break
            self._queue.popleft()
            self._queued -= part.events
            if self._locked and not self._hold_locked(part):
                continue
            events += part.events
            size += more
            parts.append(part)
            if suspect:
                if not part.item.alone:
                    self._tell()  # whom it kills with it must not be those that are decided
                    self._intake.try_alone(part.item)
                break
        return parts

    def _finish_batch(self) -> None:
        assert self._running is not None
        future, batch = self._running, self._batch
        self._running, self._batch = None, []
        try:
            settled = future.result()
        except Interrupted:
            self._requeue(batch)
            return
        except SuspiciousBatch as suspicion:
            self._suspend(batch, suspicion)
            return
        accrued: list[str] = []
        outcomes = iter(settled.outcomes)
        for part in batch:
            self._settled(part, outcomes, accrued)
        self._say_what_is_locked()
        self._requeue(self._patience.take_these(settled.covered))
        for user_id in accrued:
            self._requeue(self._patience.take(user_id))
        for user_id in settled.unlocked:
            self._requeue(self._locked.take(user_id))
        next_look = monotonic() + LOOK_SELDOM  # from now on: a look that takes long must not be followed by the next
        self._look_due, self._locked_due = min(self._look_due, next_look), min(self._locked_due, next_look)

    def _settled(self, part: Part, outcomes: Any, accrued: list[str]) -> None:
        item = part.item
        for delivery, place in zip(part.deliveries, part.places, strict=True):
            outcome = next(outcomes)
            if isinstance(outcome, Locked):
                self._hold(item, delivery, place)
                continue
            if isinstance(outcome, Undecided):
                self._patience.add(part if len(part.places) == 1 else Part(item, [delivery], [place]))
                self._set_aside(item)
                continue
            item.work.outcomes[place] = outcome
            if isinstance(outcome, Applied) and not outcome.repeated and delivery.event.type == "accrual":
                accrued.append(delivery.event.user_id)
        item.work.letters.clear()
        if item.finished:
            self._bytes -= item.size
            self._finished.append((item, monotonic() - self._began))
        elif item.alone:
            self._intake.try_alone(item, -item.alone)  # survived: what it waits for may be behind the culprit

    def _tell(self) -> None:
        """Acknowledge what is decided, and say so to Flower."""
        while self._finished:
            self._intake.finish(*self._finished.popleft())

    def _hold_locked(self, part: Part) -> bool:
        """Set aside what of a part concerns accounts that are known to be locked; whether anything is left of it."""
        kept: list[tuple[Delivery, int]] = []
        for delivery, place in zip(part.deliveries, part.places, strict=True):
            if delivery.event.user_id in self._locked.users:
                self._hold(part.item, delivery, place)
            else:
                kept.append((delivery, place))
        part.deliveries = [delivery for delivery, _ in kept]
        part.places = [place for _, place in kept]
        return part.events > 0

    def _hold(self, item: Item, delivery: Delivery, place: int) -> None:
        """Let an event wait for its account to be unlocked. Patience, if any was spent, begins anew after that, as no
        accrual could come before, and lasts longer: another worker that has it may look later than we.
        """
        part = Part(item, [delivery._replace(final=delivery.final and self._settings.burn_patience == 0)], [place])
        part.grace = LOOK_SELDOM + self._settings.lock_timeout
        self._locked.add(part)
        self._set_aside(item)

    def _set_aside(self, item: Item) -> None:
        """What waits does not count against prefetch: a thousand burns must not keep their accruals out."""
        if set_aside := getattr(item.message.channel.qos, "set_aside", None):
            set_aside(item.message.delivery_tag)

    def _say_what_is_locked(self) -> None:
        """Once when it begins and once when it is over, however often anything is tried meanwhile."""
        if self._said_locked == bool(self._locked):
            return
        self._said_locked = bool(self._locked)
        if self._said_locked:
            log.warning(
                "accounts locked by another session, their events wait and all others go on",
                accounts=len(self._locked.users),
                events=len(self._locked),
                user_id=next(iter(self._locked.users)),
            )
        else:
            log.info("no account is locked by another session any more")

    def _suspend(self, batch: list[Part], suspicion: SuspiciousBatch) -> None:
        self._suspended = True
        self._requeue(batch)
        log.critical("this worker takes no more work", reason=str(suspicion))
        self._mind_intake()
        self._give_back()

    def _mind_intake(self) -> None:
        """Fetch no more than can be decided: nothing while the database is away, or while enough is in hand."""
        away = bool(self._degraded) or self._suspended
        enough = bool(self._unread) or self._patience.full or self._locked.full or self._bytes > MOST_BYTES
        paused = "at once" if away else "soon" if enough else ""
        if paused != self._paused and hasattr(self._channel, "pause"):
            self._paused = paused
            if paused:
                self._channel.pause(at_once=away)
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
        self._give_back()
        self._thread.shutdown()
        self._ledger.close()

    def _give_back(self) -> None:
        """Put all that is undecided back where it came from, in its old order; it does not count as a death."""
        overdue = [part for part in self._unread if isinstance(part, Part)]
        unread = [message for message in self._unread if not isinstance(message, Part)]
        waiting = [*self._patience.take_all(), *self._locked.take_all()]
        items = {id(part.item): part.item for part in [*self._queue, *overdue, *waiting]}
        ordered = sorted(items.values(), key=lambda item: item.number)
        self._queue.clear()
        self._unread.clear()
        self._said_locked = False
        self._bytes = self._queued = 0
        if not ordered and not unread:
            return
        log.info("putting undecided messages back", messages=len(ordered) + len(unread))
        self._intake.give_back(ordered, unread)

    # In the ledger's thread

    def _settle(self, batch: list[Part], burns: list[Part], locked: list[str]) -> Settled:
        """The outcomes of all deliveries of `batch`, and what of all that waits need wait no longer."""
        deliveries = [delivery for part in batch for delivery in part.deliveries]
        letters = [letter for part in batch for letter in part.item.work.letters]
        outcomes = self._ledger.settle(deliveries, letters, set_aside=True) if deliveries or letters else []
        covered = self._ledger.covered([part.deliveries[0] for part in burns]) if burns else []
        return Settled(
            outcomes,
            [part for part, is_covered in zip(burns, covered, strict=True) if is_covered],
            self._ledger.unlocked(locked) if locked else set(),
        )

    def _on_degraded(self, trouble: str | None) -> None:
        self._degraded = trouble
        self._ring()

    def _ring(self) -> None:
        """Wake the event loop, from any thread. A full pipe has woken it already."""
        with suppress(BlockingIOError):
            self._bell.send(b"!")


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
