"""Log lines by the words that docs/operating.md lists them by."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def logged(messages: Iterable[str], event: str) -> list[tuple[str, ...]]:
    """What stood where `event` has "…", of each message that says it."""
    pattern = re.escape(event).replace("…", "(.+)")
    return [found.groups() for message in messages if (found := re.fullmatch(pattern, message))]
