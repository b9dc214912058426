"""How a Python producer sends events: Celery messages written by hand onto the Redis list, without Celery.

    with Publisher("redis://localhost:6379/0") as tokens:
        tokens.publish(Accrual(user_id="alice", amount="12.5", idempotency_key="order-4711", source="purchase"))

What has returned is acknowledged by Redis. When something goes wrong PublishError says in one sentence what is
known, and carries the events: publish them again with the same keys, twice is once.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import uuid
import zlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel

from .canonical import plain_number
from .events import MAX_EVENTS, Accrual, Event, event_json
from .messages import ACCRUE, APPLY_MANY, BURN, DEFAULT_QUEUE
from .urls import UNREADABLE, check_broker, said, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

MAX_BATCH: Final = 500  # messages in one LPUSH
MAX_BYTES: Final = 1 << 20  # of one message, and about of one LPUSH
_REPR: Final = 200  # characters of arguments that Flower shows and searches
_NO_CALLBACKS: Final = '{"callbacks":null,"errbacks":null,"chain":null,"chord":null}'


class PublishError(Exception):
    """Events were not published, or nobody knows; the message says which.

    `events` are those of them that were handed over and not acknowledged, in order. Publishing all of them
    again with the same keys is always right. `acknowledged` were before.
    """

    def __init__(self, sentence: str, events: Sequence[Event], acknowledged: int = 0) -> None:
        super().__init__(sentence)
        self.events = tuple(events)
        self.acknowledged = acknowledged


def connect(broker_url: str, *, master_name: str | None = None, timeout: float = 5.0) -> redis.Redis:
    """A client for the URL that Celery uses too: redis://, rediss:// or sentinel://a:26379;sentinel://b:26379/0.

    For Sentinel `master_name`, or ?master_name=… in the URL, names the master; user and password in the URL
    are the master's. Connecting is tried four times, within `timeout` seconds each; a command never is.
    Raises ValueError, which does not repeat the URL, when it cannot be understood. Nothing is sent yet.
    """
    check_broker(broker_url)
    options: dict[str, Any] = {
        "protocol": 2,  # no handshake beyond AUTH: the same on Redis and Valkey of any age
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "socket_keepalive": True,
        "health_check_interval": 10,  # an idle connection is tried with PING before it is trusted with events
        "retry": Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), 3),
    }
    if broker_url.startswith("sentinel://"):
        return _sentinel(broker_url, master_name, options)
    # Celery writes ssl_cert_reqs=CERT_REQUIRED where redis-py writes required.
    for level in ("required", "optional", "none"):
        broker_url = broker_url.replace(f"ssl_cert_reqs=CERT_{level.upper()}", f"ssl_cert_reqs={level}")
    client = redis.Redis.from_url(broker_url, **options)
    pool = client.connection_pool
    try:
        pool.connection_class(**pool.connection_kwargs)  # not connected: does it know all that the URL asks for?
    except TypeError:
        raise ValueError(UNREADABLE) from None
    return client


def _sentinel(broker_url: str, master_name: str | None, options: dict[str, Any]) -> redis.Redis:
    parts = [urlsplit(part) for part in broker_url.split(";")]
    query = parse_qs(parts[-1].query)
    master_name = master_name or query.get("master_name", [None])[0]
    if master_name is None:
        raise ValueError("a sentinel:// URL needs the master's name: add ?master_name=… to it")
    owner = next((part for part in parts if part.password), parts[0])
    # redis-py has no types for Sentinel.
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [(part.hostname or "localhost", part.port or 26379) for part in parts],
        sentinel_kwargs={**options, "retry": Retry(ExponentialWithJitterBackoff(), 0)},  # the next one is the retry
    )
    master: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
        master_name,
        db=int(parts[-1].path.strip("/") or 0),
        username=unquote(owner.username) if owner.username else None,
        password=unquote(owner.password) if owner.password else None,
        **options,
    )
    return master


class Publisher:
    """Sends events to the queue. Threads may share one; processes may not.

    With `lanes` an event goes to the queue `<queue>.<n>`, n being crc32 of its user modulo lanes, so that a
    user's events stay in order and workers do not wait for each other's row locks.
    """

    def __init__(
        self,
        broker_url: str,
        queue: str = DEFAULT_QUEUE,
        lanes: int = 0,
        *,
        master_name: str | None = None,
        timeout: float = 5.0,
    ) -> None:
        if lanes < 0:
            raise ValueError("lanes must not be negative.")
        self._redis = connect(broker_url, master_name=master_name, timeout=timeout)
        self._server = shown(broker_url)
        self._queue = queue
        self._lanes = lanes
        self._origin = json.dumps(f"{os.getpid()}@{socket.gethostname()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Nothing is buffered, so nothing is lost."""
        self._redis.close()

    def publish(self, event: Event) -> str:
        """Send one event; returns the message's id, which is the task's id in Flower. Raises PublishError."""
        queue = self.queue_of(event)
        message_id, message = self._message(event, queue)
        self._push(queue, [message], [event])
        return message_id

    def publish_all(self, events: Iterable[Event]) -> int:
        """Send every event as a message of its own, in order for each user; returns how many.

        They go in batches of at most 500 messages and about 1 MiB, each of which Redis takes entirely or
        not at all. Raises PublishError at the first batch that is not acknowledged; its `events` are all that
        were taken from the iterable and not acknowledged.
        """
        return self._publish((event, None, {}) for event in events)

    def publish_named(self, events: Iterable[tuple[Event, str, Mapping[str, str | int]]]) -> int:
        """`publish_all` with a message id and further headers for each event.

        For who must be able to publish the very same message again, as replaying a dead letter does.
        """
        return self._publish(events)

    def _publish(self, events: Iterable[tuple[Event, str | None, Mapping[str, str | int]]]) -> int:
        batches: dict[str, _Batch] = {}
        sent = 0

        def flush(queue: str) -> int:
            batch = batches[queue]
            try:
                self._push(queue, batch.messages, batch.events)
            except PublishError as error:
                waiting = [event for name, other in batches.items() if name != queue for event in other.events]
                raise PublishError(str(error), [*batch.events, *waiting], sent) from error
            del batches[queue]
            return len(batch.events)

        for event, message_id, headers in events:
            queue = self.queue_of(event)
            _, message = self._message(event, queue, message_id, headers)
            batch = batches.get(queue)
            if batch and (len(batch.events) == MAX_BATCH or batch.size + len(message) > MAX_BYTES):
                sent += flush(queue)
                batch = None
            if batch is None:
                batch = batches[queue] = _Batch()
            batch.messages.append(message)
            batch.events.append(event)
            batch.size += len(message)
        for queue in list(batches):
            sent += flush(queue)
        return sent

    def publish_bulk(self, events: Sequence[Event]) -> str:
        """Send 1 to 1,000 events as one message, which is never cut; returns its id.

        The events are decided in their order, all in one transaction but for burns that wait for an accrual, and each
        has its own outcome. With lanes, events of different lanes go to the common queue. Raises PublishError, also for
        more than 1,000 events or more than 1 MiB: see `bulks`.
        """
        if not 1 <= len(events) <= MAX_EVENTS:
            raise PublishError(f"One message carries 1 to {MAX_EVENTS} events, not {len(events)}.", events)
        queues = {self.queue_of(event) for event in events}
        queue = queues.pop() if len(queues) == 1 else self._queue
        users = list(dict.fromkeys(event.user_id for event in events))
        shown = {"events": f"{len(events)}, of {', '.join(users[:10])}{', …' if users[10:] else ''}"}
        kwargs = f'{{"events":[{",".join(map(event_json, events))}]}}'
        message_id, message = self._enveloped(APPLY_MANY, kwargs, repr(shown), queue)
        self._push(queue, [message], events)
        return message_id

    def queue_of(self, event: Event) -> str:
        """The queue that the event goes to."""
        if not self._lanes:
            return self._queue
        return f"{self._queue}.{zlib.crc32(event.user_id.encode()) % self._lanes}"

    def _message(
        self, event: Event, queue: str, message_id: str | None = None, headers: Mapping[str, str | int] | None = None
    ) -> tuple[str, str]:
        shown = {
            "user_id": event.user_id,
            "amount": plain_number(event.amount),
            "idempotency_key": event.idempotency_key,
            "source" if isinstance(event, Accrual) else "action": event.what,
        }
        task = ACCRUE if isinstance(event, Accrual) else BURN
        # The task's name is the type. A quote inside a JSON string is escaped, so this text is the field itself
        # and, metadata standing last, the event's own.
        kwargs = event_json(event).replace(f',"type":"{event.type}"', "", 1)
        return self._enveloped(task, kwargs, repr(shown), queue, message_id, headers or {})

    def _enveloped(
        self,
        task: str,
        kwargs: str,
        shown: str,
        queue: str,
        message_id: str | None = None,
        headers: Mapping[str, str | int] = MappingProxyType({}),
    ) -> tuple[str, str]:
        """Message id and text of a Celery message, protocol 2. `kwargs` is spliced: no number passes a float."""
        # A tag is a message's name while it is unacknowledged. The id will do, unless the message may be sent again.
        tag = str(uuid.uuid4())
        message_id = message_id or tag
        more = "".join(f",{json.dumps(name)}:{json.dumps(value)}" for name, value in headers.items())
        body = base64.b64encode(f"[[],{kwargs},{_NO_CALLBACKS}]".encode()).decode()
        if len(shown) > _REPR:
            shown = f"{shown[: _REPR - 2]}…}}"
        return message_id, (
            f'{{"body":"{body}","content-encoding":"utf-8","content-type":"application/json","headers":{{'
            f'"lang":"py","task":"{task}","id":"{message_id}","root_id":"{message_id}","parent_id":null,'
            f'"group":null,"retries":0,"timelimit":[null,null],"eta":null,"expires":null,"ignore_result":true,'
            f'"argsrepr":"()","kwargsrepr":{json.dumps(shown)},"origin":{self._origin}{more}}},'
            f'"properties":{{"correlation_id":"{message_id}","reply_to":"","delivery_mode":2,'
            f'"delivery_info":{{"exchange":"","routing_key":{json.dumps(queue)}}},"priority":0,'
            f'"body_encoding":"base64","delivery_tag":"{tag}"}}}}'
        )

    def _push(self, queue: str, messages: Sequence[str], events: Sequence[Event]) -> None:
        """Append to the queue, all or nothing. Connecting is retried, sending is not: it might have arrived."""
        pool = self._redis.connection_pool
        count = f"{len(events)} event{'s' if len(events) != 1 else ''}"
        # Cutting by size leaves a message as long as this alone in its batch.
        if len(messages[0]) > MAX_BYTES:
            raise PublishError(
                f"{count} make a message of {len(messages[0])} bytes, and at most {MAX_BYTES} are allowed:"
                " not published.",
                events,
            )
        try:
            connection = pool.get_connection()
        except (RedisError, OSError) as error:
            raise PublishError(f"{unreachable(self._server, error)[:-1]}: {count} not published.", events) from error
        try:
            connection.send_command("LPUSH", queue, *messages)  # type: ignore[no-untyped-call]
            connection.read_response()
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            connection.disconnect()  # type: ignore[no-untyped-call]
            raise PublishError(
                f"The connection to Redis at {self._server} broke while {count} were sent ({said(error)}): whether"
                " they arrived is unknown, so publish them again with the same keys.",
                events,
            ) from error
        except RedisError as error:
            raise PublishError(
                f"Redis at {self._server} refused the message ({said(error)}): {count} not published.", events
            ) from error
        except BaseException:
            # An interrupt in between: the next command must not read the answer to this one.
            connection.disconnect()  # type: ignore[no-untyped-call]
            raise
        finally:
            pool.release(connection)


class _Batch:
    __slots__ = ("events", "messages", "size")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.messages: list[str] = []
        self.size = 0  # characters, all of them ASCII


def bulks(events: Iterable[Event], count: int = 500) -> Iterator[list[Event]]:
    """The events cut into runs that `publish_bulk` takes: at most `count` events and half of what it allows."""
    run: list[Event] = []
    size = 0
    for event in events:
        length = len(event_json(event).encode())
        if run and (len(run) == min(count, MAX_EVENTS) or size + length > MAX_BYTES // 2):  # base64 adds a third
            yield run
            run, size = [], 0
        run.append(event)
        size += length
    if run:
        yield run


def unreachable(server: str, error: Exception) -> str:
    """One sentence for a Redis that is away or does not let us in."""
    return f"Redis at {server} cannot be used ({said(error)})."
