"""From a message to deliveries and dead letters: what the tasks `tokens.accrue`, `tokens.burn` and `tokens.apply_many`
are called with, and which messages cannot be applied.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from schema.canonical import DuplicateKeys, NotCanonical, read_json, write_json
from schema.events import InvalidEvent, parse_event
from schema.messages import (
    ACCRUE,
    APPLY_MANY,
    BURN,
    MAX_BODY_BYTES,
    MAX_EVENTS,
    TYPES,
    UNDECODABLE_REASON_HEADER,
    UNDECODABLE_TASK,
)
from schema.reasons import DeadLetterReason
from schema.text import ascii_line, is_storable, quote
from worker.ledger.dead_letters import MAX_TOKENS, NewDeadLetter
from worker.ledger.deliveries import Delivery, IfShort, Origin

TASKS: Final = frozenset({ACCRUE, BURN, APPLY_MANY})

#: Workers that died while a message was the only one they had in flight, after which it is held to be the cause.
POISON_SOLO_DEATHS: Final = 5

#: Characters of a user id or an idempotency key that a dead letter is found by.
MAX_KEY_LENGTH: Final = 200

_CONTENT_TYPES: Final = frozenset({"application/json"})
_CONTENT_ENCODINGS: Final = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})


class UnreadableError(Exception):
    """A message cannot be read as a call of one of the tasks: `reason` is the dead letter's, `detail` its sentence."""

    def __init__(self, reason: DeadLetterReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


class Refusal(NamedTuple):
    """Why a message that can be read must not be applied."""

    reason: DeadLetterReason
    detail: str


class Parsed(NamedTuple):
    """The events of a message: those to apply, and dead letters for the others.

    The place of each among the message's outcomes is `origin.event_index`, which a single event does not have.
    """

    deliveries: list[Delivery]
    letters: list[NewDeadLetter]


# Before the body is read


def check_readable(
    headers: Mapping[str, Any], *, content_type: object, content_encoding: object, size: int, solo_deaths: int
) -> None:
    """Raise UnreadableError for a message whose headers or size (in bytes) say that it is no call of our tasks."""
    task = headers.get("task")
    if task == UNDECODABLE_TASK:
        reason = headers.get(UNDECODABLE_REASON_HEADER)  # anybody can send a message with this task
        reason = ascii_line(reason, 400) if isinstance(reason, str) else "no reason is given"
        raise UnreadableError("undecodable", f"The message cannot be read: {reason}.")
    if size > MAX_BODY_BYTES:
        raise _oversized(size)
    if solo_deaths >= POISON_SOLO_DEATHS:
        raise UnreadableError("poison", f"{solo_deaths} workers died while this was their only message in flight.")
    if not isinstance(task, str) or task not in TASKS:
        raise UnreadableError("unknown_task", f"There is no task {quote(task)} here: {', '.join(sorted(TASKS))}.")
    if headers.get("compression"):
        raise UnreadableError(
            "undecodable", f"The body is compressed ({quote(headers['compression'])}); send it plain."
        )
    if content_type not in _CONTENT_TYPES:
        raise UnreadableError(
            "undecodable", f"The content type is {quote(content_type)}; only application/json is read."
        )
    if not isinstance(content_encoding, str) or content_encoding.lower() not in _CONTENT_ENCODINGS:
        raise UnreadableError("undecodable", f"The content encoding is {quote(content_encoding)}; only utf-8 is read.")


def refusal_of(headers: Mapping[str, Any], revoked: Container[str]) -> Refusal | None:
    """Why a message that can be read must not be applied, None if it may be. `revoked` holds ids of tasks."""
    task_id, expires, eta = headers.get("id"), headers.get("expires"), headers.get("eta")
    if isinstance(task_id, str | UUID) and str(task_id) in revoked:  # a list has no hash
        return Refusal("revoked", "The task was revoked before it was applied.")
    if expires is not None:
        try:
            moment = datetime.fromisoformat(expires)
        except (TypeError, ValueError):
            return Refusal("expired", f"expires is {quote(expires)}, which is no date and time; do not set it.")
        if moment.replace(tzinfo=moment.tzinfo or UTC) < datetime.now(UTC):
            return Refusal(
                "expired", f"The message expired at {quote(expires)}, before it was applied; do not set expires."
            )
    if eta is not None:
        return Refusal("scheduled", f"The message has an eta ({quote(eta)}); send it when it is due instead.")
    return None


# The body


def read_body(body: bytes) -> Any:
    """The JSON of a body, numbers exact. Raises UnreadableError."""
    if len(body) > MAX_BODY_BYTES:
        raise _oversized(len(body))
    try:
        return read_json(body)
    except (ValueError, RecursionError) as error:
        raise UnreadableError("undecodable", f"The body is not JSON: {str(error)[:300]}.") from None


def parse_call(
    task: str,
    args: object,
    kwargs: object,
    origin: Origin,
    *,
    max_amount: int,
    if_short: IfShort = IfShort.REJECT,
    refusal: Refusal | None = None,
) -> Parsed:
    """The events of a call of one of the tasks; all deliveries get `if_short` and `refusal`.

    Raises UnreadableError when the call as a whole has other arguments than the task.
    """
    if args not in ([], (), None):
        raise UnreadableError("invalid_arguments", f"{task} takes keyword arguments only, the event's fields.")
    if not isinstance(kwargs, Mapping):
        raise UnreadableError("invalid_arguments", f"{task} takes keyword arguments as a JSON object.")
    if isinstance(kwargs, DuplicateKeys):
        raise UnreadableError("invalid_arguments", f"The keyword argument {quote(kwargs.name)} is given twice.")
    if task != APPLY_MANY:
        events = [(kwargs, origin)]
    elif (
        kwargs.keys() == {"events"} and isinstance(kwargs["events"], list) and 1 <= len(kwargs["events"]) <= MAX_EVENTS
    ):
        events = [(data, origin.at(index)) for index, data in enumerate(kwargs["events"])]
    else:
        raise UnreadableError(
            "invalid_arguments", f"{APPLY_MANY} takes events and nothing else: a list of 1 to {MAX_EVENTS}."
        )
    parsed = Parsed([], [])
    type_ = TYPES.get(task)
    for data, origin_of_event in events:
        try:
            event = parse_event(data, type_=type_, max_amount=max_amount)
        except InvalidEvent as error:
            parsed.letters.append(letter_for(data, "invalid_event", str(error), origin_of_event, type_=type_))
        else:
            delivery = Delivery.of(event, origin_of_event, if_short=if_short)
            parsed.deliveries.append(delivery if refusal is None else delivery._replace(refusal=refusal))
    return parsed


def letter_for(
    data: object, reason: DeadLetterReason, detail: str, origin: Origin, *, type_: str | None = None
) -> NewDeadLetter:
    """The dead letter of an event that is not applied, with its user and key where the data has them.

    `type_` is the event type that the task stands for. The dead letter stores it with the event, which can then be
    replayed without its message.
    """
    try:
        return NewDeadLetter.of_event(reason, detail, parse_event(data, type_=type_, max_amount=MAX_TOKENS), origin)
    except InvalidEvent:
        fields: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
    if type_ is not None and isinstance(data, Mapping) and "type" not in data and not isinstance(data, DuplicateKeys):
        data = {**data, "type": type_}
    return NewDeadLetter(
        reason,
        detail,
        origin,
        user_id=_key(fields.get("user_id")),
        idempotency_key=_key(fields.get("idempotency_key")),
        event=_json(data),
    )


def _oversized(size: int) -> UnreadableError:
    return UnreadableError("oversized", f"The message is {size} bytes long: at most {MAX_BODY_BYTES} are read.")


def _key(value: object) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= MAX_KEY_LENGTH and is_storable(value) else None


def _json(data: object) -> str | None:
    if data is None:
        return None
    try:
        return write_json(data)
    except (NotCanonical, RecursionError):
        return None  # the dead letter stores the body instead
