"""Deliveries into batches, outcomes into acknowledgements and task events.

Every message becomes a real Celery request, so that Flower and `celery inspect` see each event; what runs is one
database transaction per batch. A batch is what arrived while the one before it committed: one event in an idle
worker, `batch_size` under load, without a timer. The event loop's thread reads messages while the ledger thread
commits. A message is acknowledged once its outcomes are durable, never before.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from time import monotonic
from typing import Any, Final, TypeAlias, TypeVar

import structlog
from kombu.message import Message

from worker.config import Settings
from worker.ledger.errors import Interrupted, SuspiciousBatch
from worker.ledger.outcomes import Applied, Locked, Outcome, Undecided
from worker.ledger.settle import Ledger
from worker.ledger.store import stripe_of
from worker.queue.broker import Broker
from worker.queue.in_flight import InFlight, Part
from worker.queue.intake import Intake
from worker.queue.parking import Parking, Poll, PollResult
from worker.queue.wakeup import Wakeup

log = structlog.get_logger(__name__)

#: Bytes of messages in flight, beyond which the worker stops fetching.
MAX_BYTES: Final = 64 * 1024 * 1024

#: Bytes of messages in one batch; a larger message is a batch of its own.
MAX_BATCH_BYTES: Final = 16 * 1024 * 1024

#: Seconds between two probes of a database that was unavailable when nothing else asked it.
PROBE_SECONDS: Final = 1.0

#: Seconds that a job may take, and seconds more for each row of a batch, before the ledger is held to wait for a lock
#: or a server. Ten times what a poll of 10,000 burns and a row take on a slow machine.
SLOW_JOB_SECONDS: Final = 1.0
SLOW_ROW_SECONDS: Final = 0.001


class Pressure(Enum):
    """How much this worker holds its broker back."""

    NONE = "fetch"
    NO_FETCH = "stop fetching; take what is on its way"  # enough is in flight
    REQUEUE = "stop fetching; requeue what is on its way"  # nothing can be applied: PostgreSQL unavailable, suspended


@dataclass(frozen=True, slots=True)
class Idle:
    """The ledger thread has no job."""


@dataclass(frozen=True, slots=True)
class Settling:
    """The ledger thread applies a batch."""

    parts: list[Part]
    future: Future[list[Outcome]]
    started: float


@dataclass(frozen=True, slots=True)
class Polling:
    """The ledger thread finds out which parked events it can decide now."""

    poll: Poll
    future: Future[PollResult]
    started: float


@dataclass(frozen=True, slots=True)
class Probing:
    """The ledger thread finds out whether PostgreSQL is available again."""

    future: Future[None]
    started: float


#: What the ledger thread does. It has one job at a time.
Job: TypeAlias = Idle | Settling | Polling | Probing

#: What waits to be read, in order: messages as they arrive, and burns whose patience is over.
Arrival: TypeAlias = Message | Part

T = TypeVar("T")


class Batcher:
    """All that one worker process has in flight. Methods run in the event loop's thread unless they say otherwise."""

    def __init__(self, settings: Settings, intake: Intake, broker: Broker) -> None:
        self._batch_size = settings.batch_size
        self._intake = intake
        self._broker = broker
        self._parking = Parking(settings, broker)
        self._stop = threading.Event()
        stripe = stripe_of(socket.gethostname(), os.getpid(), settings.stripes)
        self._ledger = Ledger(settings, stripe=stripe, stop=self._stop, degraded=self._on_degraded)
        self._ledger_thread = ThreadPoolExecutor(1, "ledger")
        self._job: Job = Idle()
        self._probed = monotonic()
        self._arrivals: deque[Arrival] = deque()
        self._queue: deque[Part] = deque()  # what is read, for the next batches
        self._queued_rows = 0
        self._finished: deque[tuple[InFlight, float]] = deque()  # to be acknowledged, with the seconds each took
        self._bytes = 0  # of the messages that are read and not released
        self._degraded = False
        self._suspended = False
        self._pressure = Pressure.NONE
        #: Readable when `advance` has something to do.
        self.wakeup = Wakeup()

    def attach(self, channel: Any) -> None:
        """Use the channel of a new connection.

        Messages of an older connection that are in the ledger or the queue are applied and acknowledged all the same.
        Those that are parked are forgotten: Redis gets them back with their connection, and they would be parked twice.
        """
        self._broker.attach(channel)
        for message in {part.message: None for part in self._parking.take_all()}:
            self._release(message)
            self._intake.forget(message)
        self._pressure = Pressure.NONE
        self._update_pressure()

    def receive(self, message: Message) -> None:
        """Take a message in; it is applied as soon as the ledger thread is free."""
        self._arrivals.append(message)
        self._read_arrivals()
        if isinstance(self._job, Idle):
            self.wakeup.send()  # not `advance`: what else this turn of the event loop brings goes into the same batch
        if self._bytes > MAX_BYTES or self._arrivals:
            self._update_pressure()

    def on_tick(self) -> None:
        """Called every parking.POLL_SECONDS."""
        overdue = self._parking.take_overdue(
            ledger_waits=self._degraded or self._suspended or self._ledger_waits(),
            elsewhere=chain(self._job.parts if isinstance(self._job, Settling) else (), self._queue),
        )
        self._arrivals.extend(overdue)  # behind all that was fetched by now: an accrual among it goes first
        self.advance()

    def advance(self) -> None:
        """Do all that can be done now. Called when `wakeup` is readable, and at every tick. The order matters:

        The last job is finished before the next starts: parked events that its outcomes release go into the next batch,
        before later events of their accounts. The next job starts before finished messages are acknowledged and
        arrivals are read, so that PostgreSQL commits meanwhile; it is tried again behind that, since the queue may have
        been empty before. The pressure is last: it depends on what is left of the arrivals.
        """
        self.wakeup.clear()
        self._finish_job()
        self._start_job()
        self._acknowledge_finished()
        self._read_arrivals()
        self._start_job()
        self._update_pressure()

    def drain(self) -> None:
        """Finish the batch in the ledger, acknowledge it, and requeue everything else. The event loop has ended.

        Acknowledgements come first: what they do not name is requeued. A second call does nothing.
        """
        if self._stop.is_set():
            return
        self._stop.set()  # ends the ledger's wait for an unavailable database; no further job starts
        self._set_pressure(Pressure.REQUEUE)
        if not isinstance(self._job, Idle):
            self._job.future.exception()  # waits until the job is done
            self._finish_job()
        self._acknowledge_finished()
        self._requeue_all()
        self._ledger_thread.shutdown()
        self._ledger.close()
        self.wakeup.close()

    # Arrivals and queue

    def _read_arrivals(self) -> None:
        """Read arrivals until two batches are ready. Reading a thousand bulk messages takes half a minute and a
        gigabyte, while the ledger thread would be idle, and other workers would find nothing to fetch.
        """
        while self._arrivals and self._queued_rows < 2 * self._batch_size:
            arrival = self._arrivals.popleft()
            if isinstance(arrival, Part):
                part = arrival
            else:
                part = self._intake.read(arrival)
                self._bytes += part.message.size
            self._queue.append(part)
            self._queued_rows += part.rows

    def _put_first(self, parts: list[Part]) -> None:
        """Put parts before all others in the queue, in this order."""
        self._queue.extendleft(reversed(parts))
        self._queued_rows += sum(part.rows for part in parts)

    def _next_batch(self) -> list[Part]:
        """Parts from the front of the queue for one batch. A suspect gets a batch of its own.

        The parts of a bulk message are its unlocked events: it is split for nothing else.
        """
        parts: list[Part] = []
        rows = size = 0
        while self._queue:
            part = self._queue[0]
            same_message = bool(parts) and parts[-1].message is part.message
            more_bytes = 0 if same_message else part.message.size
            full = rows + part.rows > self._batch_size or size + more_bytes > MAX_BATCH_BYTES
            if parts and (full or (not same_message and (part.message.suspect or parts[-1].message.suspect))):
                break
            self._queue.popleft()
            self._queued_rows -= part.rows
            if not self._parking.park_locked(part):
                continue
            rows += part.rows
            size += more_bytes
            parts.append(part)
            if part.message.suspect and not part.message.solo_attempts:
                self._record_solo_attempt(part.message)
        return parts

    def _record_solo_attempt(self, message: InFlight) -> None:
        self._acknowledge_finished()  # or the suspect's next victim would be messages that are applied already
        message.solo_attempts += 1
        self._broker.record_solo_attempt(message.kombu_message)

    def _undo_solo_attempts(self, message: InFlight) -> None:
        if message.solo_attempts:
            self._broker.undo_solo_attempts(message.kombu_message, message.solo_attempts)
            message.solo_attempts = 0

    # Jobs

    def _start_job(self) -> None:
        """Give the ledger thread its next job: poll for parked events if a poll is due, or else apply the next batch.

        A poll comes first and by itself, since a batch may have to wait for locks.
        """
        if not isinstance(self._job, Idle) or self._suspended or self._stop.is_set():
            return
        now = monotonic()
        if poll := self._parking.next_poll(idle=not self._queue):
            self._job = Polling(poll, self._submit(self._poll, poll), now)
        elif self._degraded and now - self._probed >= PROBE_SECONDS:
            self._job = Probing(self._submit(self._ledger.probe), now)
        elif parts := self._next_batch():
            self._job = Settling(parts, self._submit(self._settle, parts), now)

    def _submit(self, do: Callable[..., T], *arguments: Any) -> Future[T]:
        future = self._ledger_thread.submit(do, *arguments)
        future.add_done_callback(lambda _: self.wakeup.send())
        return future

    def _finish_job(self) -> None:
        """Take in the result of a job that is done. An exception that is none of the ledger's answers is raised: Celery
        ends the process, and its messages are restored after the visibility timeout.
        """
        job = self._job
        if isinstance(job, Idle) or not job.future.done():
            return
        self._job = Idle()
        match job:
            case Settling():
                self._finish_batch(job)
            case Polling():
                self._put_first(self._parking.take_polled(job.poll, job.future.result()))
            case Probing():
                job.future.result()
                self._probed = monotonic()

    def _finish_batch(self, job: Settling) -> None:
        try:
            outcomes = iter(job.future.result())
        except Interrupted:
            self._put_first(job.parts)
            return
        except SuspiciousBatch as error:
            self._put_first(job.parts)
            self._suspend(error)
            return
        accrued: list[str] = []
        for part in job.parts:
            self._take_outcomes(part, outcomes, accrued)
            message = part.message
            message.letters.clear()  # they are written
            if message.complete:
                self._release(message)
                self._finished.append((message, monotonic() - job.started))
            else:
                self._undo_solo_attempts(message)  # the worker survived, and the accrual may come after the culprit
        self._parking.report_locked()
        for user_id in accrued:
            self._put_first(self._parking.take_burns_of(user_id))

    def _take_outcomes(self, part: Part, outcomes: Iterator[Outcome], accrued: list[str]) -> None:
        """Note the outcomes of a part's deliveries, or park them; `accrued` gets the accounts with new accruals."""
        for delivery in part.deliveries:
            outcome = next(outcomes)
            if isinstance(outcome, Locked):
                self._parking.park_for_lock(part.message, delivery)
            elif isinstance(outcome, Undecided):
                self._parking.park_for_balance(part, delivery)
            else:
                part.message.outcomes[delivery.origin.event_index or 0] = outcome
                if isinstance(outcome, Applied) and not outcome.repeated and delivery.event.type == "accrual":
                    accrued.append(delivery.event.user_id)

    def _ledger_waits(self) -> bool:
        """Whether the job takes so long that the ledger must wait for a lock or a server. Then the worker fetches
        little, if anything.
        """
        if isinstance(self._job, Idle):
            return False
        rows = sum(part.rows for part in self._job.parts) if isinstance(self._job, Settling) else 0
        return monotonic() - self._job.started > SLOW_JOB_SECONDS + SLOW_ROW_SECONDS * rows

    def _suspend(self, error: SuspiciousBatch) -> None:
        self._suspended = True
        log.critical("worker suspended: it applies nothing until it is restarted", reason=str(error))
        self._update_pressure()
        self._requeue_all()

    # Messages leave

    def _acknowledge_finished(self) -> None:
        while self._finished:
            self._intake.finish(*self._finished.popleft())

    def _release(self, message: InFlight) -> None:
        """Stop counting a message's bytes. `attach` may do so twice, if parts of it outlive two connections."""
        if not message.released:
            message.released = True
            self._bytes -= message.size

    def _requeue_all(self) -> None:
        """Requeue everything undecided, in its order of arrival."""
        unread = [arrival for arrival in self._arrivals if not isinstance(arrival, Part)]
        overdue = [arrival for arrival in self._arrivals if isinstance(arrival, Part)]
        messages = {part.message: None for part in [*self._queue, *overdue, *self._parking.take_all()]}
        ordered = sorted(messages, key=lambda message: message.number)
        self._arrivals.clear()
        self._queue.clear()
        self._bytes = self._queued_rows = 0
        if not ordered and not unread:
            return
        log.info("requeueing undecided messages", messages=len(ordered) + len(unread))
        for message in ordered:
            self._intake.forget(message)
            self._undo_solo_attempts(message)
        self._broker.requeue([*(message.kombu_message for message in ordered), *unread])

    def _update_pressure(self) -> None:
        """Fetch no more than can be applied soon."""
        if self._degraded or self._suspended:
            self._set_pressure(Pressure.REQUEUE)
        elif self._arrivals or self._parking.full or self._bytes > MAX_BYTES:
            self._set_pressure(Pressure.NO_FETCH)
        else:
            self._set_pressure(Pressure.NONE)

    def _set_pressure(self, pressure: Pressure) -> None:
        if pressure is self._pressure:
            return
        self._pressure = pressure
        if pressure is Pressure.NONE:
            self._broker.resume()
        else:
            self._broker.pause(requeue_fetched=pressure is Pressure.REQUEUE)

    # In the ledger thread

    def _settle(self, parts: list[Part]) -> list[Outcome]:
        """The outcomes of all deliveries of the parts."""
        deliveries = [delivery for part in parts for delivery in part.deliveries]
        letters = [letter for part in parts for letter in part.message.letters]
        return self._ledger.settle(deliveries, letters, leave_locked=True)

    def _poll(self, poll: Poll) -> PollResult:
        burns = [part.deliveries[0] for part in poll.burns]
        answerable = self._ledger.answerable(burns) if burns else []
        return PollResult(
            [part for part, is_answerable in zip(poll.burns, answerable, strict=True) if is_answerable],
            self._ledger.unlocked(poll.locked) if poll.locked else set(),
        )

    def _on_degraded(self, problem: str | None) -> None:
        """The ledger waits for PostgreSQL because of the problem, or, with None, no longer does."""
        self._degraded = problem is not None
        self.wakeup.send()
