"""Dead letters back into the queue: each event of a dead letter becomes a new message, which the ledger applies once.

Publishing an event twice is harmless, losing one is not. So a dead letter counts as replayed only once its events are
published, and both happen while its row is locked: a replay that is killed in between leaves the dead letter open, and
a worker that cannot apply the replayed event waits for the lock before it opens the dead letter again.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid5

from psycopg import Connection, Cursor
from psycopg.errors import DeadlockDetected, LockNotAvailable

from schema.canonical import read_json
from schema.events import Event, InvalidEvent, parse_event
from schema.messages import APPLY_MANY, REPLAY_HEADER, TYPES
from schema.publisher import Publisher, PublishError
from worker.ledger import dead_letters
from worker.ledger.dead_letters import DeadLetter, NewDeadLetter, StoredMessage
from worker.ledger.deliveries import Origin
from worker.queue.parsing import UnreadableError, parse_call, read_body

#: Dead letters, and events, in one transaction: what an interrupted replay publishes again.
MAX_LETTERS: Final = 200
MAX_EVENTS: Final = 2_000

#: Attempts at a transaction whose rows a worker has locked.
MAX_ATTEMPTS: Final = 5

_NAMESPACE: Final = UUID("0d6f1a54-6d0c-4f5e-9d0b-5f1c6b1f8f1d")


class ReplayError(Exception):
    """A dead letter cannot be replayed; the text says why and what to do, to be shown behind its number."""


@dataclass(slots=True)
class Report:
    """What a replay has done."""

    letters: int = 0
    events: int = 0
    refused: dict[int, str] = field(default_factory=dict)  # number → why not


def replay(
    connection: Connection[Any],
    publisher: Publisher,
    numbers: Iterable[int],
    *,
    states: frozenset[str],
    by: str,
    max_amount: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Report:
    """Publish the events of the dead letters with these numbers whose state is one of `states`; after each transaction
    `advance` gets how many dead letters it took.

    Raises PublishError when Redis fails. Dead letters of earlier transactions are replayed, the others are untouched,
    and replaying all of them again is safe.
    """
    remaining, report = deque(numbers), Report()
    while remaining:
        chunk = [remaining.popleft() for _ in range(min(MAX_LETTERS, len(remaining)))]
        try:
            done = _retry(partial(_replay_chunk, connection, publisher, chunk, states, by, max_amount))
        except PublishError as error:
            raise PublishError(
                f"{error} {report.letters:,} letters were replayed before that; replaying again is safe.",
                error.events,
                report.events,
            ) from error
        report.letters += done.letters
        report.events += done.events
        report.refused |= done.refused
        handled = done.letters + len(done.refused)
        remaining.extendleft(reversed(chunk[handled:]))
        advance(handled)
    return report


def refusal(letter: DeadLetter, message: StoredMessage, max_amount: int) -> str | None:
    """Why an open dead letter could not be replayed now; None if it could."""
    try:
        _read_events(letter, message, max_amount)
    except ReplayError as error:
        return str(error)
    return None


def _replay_chunk(
    connection: Connection[Any],
    publisher: Publisher,
    numbers: list[int],
    states: frozenset[str],
    by: str,
    max_amount: int,
) -> Report:
    """Replay the first of these dead letters in one transaction, until it has MAX_EVENTS."""
    report = Report()
    messages: list[tuple[Event, str, Mapping[str, str | int]]] = []
    new_letters: list[NewDeadLetter] = []
    replayed: list[int] = []
    with connection.transaction(), connection.cursor() as cursor:
        locked = {letter.id: (letter, event) for letter, event in dead_letters.lock(cursor, numbers)}
        for number in numbers:
            if len(messages) >= MAX_EVENTS:
                break
            try:
                letter, stored_event = _check_state(locked.get(number), states)
                message = _stored_message(cursor, letter, stored_event)
                events, invalid = _read_events(letter, message, max_amount)
            except ReplayError as error:
                report.refused[number] = str(error)
                continue
            messages.extend((event, _message_id(letter, index), {REPLAY_HEADER: number}) for event, index in events)
            new_letters.extend(invalid)
            replayed.append(number)
        if replayed:
            publisher.publish_named(messages)
            dead_letters.write(cursor, new_letters)
            dead_letters.mark_replayed(cursor, replayed, by)
    report.letters, report.events = len(replayed), len(messages)
    return report


def _check_state(locked: tuple[DeadLetter, str | None] | None, states: frozenset[str]) -> tuple[DeadLetter, str | None]:
    if locked is None:
        raise ReplayError("there is no such dead letter.")
    letter = locked[0]
    if letter.state not in states:
        when = f"{letter.state_changed_at:%Y-%m-%d %H:%M:%S}" if letter.state_changed_at else "an unknown date"
        text = f"it was {letter.state} by {letter.state_changed_by} on {when}"
        again = "; to publish its events once more, add --again" if letter.state == "replayed" else ""
        raise ReplayError(f"{text}{again}.")
    return locked


def _stored_message(cursor: Cursor[Any], letter: DeadLetter, event: str | None) -> StoredMessage:
    """The message of a dead letter, without its body where its event suffices."""
    if event is not None and not _is_bulk(letter):
        return StoredMessage(event, None, None)
    return dead_letters.read_message(cursor, letter.id)


def _read_events(
    letter: DeadLetter, message: StoredMessage, max_amount: int
) -> tuple[list[tuple[Event, int | None]], list[NewDeadLetter]]:
    """The events to publish, each with its place in a bulk message, and new dead letters for the invalid events of a
    bulk message. Raises ReplayError.
    """
    if letter.reason == "conflict":
        raise ReplayError("its key stands for another event, now and for ever: discard it, and send a new key.")
    if _is_bulk(letter):
        return _read_bulk(letter, message, max_amount)
    if message.event is not None:
        data = read_json(message.event)
    elif letter.event_index is None:
        data = _arguments(letter, message)
    else:
        raise ReplayError("its event is not JSON that can be stored; the message it came in holds it: discard it.")
    try:
        event = parse_event(data, type_=TYPES.get(letter.task or ""), max_amount=max_amount)
    except InvalidEvent as error:
        raise ReplayError(f"it holds no valid event: {error} Discard it.") from None
    return [(event, None)], []


def _read_bulk(
    letter: DeadLetter, message: StoredMessage, max_amount: int
) -> tuple[list[tuple[Event, int | None]], list[NewDeadLetter]]:
    """The events of a bulk message that was refused as a whole."""
    kwargs = read_json(message.event) if message.event is not None else _arguments(letter, message)
    headers = message.headers if isinstance(message.headers, dict) else None
    origin = Origin(letter.task, letter.message_id, message.body or b"", headers)
    try:
        parsed = parse_call(APPLY_MANY, (), kwargs, origin, max_amount=max_amount)
    except UnreadableError as error:
        raise ReplayError(f"it holds no events: {error} Discard it.") from None
    if not parsed.deliveries:
        raise ReplayError(f"none of its events is valid, the first: {parsed.letters[0].detail} Discard it.")
    return [(delivery.event, delivery.origin.event_index) for delivery in parsed.deliveries], parsed.letters


def _arguments(letter: DeadLetter, message: StoredMessage) -> object:
    """The keyword arguments in the original body."""
    if message.body is None:
        when = "never kept" if letter.purged_at is None else f"purged on {letter.purged_at:%Y-%m-%d}"
        raise ReplayError(f"its body was {when}: discard it.")
    try:
        call = read_body(message.body)
    except UnreadableError as error:
        raise ReplayError(f"it cannot be read: {error} Discard it.") from None
    if isinstance(call, dict):  # Celery's protocol 1
        return call.get("kwargs")
    return call[1] if isinstance(call, list) and len(call) > 1 else None


def _is_bulk(letter: DeadLetter) -> bool:
    return letter.task == APPLY_MANY and letter.event_index is None


def _message_id(letter: DeadLetter, event_index: int | None) -> str:
    """The same at every replay, so that however many replays fail, they are one dead letter."""
    return str(uuid5(_NAMESPACE, f"{letter.fingerprint.hex()}:{event_index}"))


def _retry(do: Callable[[], Report]) -> Report:
    for attempt in range(1, MAX_ATTEMPTS):
        with contextlib.suppress(DeadlockDetected, LockNotAvailable):
            return do()
        time.sleep(0.1 * attempt)
    return do()
