"""Messages in and out: reads each into a part to apply, and tells Celery and Flower what became of it."""

from __future__ import annotations

from itertools import count
from typing import Any, Final
from uuid import UUID

import structlog
from celery import Celery
from celery.worker import state
from celery.worker.request import Request
from kombu.message import Message

from schema.messages import APPLY_MANY, MAX_BODY_BYTES, REPLAY_HEADER, RESTORES_HEADER, SOLO_DEATHS_HEADER, TYPES
from schema.text import ascii_line
from worker.config import Settings
from worker.ledger.deliveries import IfShort, Origin
from worker.ledger.outcomes import DeadLettered, Outcome
from worker.queue.in_flight import InFlight, Part
from worker.queue.parsing import Parsed, UnreadableError, check_readable, letter_for, parse_call, read_body, refusal_of

log = structlog.get_logger(__name__)

#: Bytes of a poison message's body that are still read, to store its dead letter with user and key: reading so little
#: cannot be what killed the workers.
MAX_POISON_BYTES: Final = 64 * 1024

#: Characters of the arguments that task events carry.
MAX_ARGUMENTS_LENGTH: Final = 500

#: Task events that are published together: kombu's 24 was measured to halve the throughput.
EVENT_BUFFER: Final = 500


class Intake:
    """Reads the messages of one worker process, whatever they hold, and sends their task events."""

    def __init__(self, settings: Settings, hostname: str) -> None:
        self._settings = settings
        self._hostname = hostname
        self._if_short = IfShort.WAIT if settings.burn_patience else IfShort.REJECT
        self._numbers = count(1)
        self._app: Any = None
        self._tasks: Any = {}
        self._connection_errors: tuple[type[Exception], ...] = ()
        self._events: Any = None

    def attach(self, app: Celery, connection_errors: tuple[type[Exception], ...], events: Any) -> None:
        """Use a new connection; `events` is Celery's dispatcher of task events, or None."""
        # Attributes of our own, because Celery computes each again at every access.
        self._app, self._tasks, self._connection_errors = app, app.tasks, connection_errors
        self._events = events
        if events:
            events.buffer_limit = EVENT_BUFFER

    def read(self, message: Message) -> Part:
        """The whole message as one part. Never raises: a message that cannot be read becomes a dead letter."""
        headers: dict[str, Any] = message.headers if isinstance(message.headers, dict) else {}
        body: Any = message.body
        body = body if isinstance(body, bytes) else str(body or "").encode(errors="surrogatepass")
        call: Any = None
        try:
            if "task" not in headers and (protocol_1 := _read_protocol_1(body)) is not None:
                headers = {**headers, **{name: protocol_1.get(name) for name in ("task", "id", "eta", "expires")}}
                call = [protocol_1.get("args"), protocol_1.get("kwargs"), {}]
            check_readable(
                headers,
                content_type=message.content_type,
                content_encoding=message.content_encoding,
                size=len(body),
                solo_deaths=_count(headers, SOLO_DEATHS_HEADER),
            )
            refusal = refusal_of(headers, state.revoked)
            call = read_body(body) if call is None else call
            _check_call(call)
            origin = self._origin(message, headers, body)
            parsed = parse_call(
                headers["task"],
                call[0],
                call[1],
                origin,
                max_amount=self._settings.max_amount,
                if_short=self._if_short,
                refusal=refusal,
            )
        except UnreadableError as error:
            return self._unreadable(message, headers, body, call, error)
        except Exception as error:  # a bug of tokentrail that this message triggers must not end the worker
            log.exception("could not read a message", reason=repr(error)[:300])
            detail = f"Reading it failed: {type(error).__name__}: {ascii_line(str(error), 200)}."
            return self._unreadable(message, headers, body, None, UnreadableError("internal_error", detail))
        if refusal is not None:
            log.info("message refused", reason=refusal.reason, detail=refusal.detail, task=origin.task)
        part = self._part(message, headers, parsed, len(body), bulk=headers["task"] == APPLY_MANY)
        in_flight = part.message
        in_flight.restores = _count(headers, RESTORES_HEADER)
        in_flight.arguments = _arguments(headers, call)
        in_flight.request = self._request(in_flight, headers, call)
        self._announce(in_flight)
        return part

    def finish(self, message: InFlight, seconds: float) -> None:
        """Acknowledge a message whose outcomes are durable, and send them as a task event; `seconds` is its runtime."""
        decided, text = message.result()
        request = message.request
        if request is None:
            message.kombu_message.ack_log_error(log, self._connection_errors)
            self._send("task-failed", message, exception=text, traceback=text)
            return
        # What Request.on_accepted does, except that the request never is among Celery's active ones: a SIGQUIT sleeps
        # in its handler, in this thread, until no request is active, and cannot cancel ours after that.
        state.task_accepted(request, add_active_request=_ignore)
        request.send_event("task-started")
        if decided:
            request.on_success((False, text, seconds))
        else:
            state.task_ready(request)
            request.acknowledge()
            self._send("task-failed", message, exception=text, traceback=text)

    def forget(self, message: InFlight) -> None:
        """Remove a message from Celery's reserved requests: it will be delivered again."""
        if message.request is not None:
            state.task_ready(message.request)

    def _unreadable(
        self, message: Message, headers: dict[str, Any], body: bytes, call: Any, error: UnreadableError
    ) -> Part:
        """A part that is nothing but a dead letter."""
        if call is None and error.reason not in {"undecodable", "oversized"}:
            call = _try_read_body(body, MAX_BODY_BYTES if error.reason != "poison" else MAX_POISON_BYTES)
        kwargs = call[1] if isinstance(call, list) and len(call) > 1 else None
        origin = self._origin(message, headers, body)
        letter = letter_for(kwargs, error.reason, error.detail, origin, type_=TYPES.get(origin.task or ""))
        task = None if origin.task is None else ascii_line(origin.task, 200)
        log.info("message kept as a dead letter", reason=error.reason, detail=error.detail, task=task)
        part = self._part(message, headers, Parsed([], [letter]), len(body), bulk=False)
        part.message.arguments = _arguments(headers, call)
        self._announce(part.message)
        return part

    def _part(self, message: Message, headers: dict[str, Any], parsed: Parsed, body_size: int, *, bulk: bool) -> Part:
        # The transport's size counts headers too: a batch with all its headers must fit into one statement.
        size = max(body_size, getattr(message, "size", 0))
        task = _text(headers.get("task")) or "unknown"
        task_id = _text(headers.get("id")) or str(message.delivery_tag)
        outcomes: list[Outcome | None] = [None] * (len(parsed.deliveries) + len(parsed.letters))
        for letter in parsed.letters:
            outcomes[letter.origin.event_index or 0] = DeadLettered(letter.reason, letter.detail)
        in_flight = InFlight(message, next(self._numbers), size, task, task_id, bulk, parsed.letters, outcomes)
        return Part(in_flight, parsed.deliveries)

    def _origin(self, message: Message, headers: dict[str, Any], body: bytes) -> Origin:
        stored = {
            "headers": headers,
            "content_type": message.content_type,
            "content_encoding": message.content_encoding,
            "routing_key": (message.delivery_info or {}).get("routing_key"),
        }
        replay_of = headers.get(REPLAY_HEADER)
        return Origin(
            _text(headers.get("task")),
            _text(headers.get("id")),
            body[:MAX_BODY_BYTES],
            stored,
            replay_of=replay_of if type(replay_of) is int and 0 < replay_of < 1 << 63 else None,
        )

    def _request(self, message: InFlight, headers: dict[str, Any], call: list[Any]) -> Request | None:
        """Celery's view of the message; None where Celery cannot build one.

        Of the headers Celery gets what Flower and `inspect` show and no more: it counts tasks by `shadow` for ever, and
        trusts the types of all headers.
        """
        kombu_message = message.kombu_message
        trusted = {"task": headers["task"], "id": message.task_id, "argsrepr": "()", "kwargsrepr": message.arguments}
        try:
            request = Request(
                kombu_message,
                on_ack=kombu_message.ack_log_error,
                on_reject=kombu_message.reject_log_error,
                hostname=self._hostname,
                eventer=self._events,
                app=self._app,
                connection_errors=self._connection_errors,
                task=self._tasks[headers["task"]],
                body=(call[0], call[1], call[2]),
                headers=trusted,
                decoded=True,
            )
            state.task_reserved(request)
        except Exception as error:  # noqa: BLE001 - a producer chooses the properties; the event in the body counts
            log.info("message without a Celery request", reason=repr(error)[:200], task=message.task)
            return None
        return request

    def _announce(self, message: InFlight) -> None:
        self._send(
            "task-received",
            message,
            name=message.task,
            args="()",
            kwargs=message.arguments,
            root_id=message.task_id,
            parent_id=None,
            retries=0,
            eta=None,
            expires=None,
        )

    def _send(self, type_: str, message: InFlight, **fields: Any) -> None:
        if self._events and self._events.enabled:
            self._events.send(type_, uuid=message.task_id, **fields)


