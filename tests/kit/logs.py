"""Log lines, by the text that docs/operating.md lists."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def logged(messages: Iterable[str], event: str) -> list[tuple[str, ...]]:
    """Of each message that matches `event`, the texts in place of its "…"."""
    pattern = re.escape(event).replace("…", "(.+)")
    return [match.groups() for message in messages if (match := re.fullmatch(pattern, message))]
