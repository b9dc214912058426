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
from worker.cli.usage import UsageError, interruptible
from worker.config import load_settings
from worker.output import console, count, progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from schema.events import Event
    from schema.publisher import Publisher

_MAX_ERRORS: Final = 10  # wrong lines that are listed
_LINES_PER_STEP: Final = 500  # of the progress bar


def publish(
    file: Annotated[
        str | None,
        typer.Argument(help='Events as JSON lines, each {"type": "accrual" or "burn", …}; - is standard input.'),
    ] = None,
    type_: Annotated[str | None, typer.Option("--type", help="accrual or burn.", rich_help_panel="One event")] = None,
    user: Annotated[str | None, typer.Option(help="The user's ID.", rich_help_panel="One event")] = None,
    amount: Annotated[str | None, typer.Option(help="Tokens, such as 12.5.", rich_help_panel="One event")] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Idempotency key. Default: a new one, which is printed.", rich_help_panel="One event"),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Of an accrual: where the tokens come from.", rich_help_panel="One event")
    ] = None,
    action: Annotated[
        str | None, typer.Option(help="Of a burn: what the tokens pay for.", rich_help_panel="One event")
    ] = None,
    occurred_at: Annotated[
        str | None, typer.Option(help="When it happened, such as 2026-01-31T12:00:00Z.", rich_help_panel="One event")
    ] = None,
    metadata: Annotated[str | None, typer.Option(help="A JSON object.", rich_help_panel="One event")] = None,
    lanes: Annotated[int, typer.Option(min=0, max=9999, help="Spread over this many lanes of the queue.")] = 0,
    bulk: Annotated[bool, typer.Option("--bulk", help="Send a file's events 500 to a message.")] = False,
) -> None:
    """Publish events. Whatever is reported as published has been acknowledged by Redis.

    A whole file is checked first; when a line is wrong, nothing is sent.
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
    options = {name: value for name, value in fields.items() if value is not None}
    if (file is None) == (not options):
        raise UsageError("Give either a FILE of events or one event with --type, --user and --amount.")
    if file is None and bulk:
        raise UsageError("--bulk is for a FILE of events.")
    settings = load_settings()
    if file is None:
        event = _one_event(options, settings.max_amount)
        with settings.publisher(lanes) as publisher:
            _publish_one(publisher, event)
    else:
        events = EventFile(file, settings.max_amount)
        with settings.publisher(lanes) as publisher:
            _publish_file(publisher, events, settings.queue, bulk=bulk, lanes=lanes)


def _one_event(fields: dict[str, Any], max_amount: int) -> Event:
    if "metadata" in fields:
        try:
            fields["metadata"] = read_json(fields["metadata"])
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--metadata is not JSON: {error}.") from None
    fields.setdefault("idempotency_key", str(uuid.uuid4()))
    try:
        return parse_event(fields, max_amount=max_amount)
    except InvalidEvent as error:
        raise UsageError(str(error)) from None


def _publish_one(publisher: Publisher, event: Event) -> None:
    try:
        message_id = publisher.publish(event)
    except PublishError as error:
        raise PublishError(
            f"{error} Once that is fixed, publish it again with --key {event.idempotency_key}: it counts once.",
            error.events,
        ) from error
    typer.echo(f"Published {event.type} with the key {event.idempotency_key} (message {message_id}).")


def _publish_file(publisher: Publisher, events: EventFile, queue: str, *, bulk: bool, lanes: int) -> None:
    sent = 0

    def progress_so_far() -> str:
        return (
            f"at least {sent:,} of {events.count:,} events were published;"
            " publishing the whole file again is safe, for each counts once."
        )

    with interruptible(progress_so_far), progress("publishing", events.count, console(stderr=True)) as advance:
        for some in bulks(events):
            try:
                if bulk:
                    publisher.publish_bulk(some)
                else:
                    publisher.publish_all(some)
            except PublishError as error:
                raise PublishError(
                    f"{error} {sent + error.acknowledged:,} of {events.count:,} events were published before that;"
                    " publishing the whole file again is safe, for each counts once.",
                    error.events,
                ) from error
            sent += len(some)
            advance(len(some))
    where = f"{count(lanes, 'lane')} of the queue" if lanes else "the queue"
    typer.echo(f"Published {count(sent, 'event')} to {where} {queue}.")


class EventFile:
    """The events of a JSON-lines file, all of them valid. The file is read once: the checked events are those sent."""

    def __init__(self, path: str, max_amount: int) -> None:
        """Raises UsageError, which lists the first wrong lines."""
        self._max_amount = max_amount
        try:
            self._text = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        except (OSError, AttributeError) as error:  # standard input may be closed, and is None then
            reason = (error.strerror or error) if isinstance(error, OSError) else "it is closed"
            raise UsageError(f"Cannot read {path}: {reason}.") from None
        self.count = 0
        errors = []
        wrong = 0
        with progress("checking", self._text.count(b"\n"), console(stderr=True)) as advance:
            reported = 0
            for number, line in self._lines():
                try:
                    self._parse(line)
                    self.count += 1
                except InvalidEvent as error:
                    wrong += 1
                    if wrong <= _MAX_ERRORS:
                        errors.append(f"line {number}: {error}")
                if number - reported >= _LINES_PER_STEP:
                    advance(number - reported)
                    reported = number
        if wrong:
            more = f"\n  and {wrong - _MAX_ERRORS:,} more" if wrong > _MAX_ERRORS else ""
            lines = "lines are not events" if wrong > 1 else "line is not an event"
            listed = "\n  ".join(errors)
            raise UsageError(f"Nothing was sent: {wrong:,} {lines}:\n  {listed}{more}")
        if not self.count:
            raise UsageError(f"{path} contains no events.")

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
