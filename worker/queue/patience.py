"""Burns that met too small a balance, and may be ahead of their accrual: they wait in the worker, for a bounded time.

A waiting burn stays unacknowledged, so that whatever kills the worker brings it back, and nothing is written about it.
It is decided again when its account accrues in this worker, and whenever its account is seen to hold enough; when its
patience is over it is decided for good, behind everything that this worker had fetched by then. Patience passes while
the worker takes messages: an accrual that it could not have fetched or applied is not late.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from typing import Final, Generic, Protocol, TypeVar

#: At most so many burns wait; then the worker takes no more messages until some are decided.
MOST_WAITING: Final = 10_000

#: Seconds between two looks at what waiting burns' accounts hold.
LOOK_EVERY: Final = 0.25


class Waiting(Protocol):
    """What can wait: one burn of one message."""

    deadline: float | None  # of time.monotonic(); None before its first insufficient answer

    @property
    def user_id(self) -> str:
        """Whose balance is too small."""


T = TypeVar("T", bound=Waiting)


class Patience(Generic[T]):
    """The waiting burns, oldest first within each account."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._of_user: dict[str, list[T]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        for burns in self._of_user.values():
            yield from burns

    @property
    def full(self) -> bool:
        """Whether no more burns should be fetched."""
        return self._count >= MOST_WAITING

    def add(self, burn: T) -> None:
        """Let a burn wait. Its patience starts with its first insufficient answer, however often it comes back."""
        if burn.deadline is None:
            burn.deadline = monotonic() + self._seconds
        self._of_user.setdefault(burn.user_id, []).append(burn)
        self._count += 1

    def begin_again(self) -> None:
        """The whole patience anew for all: until now nobody's accrual could have come."""
        deadline = monotonic() + self._seconds
        for burn in self:
            burn.deadline = deadline

    def take(self, user_id: str) -> list[T]:
        """The account's burns, which no longer wait."""
        burns = self._of_user.pop(user_id, [])
        self._count -= len(burns)
        return burns

    def take_all(self) -> list[T]:
        """All burns, which no longer wait."""
        burns = list(self)
        self._of_user.clear()
        self._count = 0
        return burns

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
