"""One message in, one item in hand; one item decided, one acknowledgement and its events out.

Between Celery and `batching.py`: what Flower and `celery inspect` see of a message is said here.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from uuid import UUID

import structlog
from celery.worker import state
from celery.worker.request import Request

from schema.messages import (
    ACCRUE,
    APPLY_MANY,
    BURN,
    MAX_BODY_BYTES,
    REPLAY_HEADER,
    RESTORES_HEADER,
    SOLO_DEATHS_HEADER,
    TYPES,
)
from schema.text import ascii_line
from worker.config import Settings
from worker.ledger.deliveries import IfShort, Origin
from worker.queue.parsing import Refused, Unreadable, Work, letter_of, read_call, read_work

from . import undeliverable

log = structlog.get_logger(__name__)

TASKS = frozenset({ACCRUE, BURN, APPLY_MANY})

#: Bytes of a body that is still looked into when it killed workers: reading so little of it cannot be what did.
_HARMLESS = 64 * 1024

#: Characters of arguments that events carry.
_LONGEST_REPR = 500


class Item:
    """One message in hand."""

    __slots__ = ("alone", "arguments", "message", "name", "number", "request", "restores", "size", "uuid", "work")

    def __init__(self, message: Any, number: int, work: Work, size: int) -> None:
        self.message = message
        self.number = number  # in order of arrival
        self.work = work
        self.size = size  # bytes
        self.request: Request | None = None
        self.name: str = ""
        self.uuid: str = ""
        self.arguments: str = "{}"  # as Flower shows them
        self.restores = 0
        self.alone = 0  # attempts of this worker to decide it and nothing else

    @property
    def finished(self) -> bool:
        """Whether each of its events has an outcome."""
        return None not in self.work.outcomes


class Intake:
    """Reads messages for one worker process, whatever they are, and tells Celery what became of them."""

    def __init__(self, settings: Settings, hostname: str) -> None:
        self._settings = settings
        self._hostname = hostname
        self._numbers = count(1)
        self._app: Any = None
        self._tasks: Any = None
        self._errors: Any = ()
        self._eventer: Any = None

    def attach(self, consumer: Any) -> None:
        """Use a consumer's new connection."""
        # Kept at hand: Celery finds each anew, in several steps, at every access.
        self._app, self._tasks, self._errors = consumer.app, consumer.app.tasks, consumer.connection_errors
        self._eventer = consumer.event_dispatcher
        if self._eventer:
            # One PUBLISH for many events; kombu's 24 was measured to halve the throughput.
            self._eventer.buffer_limit = 500

    def read(self, message: Any) -> Item:
        """The item of a message. Never raises: what cannot be read becomes a letter."""
        headers: dict[str, Any] = message.headers if isinstance(message.headers, dict) else {}
        body = message.body
        body = body if isinstance(body, bytes) else str(body or "").encode(errors="surrogatepass")
        call: Any = None
        try:
            if "task" not in headers and (call := _protocol_1(body)) is not None:
                headers = {**headers, **{name: call.get(name) for name in ("task", "id", "eta", "expires")}}
                call = [call.get("args"), call.get("kwargs"), {}]
            restores = _count(headers, RESTORES_HEADER)
            refused = _refusal(message, headers, len(body))
            call = read_call(body) if call is None else call
            _check_call(call)
            origin = self._origin(message, headers, body)
            work = read_work(
                headers["task"],
                call[0],
                call[1],
                origin,
                max_amount=self._settings.max_amount,
                if_short=IfShort.WAIT if self._settings.burn_patience else IfShort.REJECT,
            )
        except Unreadable as no:
            return self._refused(message, headers, body, call, no)
        except Exception as bug:  # of ours, which this message triggers: it must not end the worker
            log.exception("could not read a message", reason=repr(bug)[:300])
            why = f"Reading it failed: {type(bug).__name__}: {ascii_line(str(bug), 200)}."
            return self._refused(message, headers, body, None, Unreadable("internal_error", why))
        if refused is not None:
            work.refuse_all(refused)
            log.info("message not to be decided", reason=refused.reason, detail=refused.sentence, task=origin.task)
        item = self._item(message, headers, work, len(body))
        item.restores = restores
        item.arguments = _arguments(headers, call)
        item.request = self._request(item, headers, call)
        self._announce(item)
        return item

    def finish(self, item: Item, runtime: float) -> None:
        """Acknowledge an item whose outcomes are durable, and say what they are."""
        decided, text = item.work.summary()
        request = item.request
        if request is None:
            item.message.ack_log_error(log, self._errors)
            self._send("task-failed", item, exception=text, traceback=text)
            return
        # What Request.on_accepted does, but for one thing: never among Celery's active requests. A SIGQUIT that finds
        # one there sleeps in its handler, in this very thread, for as long as that may take, and then cannot cancel it.
        state.task_accepted(request, add_active_request=_nowhere)
        request.send_event("task-started")
        if decided:
            request.on_success((False, text, runtime))
        else:
            state.task_ready(request)
            request.acknowledge()
            self._send("task-failed", item, exception=text, traceback=text)

    def try_alone(self, item: Item, by: int = 1) -> None:
        """Count the attempt on a suspect before it is made, for a worker that dies of it can count no more."""
        item.alone += by
        if count := getattr(item.message.channel.qos, "count_alone", None):
            try:
                count(item.message.delivery_tag, by)
            except Exception as error:  # noqa: BLE001 - Redis may be away: one attempt goes uncounted
                log.warning("could not count an attempt on a suspicious message", reason=str(error))

    def forget(self, item: Item) -> None:
        """Tell Celery no more of an item that comes again by itself."""
        if item.request is not None:
            state.task_ready(item.request)

    def requeue(self, items: list[Item], unread: list[Any]) -> None:
        """Put messages back where they came from, in this order, uncounted."""
        by_channel: dict[int, list[Any]] = {}
        for item in items:
            self.forget(item)
            if item.alone:
                self.try_alone(item, -item.alone)
        for message in [*(item.message for item in items), *unread]:
            by_channel.setdefault(id(message.channel), []).append(message)
        for group in by_channel.values():
            qos = group[0].channel.qos
            tags = [message.delivery_tag for message in group]
            try:
                if hasattr(qos, "requeue"):
                    qos.requeue(tags)
                else:
                    for message in reversed(group):
                        message.requeue()
            except Exception as error:  # noqa: BLE001 - Redis may be away, or refuse
                if hasattr(qos, "requeue_later"):
                    qos.requeue_later(tags)
                log.warning(
                    "could not put messages back: they go when Redis takes them, or after the visibility timeout",
                    messages=len(group),
                    reason=str(error),
                )

    def _refused(self, message: Any, headers: dict[str, Any], body: bytes, call: Any, no: Unreadable) -> Item:
        """An item that is nothing but a dead letter."""
        work = Work(bulk=False)
        if call is None and no.reason not in {"undecodable", "oversized"}:
            call = _glance(body, MAX_BODY_BYTES if no.reason != "poison" else _HARMLESS)
        kwargs = call[1] if isinstance(call, list) and len(call) > 1 else None
        origin = self._origin(message, headers, body)
        letter = letter_of(kwargs, no.reason, no.sentence, origin, type_=TYPES.get(origin.task or ""))
        work.refuse(letter)
        log.info("message kept as a dead letter", reason=no.reason, detail=no.sentence, task=_line(letter.origin.task))
        item = self._item(message, headers, work, len(body))
        item.arguments = _arguments(headers, call)
        self._announce(item)
        return item

    def _item(self, message: Any, headers: dict[str, Any], work: Work, size: int) -> Item:
        # With its headers, which count as much: a batch of messages has to fit into one statement.
        item = Item(message, next(self._numbers), work, max(size, getattr(message, "size", 0)))
        item.name = _text(headers.get("task")) or "unknown"
        item.uuid = _text(headers.get("id")) or str(message.delivery_tag)
        return item

    def _origin(self, message: Any, headers: dict[str, Any], body: bytes) -> Origin:
        kept = {
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
            kept,
            replay_of=replay_of if type(replay_of) is int and 0 < replay_of < 1 << 63 else None,
        )

    def _request(self, item: Item, headers: dict[str, Any], call: list[Any]) -> Request | None:
        """Celery's view of the message; None where it cannot be had.

        Of the headers it gets what Flower and `inspect` show and no more: Celery counts tasks by `shadow` for ever, and
        trusts the types of all of them.
        """
        message = item.message
        trusted = {"task": headers["task"], "id": item.uuid, "argsrepr": "()", "kwargsrepr": item.arguments}
        try:
            request = Request(
                message,
                on_ack=message.ack_log_error,
                on_reject=message.reject_log_error,
                hostname=self._hostname,
                eventer=self._eventer,
                app=self._app,
                connection_errors=self._errors,
                task=self._tasks[headers["task"]],
                body=(call[0], call[1], call[2]),
                headers=trusted,
                decoded=True,
            )
            state.task_reserved(request)
        except Exception as error:  # noqa: BLE001 - properties are a producer's; the event in the body counts all the same
            log.info("a message that Celery cannot show", reason=repr(error)[:200], task=item.name)
            return None
        return request

    def _announce(self, item: Item) -> None:
        self._send(
            "task-received",
            item,
            name=item.name,
            args="()",
            kwargs=item.arguments,
            root_id=item.uuid,
            parent_id=None,
            retries=0,
            eta=None,
            expires=None,
        )

    def _send(self, kind: str, item: Item, **fields: Any) -> None:
        if self._eventer and self._eventer.enabled:
            self._eventer.send(kind, uuid=item.uuid, **fields)


