"""Events parked in this worker, either for a balance or for a row lock, and when to poll for them.

A burn that met an insufficient balance may be ahead of its accrual. It is parked for a bounded time, its patience. The
ledger applies it again when this worker applies an accrual of its account, or when a poll shows that the balance
suffices. When its patience is over, its last try comes behind everything that this worker had fetched by then.
Patience passes only while this worker could fetch and apply an accrual.

An event whose account another session keeps locked is parked for as long as that lasts, together with all later events
of the account; the events of all other accounts continue.

Parked messages stay unacknowledged, and nothing is written about them: whatever kills the worker, they are delivered
again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from time import monotonic
from typing import Final, NamedTuple

import structlog

from worker.config import Settings
from worker.ledger.deliveries import Delivery, IfShort
from worker.queue.broker import Broker
from worker.queue.in_flight import InFlight, Part

log = structlog.get_logger(__name__)

#: Events parked for either cause, beyond which the worker stops fetching.
MAX_PARKED: Final = 10_000

#: Seconds between two polls for balances in an idle worker, and between two ticks of the event loop: what a burn waits
#: at most once its accrual was applied elsewhere.
POLL_SECONDS: Final = 0.25

#: Seconds between two polls for row locks, and between two for balances in a worker that has batches to apply: a poll
#: for 10,000 burns takes a tenth of a second, so it takes at most a tenth of the ledger thread's time.
BUSY_POLL_SECONDS: Final = 1.0

#: Seconds between two ticks, of which there should be four in that time, after which patience starts again: this
#: process was frozen or had no connection, and could not have fetched an accrual.
MISSED_TICKS_SECONDS: Final = 1.0


class Poll(NamedTuple):
    """What the ledger is asked about parked events."""

    burns: list[Part]
    locked: list[str]  # user ids


class PollResult(NamedTuple):
    """Which parked events the ledger can decide now."""

    answerable: list[Part]
    unlocked: set[str]  # user ids


class _ByAccount:
    """Parked parts, oldest first within each account."""

    def __init__(self) -> None:
        self._by_user: dict[str, list[Part]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Part]:
        for parts in self._by_user.values():
            yield from parts

    @property
    def users(self) -> Collection[str]:
        return self._by_user.keys()

    def add(self, part: Part) -> None:
        self._by_user.setdefault(part.user_id, []).append(part)
        self._count += 1

    def take(self, user_id: str) -> list[Part]:
        parts = self._by_user.pop(user_id, [])
        self._count -= len(parts)
        return parts

    def take_these(self, parts: Iterable[Part]) -> list[Part]:
        """Those of the parts that are parked here, which they no longer are."""
        chosen = set(parts)
        taken: list[Part] = []
        for user_id in dict.fromkeys(part.user_id for part in parts):
            for part in self.take(user_id):
                if part in chosen:
                    taken.append(part)
                else:
                    self.add(part)
        return taken


class Parking:
    """The parked events of one worker. Each is a part of its own, even if its message has other events."""

    def __init__(self, settings: Settings, broker: Broker) -> None:
        self._broker = broker
        self._patience = settings.burn_patience  # seconds
        self._if_short = IfShort.WAIT if settings.burn_patience else IfShort.REJECT
        # Another worker that has the accrual may wait for row locks in the batch before it, and poll only then; and
        # again in the batch that applies it.
        self._contended_patience = self._patience + 2 * (BUSY_POLL_SECONDS + settings.lock_timeout)  # seconds
        self._burns = _ByAccount()
        self._locked = _ByAccount()
        self._reported_locked = False
        self._ticked = self._polled_balances = self._polled_locks = monotonic()

    @property
    def full(self) -> bool:
        """Whether the worker must stop fetching."""
        return len(self._burns) >= MAX_PARKED or len(self._locked) >= MAX_PARKED

    def park_for_balance(self, part: Part, delivery: Delivery) -> None:
        """Park a burn until its accrual comes. A burn that is all of `part` continues with the patience that is left;
        one whose last try met a contended batch starts with new, longer patience.
        """
        if delivery.if_short is not IfShort.WAIT:
            part = Part(part.message, [delivery._replace(if_short=IfShort.WAIT)], was_contended=True)
        elif len(part.deliveries) > 1:
            part = Part(part.message, [delivery])
        if part.deadline is None:
            part.deadline = monotonic() + self._patience_of(part)
        self._burns.add(part)
        self._broker.park(part.message.kombu_message)

    def park_for_lock(self, message: InFlight, delivery: Delivery) -> None:
        """Park an event until its account is unlocked. Its patience starts again after that, and is longer: no accrual
        could be applied meanwhile.
        """
        self._locked.add(Part(message, [delivery._replace(if_short=self._if_short)], was_contended=True))
        self._broker.park(message.kombu_message)

    def park_locked(self, part: Part) -> bool:
        """Park those events of a part whose accounts are known to be locked; whether anything is left to apply."""
        if not self._locked:
            return True
        unlocked: list[Delivery] = []
        for delivery in part.deliveries:
            if delivery.event.user_id in self._locked.users:
                self.park_for_lock(part.message, delivery)
            else:
                unlocked.append(delivery)
        part.deliveries = unlocked
        return part.rows > 0

    def take_overdue(self, *, ledger_waits: bool, elsewhere: Iterable[Part]) -> list[Part]:
        """The burns whose patience is over, for their last try. Called at every tick.

        Patience starts again, also for the parts `elsewhere` in this worker, while the ledger waits, or when ticks were
        missed: no accrual could have been fetched and applied until now.
        """
        now = monotonic()
        missed_ticks, self._ticked = now - self._ticked > MISSED_TICKS_SECONDS, now
        if missed_ticks or ledger_waits:
            for part in self._burns:
                part.deadline = now + self._patience_of(part)
            for part in elsewhere:
                part.deadline = None
        overdue = self._burns.take_these(
            [part for part in self._burns if part.deadline is not None and part.deadline <= now]
        )
        for part in overdue:
            part.give_last_try()
        return overdue

    def next_poll(self, *, idle: bool) -> Poll | None:
        """What to poll for, if it is time; `idle` is whether the ledger has nothing else to do."""
        now = monotonic()
        burns: list[Part] = []
        locked: list[str] = []
        if self._burns and now - self._polled_balances >= (POLL_SECONDS if idle else BUSY_POLL_SECONDS):
            burns = list(self._burns)
        if self._locked and now - self._polled_locks >= BUSY_POLL_SECONDS:
            locked = list(self._locked.users)
        return Poll(burns, locked) if burns or locked else None

    def take_polled(self, poll: Poll, result: PollResult) -> list[Part]:
        """The parts that the ledger can decide now, in the order to apply them in."""
        now = monotonic()  # after the poll: one that takes long must not be followed by the next at once
        if poll.locked:
            self._polled_locks = now
        if poll.burns:
            self._polled_balances = now
        unlocked = [
            part for user_id in poll.locked if user_id in result.unlocked for part in self._locked.take(user_id)
        ]
        self.report_locked()
        return unlocked + self._burns.take_these(result.answerable)

    def take_burns_of(self, user_id: str) -> list[Part]:
        """The parked burns of an account that has just accrued tokens."""
        return self._burns.take(user_id)

    def take_all(self) -> list[Part]:
        """All parts; none is parked any more."""
        parts = [*self._burns, *self._locked]
        self._burns, self._locked, self._reported_locked = _ByAccount(), _ByAccount(), False
        return parts

    def report_locked(self) -> None:
        """Log when accounts start being locked and when none is any more, however many polls are in between."""
        if self._reported_locked == bool(self._locked):
            return
        self._reported_locked = bool(self._locked)
        if self._reported_locked:
            log.warning(
                "accounts locked by another session: their events are parked, all others continue",
                accounts=len(self._locked.users),
                events=len(self._locked),
                user_id=next(iter(self._locked.users)),
            )
        else:
            log.info("no account is locked by another session any more")

    def _patience_of(self, part: Part) -> float:
        return self._contended_patience if part.was_contended else self._patience
