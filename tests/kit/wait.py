"""Waiting for what other processes and threads do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

#: Far more than anything takes that happens at all, on a machine that is busy with other work too.
PATIENCE = 60  # seconds

T = TypeVar("T")


def eventually(condition: Callable[[], T], what: str = "the condition holds", *, seconds: float = PATIENCE) -> T:
    """Return the first true value of `condition()`; fail when there is none within `seconds`."""
    deadline, pause = time.monotonic() + seconds, 0.005
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(pause)
        pause = min(1.3 * pause, 0.05)
    return value
