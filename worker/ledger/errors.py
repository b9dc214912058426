"""Whose fault an error is. Only what an event itself can cause is held against it; all else means "not now"."""

from __future__ import annotations

from typing import Final

#: data exception, integrity constraint violation
_EVENT_CLASSES: Final = ("22", "23")

#: statement too complex: what one value nested too deep does to the server's stack
_STATEMENT_TOO_COMPLEX: Final = "54001"

LOCK_NOT_AVAILABLE: Final = "55P03"

#: More events refused out of one batch than this looks like a bug of ours or of a producer's release.
MAX_CULPRITS: Final = 10


def caused_by_event(sqlstate: str | None) -> bool:
    """Whether PostgreSQL's answer is about the event's content, and so would be the same at every try."""
    return sqlstate is not None and (sqlstate[:2] in _EVENT_CLASSES or sqlstate == _STATEMENT_TOO_COMPLEX)


class Interrupted(Exception):
    """The worker is stopping: nothing of the batch is half-done, its undecided deliveries go back to the queue."""


class SuspiciousBatch(Exception):
    """More than MAX_CULPRITS events of one batch were refused by the database: a bug, not bad events."""

    def __init__(self, culprits: int, first: str) -> None:
        super().__init__(culprits, first)  # the arguments, so that it pickles
        self.culprits = culprits
        self.first = first

    def __str__(self) -> str:
        return (
            f"the database refused {self.culprits} events of one batch, which looks like a bug rather than bad events; "
            "this worker takes no more work until it is restarted, and nothing is lost. "
            f"The first refusal: {self.first}"
        )
