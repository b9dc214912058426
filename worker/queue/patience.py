"""Events that cannot be decided yet, and wait in the worker until they can.

A burn that met too small a balance may be ahead of its accrual: it waits for a bounded time, its patience. It is
decided again when its account accrues in this worker, and whenever its account is seen to hold enough; when its
patience is over it is decided for good, behind everything that this worker had fetched by then. Patience passes while
the worker takes messages: an accrual that it could not have fetched or applied is not late.

An event whose account somebody else keeps locked waits for as long as that lasts, and with it all later ones of the
account, while all other accounts' go on.

What waits stays unacknowledged, so that whatever kills the worker brings it back, and nothing is written about it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from time import monotonic
from typing import Final, Generic, Protocol, TypeVar

#: At most so many events wait of either kind; then the worker takes no more messages until some are decided.
MOST_WAITING: Final = 10_000

#: Seconds between two looks at what waiting burns' accounts hold.
LOOK_EVERY: Final = 0.25


class Waiting(Protocol):
    """What can wait: one event of one message."""

    deadline: float | None  # of time.monotonic(); None before its first insufficient answer
    grace: float  # seconds beyond its patience

    @property
    def user_id(self) -> str:
        """Whose account it waits for."""


T = TypeVar("T", bound=Waiting)


class WaitingRoom(Generic[T]):
    """What waits, oldest first within each account."""

    def __init__(self) -> None:
        self._of_user: dict[str, list[T]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        for waiting in self._of_user.values():
            yield from waiting

    @property
    def users(self) -> Collection[str]:
        """The accounts of all that wait."""
        return self._of_user.keys()

    @property
    def full(self) -> bool:
        """Whether no more should be fetched."""
        return self._count >= MOST_WAITING

    def add(self, waiting: T) -> None:
        """Let it wait, behind all others of its account."""
        self._of_user.setdefault(waiting.user_id, []).append(waiting)
        self._count += 1

    def take(self, user_id: str) -> list[T]:
        """What no longer waits for the account."""
        taken = self._of_user.pop(user_id, [])
        self._count -= len(taken)
        return taken

    def take_these(self, chosen: Collection[T]) -> list[T]:
        """Those of the chosen that waited, which no longer do."""
        wanted = set(chosen)
        taken: list[T] = []
        for user_id in dict.fromkeys(each.user_id for each in chosen):
            for waiting in self.take(user_id):
                if waiting in wanted:
                    taken.append(waiting)
                else:
                    self.add(waiting)
        return taken

    def take_all(self) -> list[T]:
        """All, which no longer wait."""
        taken = list(self)
        self._of_user.clear()
        self._count = 0
        return taken


class Patience(WaitingRoom[T]):
    """The burns that wait for their accounts to hold enough, for so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def add(self, waiting: T) -> None:
        """Let a burn wait. Its patience starts with its first insufficient answer, however often it comes back."""
        if waiting.deadline is None:
            waiting.deadline = monotonic() + self._seconds + waiting.grace
        super().add(waiting)

    def begin_again(self) -> None:
        """The whole patience anew for all: until now nobody's accrual could have come."""
        deadline = monotonic() + self._seconds
        for burn in self:
            burn.deadline = deadline + burn.grace

    def take_overdue(self) -> list[T]:
        """The burns whose patience is over, which no longer wait."""
        now = monotonic()
        overdue: list[T] = []
        for user_id in list(self._of_user):
            burns = self.take(user_id)
            for burn in burns:
                if burn.deadline is not None and burn.deadline <= now:
                    overdue.append(burn)
                else:
                    self.add(burn)
        return overdue