def _ignore(request: Request) -> None:
    """In place of Celery's set of active requests."""


def _check_call(call: object) -> None:
    if not isinstance(call, list) or len(call) != 3:  # noqa: PLR2004
        raise UnreadableError("undecodable", "The body is not a call: a list of args, kwargs and options.")


def _arguments(headers: dict[str, Any], call: object) -> str:
    """The keyword arguments as Flower shows them: the producer's text for them, or else their repr."""
    text = headers.get("kwargsrepr")
    if not isinstance(text, str) or not text:
        try:
            text = repr(call[1]) if isinstance(call, list) and len(call) > 1 else "{}"
        except RecursionError:
            text = "{...}"
    return text[:MAX_ARGUMENTS_LENGTH]


def _try_read_body(body: bytes, max_bytes: int) -> Any:
    """The JSON of the body of a message that is not applied, to find its user and key; None if there is none."""
    try:
        return read_body(body) if len(body) <= max_bytes else None
    except UnreadableError:
        return None


def _read_protocol_1(body: bytes) -> dict[str, Any] | None:
    """The body of a message of Celery's protocol 1, which has task and id in it; None for any other message."""
    call = read_body(body)
    return call if isinstance(call, dict) and "task" in call else None


def _count(headers: dict[str, Any], name: str) -> int:
    """A count by our transport; with kombu's own transport a producer can set the header to anything."""
    value = headers.get(name)
    return value if isinstance(value, int) else 0


def _text(value: object) -> str | None:
    if isinstance(value, UUID):  # Celery's JSON has a type for them
        return str(value)
    return value[:200] if isinstance(value, str) and value else None
