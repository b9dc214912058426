"""`tokentrail publish`: one event, or a file of them."""

from __future__ import annotations

import io
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from schema.canonical import read_json
from schema.events import InvalidEvent, parse_event
from schema.publisher import PublishError, bulks
from worker.cli.usage import Misused, interruptible
from worker.config import settings
from worker.output import console, count, progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from schema.events import Event
    from schema.publisher import Publisher
    from worker.config import Settings

_SHOWN_ERRORS: Final = 10
_LINES_A_STEP: Final = 500  # of the bar


def publish(
    file: Annotated[
        str | None,
        typer.Argument(help='Events as JSON lines, each {"type": "accrual" or "burn", …}; - is standard input.'),
    ] = None,
    type_: Annotated[str | None, typer.Option("--type", help="accrual or burn.", rich_help_panel="One event")] = None,
    user: Annotated[str | None, typer.Option(help="Whose tokens.", rich_help_panel="One event")] = None,
    amount: Annotated[str | None, typer.Option(help="How many, such as 12.5.", rich_help_panel="One event")] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Idempotency key; without one it is made up and shown.", rich_help_panel="One event"),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Of an accrual: where from.", rich_help_panel="One event")] = None,
    action: Annotated[str | None, typer.Option(help="Of a burn: what for.", rich_help_panel="One event")] = None,
    occurred_at: Annotated[
        str | None, typer.Option(help="When, such as 2026-01-31T12:00:00Z.", rich_help_panel="One event")
    ] = None,
    metadata: Annotated[str | None, typer.Option(help="A JSON object.", rich_help_panel="One event")] = None,
    lanes: Annotated[int, typer.Option(min=0, max=9999, help="Spread over this many lanes of the queue.")] = 0,
    bulk: Annotated[bool, typer.Option("--bulk", help="Send a file's events 500 to a message.")] = False,
) -> None:
    """Publish events: what this says was published, Redis has acknowledged.

    A file is checked as a whole first; when a line is wrong nothing is sent.
    """
    fields = {
        "type": type_,
        "user_id": user,
        "amount": amount,
        "idempotency_key": key,
        "source": source,
        "action": action,
        "occurred_at": occurred_at,
        "metadata": metadata,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    if (file is None) == (not given):
        raise Misused("Give either a FILE of events or one event with --type, --user and --amount.")
    if file is None and bulk:
        raise Misused("--bulk is for a FILE of events.")
    found = settings()
    events = Lines(file, found.max_amount) if file is not None else None
    single = None if events else _one_event(given, found.max_amount)
    with found.publisher(lanes) as publisher:
        if events is not None:
            _publish_file(publisher, events, found, bulk=bulk, lanes=lanes)
        elif single is not None:
            _publish_one(publisher, single)


def _one_event(given: dict[str, Any], max_amount: int) -> Event:
    if "metadata" in given:
        try:
            given["metadata"] = read_json(given["metadata"])
        except (ValueError, RecursionError) as error:
            raise Misused(f"--metadata is not JSON: {error}.") from None
    given.setdefault("idempotency_key", str(uuid.uuid4()))
    try:
        return parse_event(given, max_amount=max_amount)
    except InvalidEvent as error:
        raise Misused(str(error)) from None


def _publish_one(publisher: Publisher, event: Event) -> None:
    try:
        message_id = publisher.publish(event)
    except PublishError as error:
        raise PublishError(
            f"{error} When that is mended, publish it again with --key {event.idempotency_key}: it counts once.",
            error.events,
        ) from error
    typer.echo(f"Published {event.type} with the key {event.idempotency_key} (message {message_id}).")


def _publish_file(publisher: Publisher, events: Lines, found: Settings, *, bulk: bool, lanes: int) -> None:
    sent = 0

    def so_far() -> str:
        return (
            f"at least {sent:,} of {events.count:,} events were published;"
            " publishing the whole file again is safe, for each counts once."
        )

    with interruptible(so_far), progress("publishing", events.count, console(stderr=True)) as advance:
        for run in bulks(events):
            try:
                if bulk:
                    publisher.publish_bulk(run)
                else:
                    publisher.publish_all(run)
            except PublishError as error:
                raise PublishError(
                    f"{error} {sent + error.acknowledged:,} of {events.count:,} events were published before that;"
                    " publishing the whole file again is safe, for each counts once.",
                    error.events,
                ) from error
            sent += len(run)
            advance(len(run))
    where = f"{count(lanes, 'lane')} of the queue" if lanes else "the queue"
    typer.echo(f"Published {count(sent, 'event')} to {where} {found.queue}.")


class Lines:
    """The events of a JSON-lines file, all of them valid. Read once, so that what was checked is what is sent."""

    def __init__(self, path: str, max_amount: int) -> None:
        """Raises Misused that names the first lines that are wrong."""
        self._max_amount = max_amount
        try:
            self._text = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        except (OSError, AttributeError) as error:  # standard input may be closed, and is None then
            reason = (error.strerror or error) if isinstance(error, OSError) else "it is closed"
            raise Misused(f"Cannot read {path}: {reason}.") from None
        self.count = 0
        errors = []
        wrong = 0
        with progress("checking", self._text.count(b"\n"), console(stderr=True)) as advance:
            shown = 0
            for number, line in self._lines():
                try:
                    self._parse(line)
                    self.count += 1
                except InvalidEvent as error:
                    wrong += 1
                    if wrong <= _SHOWN_ERRORS:
                        errors.append(f"line {number}: {error}")
                if number - shown >= _LINES_A_STEP:
                    advance(number - shown)
                    shown = number
        if wrong:
            more = f"\n  and {wrong - _SHOWN_ERRORS:,} more" if wrong > _SHOWN_ERRORS else ""
            what = "lines are no events" if wrong > 1 else "line is no event"
            listed = "\n  ".join(errors)
            raise Misused(f"Nothing was sent: {wrong:,} {what}:\n  {listed}{more}")
        if not self.count:
            raise Misused(f"{path} holds no events.")

    def __iter__(self) -> Iterator[Event]:
        for _, line in self._lines():
            yield self._parse(line)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        for number, line in enumerate(io.BytesIO(self._text), 1):
            if line.strip():
                yield number, line

    def _parse(self, line: bytes) -> Event:
        try:
            data = read_json(line.decode())
        except (ValueError, RecursionError) as error:
            raise InvalidEvent(f"This is not JSON: {error}.") from None
        return parse_event(data, max_amount=self._max_amount)
