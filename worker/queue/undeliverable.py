"""Which messages become dead letters before anyone reads what they ask for: nothing may vanish."""

from __future__ import annotations

from collections.abc import Container, Mapping
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from schema.messages import MAX_BODY_BYTES, UNDECODABLE_REASON_HEADER, UNDECODABLE_TASK
from schema.text import ascii_line
from worker.queue.parsing import Refused, Unreadable

#: Deaths of a worker while it had a message in hand alone, after which the message is held to be the cause.
POISONED: Final = 5

_READ: Final = frozenset({"application/json"})
_ENCODINGS: Final = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})


def check(
    headers: Mapping[str, Any],
    *,
    content_type: object,
    content_encoding: object,
    size: int,
    known: Container[str],
    revoked: Container[str],
    deaths: int,
) -> None:
    """Raise Unreadable for a message that cannot be taken as a call of one of the `known` tasks.

    Raises Refused, at last, for one that could be, but must not be decided any more.
    """
    task = headers.get("task")
    if task == UNDECODABLE_TASK:
        raise Unreadable("undecodable", f"The message cannot be read: {_why(headers.get(UNDECODABLE_REASON_HEADER))}.")
    if size > MAX_BODY_BYTES:
        raise Unreadable("oversized", f"The message is {size} bytes long: at most {MAX_BODY_BYTES} are read.")
    if deaths >= POISONED:
        raise Unreadable("poison", f"{deaths} workers died while they had this message in hand and nothing else.")
    if not isinstance(task, str) or task not in known:
        raise Unreadable("unknown_task", f"There is no task {_shown(task)} here: {', '.join(sorted(known))}.")  # type: ignore[call-overload]
    if headers.get("compression"):
        raise Unreadable("undecodable", f"The body is compressed ({_shown(headers['compression'])}); send it plain.")
    if content_type not in _READ:
        raise Unreadable("undecodable", f"The content type is {_shown(content_type)}; only application/json is read.")
    if not isinstance(content_encoding, str) or content_encoding.lower() not in _ENCODINGS:
        raise Unreadable("undecodable", f"The content encoding is {_shown(content_encoding)}; only utf-8 is read.")
    identity = headers.get("id")
    if isinstance(identity, str | UUID) and str(identity) in revoked:  # a list, which has no hash, is no id
        raise Refused("revoked", "The task was revoked before it was decided.")
    _check_times(headers)


def _check_times(headers: Mapping[str, Any]) -> None:
    expires = headers.get("expires")
    if expires is not None:
        try:
            moment = datetime.fromisoformat(expires)
        except (TypeError, ValueError):
            raise Refused("expired", f"expires is {_shown(expires)}, which is no moment; do not set it.") from None
        if moment.replace(tzinfo=moment.tzinfo or UTC) < datetime.now(UTC):
            raise Refused(
                "expired", f"The message expired at {_shown(expires)}, before it was decided; do not set expires."
            )
    if (eta := headers.get("eta")) is not None:
        raise Refused("scheduled", f"The message has an eta ({_shown(eta)}); send it when it is due instead.")


def _why(reason: object) -> str:
    """What our transport says; anybody can send a message for the task that it uses."""
    return ascii_line(reason, 400) if isinstance(reason, str) else "no reason is given"


def _shown(value: object) -> str:
    """Anything a header can hold, as ASCII and short."""
    if isinstance(value, str):
        value = value[:80]
    try:
        text = ascii(value)
    except RecursionError:
        return f"a deep {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."  # noqa: PLR2004 - short
