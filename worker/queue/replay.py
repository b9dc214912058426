"""Dead letters back onto the queue: each event of a letter as a new message, which the ledger decides once.

Publishing an event twice is harmless, losing one is not. So a letter counts as replayed only once its events are
published, and both happen under the lock of its row: whoever is killed in between leaves it open, and a worker that
cannot apply the replay either waits for the lock and then opens the row again.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID, uuid5

from psycopg import Connection, Cursor
from psycopg.errors import DeadlockDetected, LockNotAvailable

from schema.canonical import read_json
from schema.events import Event, InvalidEvent, parse_event
from schema.messages import APPLY_MANY, REPLAY_HEADER, TYPES
from schema.publisher import Publisher, PublishError
from worker.ledger import dead_letters, letterbox
from worker.ledger.dead_letters import NewDeadLetter
from worker.ledger.deliveries import Origin
from worker.ledger.letterbox import DeadLetter, Message
from worker.queue.parsing import Unreadable, read_call, read_work

#: Letters, and events, in one transaction: what is published again when it is interrupted.
LETTERS_AT_ONCE: Final = 200
EVENTS_AT_ONCE: Final = 2_000

#: Tries to get at rows that a worker holds.
_TRIES: Final = 5

_NAMESPACE: Final = UUID("0d6f1a54-6d0c-4f5e-9d0b-5f1c6b1f8f1d")


class CannotReplay(Exception):
    """A letter has no event that could be applied; the message says why, and what to do."""


@dataclass(slots=True)
class Report:
    """What a replay has done."""

    letters: int = 0
    events: int = 0
    refused: dict[int, str] = field(default_factory=dict)  # number → why not


@dataclass(frozen=True, slots=True)
class _Opened:
    """What is in a letter: events to publish, and those of a bulk message that stay dead letters."""

    kept: DeadLetter
    events: list[tuple[Event, int | None]]  # with the place in a bulk message
    letters: list[NewDeadLetter]


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
    """Publish the events of the letters with these numbers that are in one of `states`; `advance` is told how many.

    Raises PublishError when Redis fails; the letters before that are replayed, those after it are untouched, and
    replaying all of them again is safe.
    """
    waiting, report = deque(numbers), Report()
    while waiting:
        chunk = [waiting.popleft() for _ in range(min(LETTERS_AT_ONCE, len(waiting)))]
        try:
            done = _patiently(lambda chunk=chunk: _replay_some(connection, publisher, chunk, states, by, max_amount))  # type: ignore[misc]
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
        waiting.extendleft(reversed(chunk[handled:]))
        advance(handled)
    return report


def _replay_some(
    connection: Connection[Any],
    publisher: Publisher,
    numbers: list[int],
    states: frozenset[str],
    by: str,
    max_amount: int,
) -> Report:
    """Replay the first of these letters, as many as one transaction should hold: each is counted in the report."""
    report = Report()
    with connection.transaction(), connection.cursor() as cursor:
        taken = {each[0].id: each for each in letterbox.take(cursor, numbers)}
        messages: list[tuple[Event, str, Mapping[str, str | int]]] = []
        left: list[NewDeadLetter] = []
        replayed: list[int] = []
        for number in numbers:
            if len(messages) >= EVENTS_AT_ONCE:
                break
            try:
                opened = _open(cursor, taken.get(number), states, max_amount)
            except CannotReplay as no:
                report.refused[number] = str(no)
                continue
            messages.extend(
                (event, _message_id(opened.kept, place), {REPLAY_HEADER: number}) for event, place in opened.events
            )
            left.extend(opened.letters)
            replayed.append(number)
        if replayed:
            publisher.publish_named(messages)
            dead_letters.keep(cursor, left)
            letterbox.mark_replayed(cursor, replayed, by)
    report.letters, report.events = len(replayed), len(messages)
    return report


def refusal(kept: DeadLetter, message: Message, max_amount: int) -> str | None:
    """Why a letter that is open could not be replayed now; None if it could."""
    try:
        _read(kept, message, max_amount)
    except CannotReplay as no:
        return str(no)
    return None


def _open(
    cursor: Cursor[Any], taken: tuple[DeadLetter, str | None] | None, states: frozenset[str], max_amount: int
) -> _Opened:
    if taken is None:
        raise CannotReplay("there is no such dead letter.")
    kept, event = taken
    if kept.state not in states:
        raise CannotReplay(_closed(kept))
    alone = event is not None and not _is_bulk(kept)
    return _read(kept, Message(event, None, None) if alone else letterbox.message(cursor, kept.id), max_amount)


def _read(kept: DeadLetter, message: Message, max_amount: int) -> _Opened:
    """What is in the letter. Raises CannotReplay."""
    if kept.reason == "conflict":
        raise CannotReplay("its key stands for another event, now and for ever: discard it, and send a new key.")
    if _is_bulk(kept):
        return _read_bulk(kept, message, max_amount)
    if message.event is not None:
        data = read_json(message.event)
    elif kept.event_index is None:
        data = _arguments(kept, message)
    else:
        raise CannotReplay("its event is not JSON that can be stored; the message it came in holds it: discard it.")
    try:
        event = parse_event(data, type_=TYPES.get(kept.task or ""), max_amount=max_amount)
    except InvalidEvent as no:
        raise CannotReplay(f"it holds no valid event: {no} Discard it.") from None
    return _Opened(kept, [(event, None)], [])


def _read_bulk(kept: DeadLetter, message: Message, max_amount: int) -> _Opened:
    """The events of a bulk message that was refused whole; those of them that are invalid get a letter each."""
    kwargs = read_json(message.event) if message.event is not None else _arguments(kept, message)
    headers = message.headers if isinstance(message.headers, dict) else None
    origin = Origin(kept.task, kept.message_id, message.body or b"", headers)
    try:
        work = read_work(APPLY_MANY, (), kwargs, origin, max_amount=max_amount)
    except Unreadable as no:
        raise CannotReplay(f"it holds no events: {no} Discard it.") from None
    if not work.deliveries:
        raise CannotReplay(f"none of its events is valid, the first: {work.letters[0].detail} Discard it.")
    return _Opened(kept, [(each.event, each.origin.event_index) for each in work.deliveries], work.letters)


def _arguments(kept: DeadLetter, message: Message) -> object:
    """The keyword arguments in the original bytes."""
    if message.body is None:
        when = "never kept" if kept.purged_at is None else f"purged on {kept.purged_at:%Y-%m-%d}"
        raise CannotReplay(f"its body was {when}: discard it.")
    try:
        call = read_call(message.body)
    except Unreadable as no:
        raise CannotReplay(f"it cannot be read: {no} Discard it.") from None
    if isinstance(call, dict):  # Celery's first protocol
        return call.get("kwargs")
    return call[1] if isinstance(call, list) and len(call) > 1 else None


def _is_bulk(kept: DeadLetter) -> bool:
    return kept.task == APPLY_MANY and kept.event_index is None


def _closed(kept: DeadLetter) -> str:
    when = f"{kept.state_changed_at:%Y-%m-%d %H:%M:%S}" if kept.state_changed_at else "some time"
    what = f"it was {kept.state} by {kept.state_changed_by} on {when}"
    return f"{what}; to publish its events once more, add --again." if kept.state == "replayed" else f"{what}."


def _message_id(kept: DeadLetter, place: int | None) -> str:
    """The same at every replay of the letter: should the replay be a dead letter too, it is one, not one a replay."""
    return str(uuid5(_NAMESPACE, f"{kept.fingerprint.hex()}:{place}"))


def _patiently(do: Callable[[], Report]) -> Report:
    for attempt in range(1, _TRIES):
        with contextlib.suppress(DeadlockDetected, LockNotAvailable):
            return do()
        time.sleep(0.1 * attempt)
    return do()