def _nowhere(request: Request) -> None:
    """Where Celery would keep the requests that are being worked at."""


def _arguments(headers: dict[str, Any], call: object) -> str:
    """The keyword arguments as Flower shows them: as the producer wants it, or as they came."""
    text = headers.get("kwargsrepr")
    if not isinstance(text, str) or not text:
        try:
            text = repr(call[1]) if isinstance(call, list) and len(call) > 1 else "{}"
        except RecursionError:
            text = "{...}"
    return text[:_LONGEST_REPR]


def _check_call(call: object) -> None:
    if not isinstance(call, list) or len(call) != 3:  # noqa: PLR2004 - args, kwargs, embed
        raise Unreadable("undecodable", "The body is not a call: a list of args, kwargs and options.")


def _refusal(message: Any, headers: dict[str, Any], size: int) -> Refused | None:
    """Why a message that can be read must not be decided any more. Raises Unreadable for one that cannot be read."""
    try:
        undeliverable.check(
            headers,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            size=size,
            known=TASKS,
            revoked=state.revoked,
            deaths=_count(headers, SOLO_DEATHS_HEADER),
        )
    except Refused as refused:
        return refused
    return None


def _glance(body: bytes, most: int) -> Any:
    """The call of a message that is refused unread, so that its letter is filed under user and key; None if none."""
    try:
        return read_call(body) if len(body) <= most else None
    except Unreadable:
        return None


def _protocol_1(body: bytes) -> dict[str, Any] | None:
    """The call of a message of Celery's first protocol, which has all in its body; None when it is no such message."""
    call = read_call(body)
    return call if isinstance(call, dict) and "task" in call else None


def _count(headers: dict[str, Any], name: str) -> int:
    """What our transport counted; with kombu's own a producer may have said anything."""
    value = headers.get(name)
    return value if isinstance(value, int) else 0


def _line(text: str | None) -> str | None:
    return None if text is None else ascii_line(text, 200)


def _text(value: object) -> str | None:
    if isinstance(value, UUID):  # Celery's JSON has a tag for it
        return str(value)
    return value[:200] if isinstance(value, str) and value else None
