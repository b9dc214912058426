"""From a message to deliveries: `tokens.accrue`, `tokens.burn` and `tokens.apply_many`.

The tasks are registered with Celery, so that `inspect` and Flower know them; what runs is `batching.py`, which reads
messages here and decides many of them in one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from schema.canonical import DuplicateKeys, NotCanonical, read_json, write_json
from schema.events import MAX_EVENTS, InvalidEvent, parse_event
from schema.messages import APPLY_MANY, MAX_BODY_BYTES, TYPES
from schema.reasons import DeadLetterReason
from worker.ledger.dead_letters import MAX_TOKENS, NewDeadLetter
from worker.ledger.deliveries import Delivery, IfShort, Origin
from worker.ledger.outcomes import Applied, DeadLettered, Outcome, Rejected

#: Longest text of a user id or key that a dead letter is filed under.
_LONGEST_KEY: Final = 200


class Unreadable(Exception):
    """A message cannot be taken as what its task's name says: `reason` is a dead letter's, the text its sentence."""

    def __init__(self, reason: DeadLetterReason, sentence: str) -> None:
        super().__init__(reason, sentence)
        self.reason = reason
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class Refused(Unreadable):
    """A call can be read, but must not be decided any more: what it asks for is kept, unless it was decided before."""


@dataclass(slots=True)
class Work:
    """What one message asks for: deliveries to decide and letters to keep, with the places of their outcomes."""

    bulk: bool
    deliveries: list[Delivery] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # of each delivery, among the outcomes
    letters: list[NewDeadLetter] = field(default_factory=list)
    outcomes: list[Outcome | None] = field(default_factory=list)

    def refuse(self, letter: NewDeadLetter) -> None:
        """The next event has no outcome but a dead letter."""
        self.letters.append(letter)
        self.outcomes.append(DeadLettered(letter.reason, letter.detail))

    def refuse_all(self, refused: Refused) -> None:
        """No event is decided now: each gets its earlier outcome, or a dead letter."""
        refusal = (refused.reason, refused.sentence)
        self.deliveries = [delivery._replace(refusal=refusal) for delivery in self.deliveries]

    def deliver(self, delivery: Delivery) -> None:
        """The next event is to be decided."""
        self.deliveries.append(delivery)
        self.places.append(len(self.outcomes))
        self.outcomes.append(None)

    def summary(self) -> tuple[bool, str]:
        """Whether anything was decided, and the result as Flower shows it."""
        if not self.bulk:
            outcome = self.outcomes[0]
            return not isinstance(outcome, DeadLettered), str(outcome)
        counts = {
            "applied": sum(isinstance(outcome, Applied) for outcome in self.outcomes),
            "rejected": sum(isinstance(outcome, Rejected) for outcome in self.outcomes),
            "dead-lettered": sum(isinstance(outcome, DeadLettered) for outcome in self.outcomes),
        }
        text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        if counts["dead-lettered"] < len(self.outcomes):
            return True, text
        return False, f"{text}, the first: {self.outcomes[0]}"


def read_call(body: bytes) -> Any:
    """The JSON of a body, numbers exact. Raises Unreadable."""
    if len(body) > MAX_BODY_BYTES:
        raise Unreadable("oversized", f"The message is {len(body)} bytes long: at most {MAX_BODY_BYTES} are read.")
    try:
        return read_json(body)
    except (ValueError, RecursionError) as error:
        raise Unreadable("undecodable", f"The body is not JSON: {str(error)[:300]}.") from None


def read_work(
    task: str, args: object, kwargs: object, origin: Origin, *, max_amount: int, if_short: IfShort = IfShort.REJECT
) -> Work:
    """What a call of one of our tasks asks for; `if_short` goes to its deliveries.

    Raises Unreadable when the call as a whole has other arguments than the task.
    """
    if args not in ([], (), None):
        raise Unreadable("invalid_arguments", f"{task} takes keyword arguments only, the event's fields.")
    if not isinstance(kwargs, Mapping):
        raise Unreadable("invalid_arguments", f"{task} takes keyword arguments as a JSON object.")
    if isinstance(kwargs, DuplicateKeys):
        raise Unreadable("invalid_arguments", f"The keyword argument {kwargs.name[:40]!a} stands twice.")
    if task == APPLY_MANY:
        return _read_many(kwargs, origin, max_amount, if_short=if_short)
    work = Work(bulk=False)
    _read_event(work, kwargs, TYPES[task], origin, max_amount, if_short=if_short)
    return work


def _read_many(kwargs: Mapping[str, Any], origin: Origin, max_amount: int, *, if_short: IfShort) -> Work:
    events = kwargs.get("events")
    if kwargs.keys() != {"events"} or not isinstance(events, list) or not 1 <= len(events) <= MAX_EVENTS:
        raise Unreadable(
            "invalid_arguments", f"{APPLY_MANY} takes events and nothing else: a list of 1 to {MAX_EVENTS}."
        )
    work = Work(bulk=True)
    for index, data in enumerate(events):
        _read_event(work, data, None, origin.at(index), max_amount, if_short=if_short)
    return work


def _read_event(
    work: Work, data: object, type_: str | None, origin: Origin, max_amount: int, *, if_short: IfShort
) -> None:
    try:
        event = parse_event(data, type_=type_, max_amount=max_amount)
    except InvalidEvent as no:
        work.refuse(letter_of(data, "invalid_event", str(no), origin, type_=type_))
    else:
        work.deliver(Delivery.of(event, origin, if_short=if_short))


def letter_of(
    data: object, reason: DeadLetterReason, detail: str, origin: Origin, *, type_: str | None = None
) -> NewDeadLetter:
    """A letter for an event that is not decided, filed under user and key where they can be made out.

    `type_` is what the task's name says of the event; a letter keeps it in the event, so as to be replayed by itself.
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


def _key(value: object) -> str | None:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_KEY or "\x00" in value:
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value


def _json(data: object) -> str | None:
    if data is None:
        return None
    try:
        return write_json(data)
    except (NotCanonical, RecursionError):
        return None  # the letter's body has it
