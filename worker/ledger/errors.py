"""Which errors are an event's own fault. All others are transient: "not now", to be tried again.

Knows exceptions by SQLSTATE and by the names of the DB-API, without a database driver.
"""

from __future__ import annotations

from typing import Final

#: SQLSTATE classes: data exception, integrity constraint violation.
_EVENT_CLASSES: Final = ("22", "23")

#: One value nested too deep for the server's stack.
_STATEMENT_TOO_COMPLEX: Final = "54001"

LOCK_NOT_AVAILABLE: Final = "55P03"

#: Classes of the DB-API that a driver raises by itself, without a SQLSTATE, for a value that it cannot send.
_NOT_SENDABLE: Final = {"DataError", "ProgrammingError", "NotSupportedError"}

#: Bugs that one event's content can trigger. Other errors of Python (memory, files) say nothing about an event.
_BUGS: Final = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)

#: If the database refuses more events of one batch than this, a bug or a faulty release of a producer is likely.
MAX_CULPRITS: Final = 10


def blames_event(error: Exception) -> bool:
    """Whether an error is about an event's content, so that every retry would end in the same error."""
    sqlstate: str | None = getattr(error, "sqlstate", None)
    if sqlstate is not None:
        return sqlstate[:2] in _EVENT_CLASSES or sqlstate == _STATEMENT_TOO_COMPLEX
    return isinstance(error, _BUGS) or any(base.__name__ in _NOT_SENDABLE for base in type(error).__mro__)


class Interrupted(Exception):
    """The worker is stopping: nothing is half-done, and the batch's undecided deliveries must be requeued."""


class SuspiciousBatch(Exception):
    """The database refused more than MAX_CULPRITS events of one batch: a bug, not bad events."""

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
