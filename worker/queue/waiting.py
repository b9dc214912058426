"""What of a worker's messages waits, for tokens or for a lock, and when to look whether it still must.

Between `batching.py`, which has events decided, and `patience.py`, whose rooms they wait in.
"""

from __future__ import annotations

from time import monotonic
from typing import Final, NamedTuple

import structlog

from worker.config import Settings
from worker.ledger.deliveries import Delivery, IfShort

from .intake import Item
from .patience import LOOK_EVERY, Patience, WaitingRoom

log = structlog.get_logger(__name__)

#: Seconds between two looks at whether accounts are still locked, and, while there are events to decide, between two
#: looks at what waiting burns' accounts hold: one look at ten thousand of them takes a tenth of a second.
LOOK_SELDOM: Final = 1.0

#: Seconds between two looks at patience after which this process must have been frozen, or without a connection.
ABSENT: Final = 1.0

#: Seconds that deciding an event may take: a batch that takes longer than its events, and ABSENT, waits for something.
SLOW: Final = 0.001


class Part:
    """What of one message goes into one batch: all of it, or one event that waited."""

    __slots__ = ("deadline", "deliveries", "grace", "item", "places")

    def __init__(self, item: Item, deliveries: list[Delivery], places: list[int], grace: float = 0.0) -> None:
        self.item = item
        self.deliveries = deliveries
        self.places = places
        self.deadline: float | None = None
        self.grace = grace

    @property
    def events(self) -> int:
        """How many rows it may become. A letter is a row like any other."""
        return len(self.deliveries) + len(self.item.work.letters)

    @property
    def user_id(self) -> str:
        """Whose account the one event waits for."""
        return self.deliveries[0].event.user_id

    def finally_(self) -> None:
        """No more patience: too small a balance is the answer now, unless somebody held the account until just now.
        That is asked once: an account that many are busy with is nearly always held.
        """
        if_short = IfShort.REJECT if self.grace else IfShort.REJECT_UNLESS_CONTENDED
        self.deliveries = [delivery._replace(if_short=if_short) for delivery in self.deliveries]


class Look(NamedTuple):
    """What the ledger is asked about those that wait; nothing, when it is asked whether it is there again."""

    burns: list[Part]
    locked: list[str]


class Seen(NamedTuple):
    """What need wait no longer."""

    covered: list[Part]  # burns for which there is an answer now
    unlocked: set[str]


class Waiting:
    """The events of one worker that wait. Each is a part of its own, even if it came with others."""

    def __init__(self, settings: Settings) -> None:
        self._final_at_once = settings.burn_patience == 0
        # Another worker that has the accrual may be in the middle of a batch, and look later than we.
        self._grace = 2 * (LOOK_SELDOM + settings.lock_timeout)
        self._patience: Patience[Part] = Patience(settings.burn_patience)
        self._locked: WaitingRoom[Part] = WaitingRoom()
        self._said_locked = False
        self._ticked = self._looked = self._looked_at_locked = monotonic()

    @property
    def full(self) -> bool:
        """Whether no more should be fetched."""
        return self._patience.full or self._locked.full

    # Who waits

    def for_tokens(self, item: Item, delivery: Delivery, place: int, part: Part) -> None:
        """Let a burn wait for its accrual. It came in `part`, whose patience it goes on with if it was alone there."""
        if delivery.if_short is not IfShort.WAIT:  # its batch was contended, and so may its accrual have been
            part = Part(item, [delivery._replace(if_short=IfShort.WAIT)], [place], self._grace)
        elif len(part.places) > 1:
            part = Part(item, [delivery], [place])
        self._patience.add(part)
        _set_aside(item)

    def for_lock(self, item: Item, delivery: Delivery, place: int) -> None:
        """Let an event wait for its account to be unlocked. Patience, if any was spent, begins anew after that, as no
        accrual could come before, and lasts longer.
        """
        reject = self._final_at_once and delivery.if_short is not IfShort.WAIT
        if_short = IfShort.REJECT if reject else IfShort.WAIT
        self._locked.add(Part(item, [delivery._replace(if_short=if_short)], [place], self._grace))
        _set_aside(item)

    def keep_locked(self, part: Part) -> bool:
        """Let wait what of a part concerns accounts that are known to be locked; whether anything is left of it."""
        if not self._locked:
            return True
        kept: list[tuple[Delivery, int]] = []
        for delivery, place in zip(part.deliveries, part.places, strict=True):
            if delivery.event.user_id in self._locked.users:
                self.for_lock(part.item, delivery, place)
            else:
                kept.append((delivery, place))
        part.deliveries = [delivery for delivery, _ in kept]
        part.places = [place for _, place in kept]
        return part.events > 0

    # Who need not any more

    def overdue(self, *, stalled: bool, elsewhere: list[Part]) -> list[Part]:
        """The burns whose patience is over, to be decided for good behind all that was fetched by now.

        Patience begins anew, for burns `elsewhere` too, while the ledger is `stalled`, or when this was last asked long
        ago: until now no accrual could have been fetched.
        """
        now = monotonic()
        absent, self._ticked = now - self._ticked > ABSENT, now
        if absent or stalled:
            self._patience.begin_again()
            for part in elsewhere:
                part.deadline = None
        overdue = self._patience.take_overdue()
        for part in overdue:
            part.finally_()
        return overdue

    def look(self, *, idle: bool, anyway: bool) -> Look | None:
        """What to look at, if it is time for that: a turn of the ledger of its own, for a batch may have to wait.

        `idle`: whether the ledger has nothing else to do; `anyway`: look even if nothing waits.
        """
        now = monotonic()
        burns: list[Part] = []
        locked: list[str] = []
        if self._patience and now - self._looked >= (LOOK_EVERY if idle else LOOK_SELDOM):
            burns = list(self._patience)
        if self._locked and now - self._looked_at_locked >= LOOK_SELDOM:
            locked = list(self._locked.users)
        if burns or locked:
            return Look(burns, locked)
        if anyway and now - self._looked >= LOOK_SELDOM:
            return Look([], [])
        return None

    def seen(self, look: Look, seen: Seen) -> list[Part]:
        """Those that need wait no longer, in the order to decide them in."""
        now = monotonic()  # a look that takes long must not be followed by the next at once
        if look.locked:
            self._looked_at_locked = now
        if look.burns or not look.locked:
            self._looked = now
        free = [part for user_id in look.locked if user_id in seen.unlocked for part in self._locked.take(user_id)]
        self.say_what_is_locked()
        return free + self._patience.take_these(seen.covered)

    def accrued(self, user_id: str) -> list[Part]:
        """The burns that waited for tokens of the account."""
        return self._patience.take(user_id)

    def take_all(self) -> list[Part]:
        """All, which no longer wait, and of which nothing more is said."""
        self._said_locked = False
        return [*self._patience.take_all(), *self._locked.take_all()]

    def say_what_is_locked(self) -> None:
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


def _set_aside(item: Item) -> None:
    """What waits does not count against prefetch: a thousand burns must not keep their accruals out."""
    if park := getattr(item.message.channel.qos, "park", None):
        park(item.message.delivery_tag)
