"""How a Python producer sends events: Celery messages, written onto the Redis list without Celery.

    with Publisher("redis://localhost:6379/0") as tokens:
        tokens.publish(Accrual(user_id="alice", amount="12.5", idempotency_key="order-4711", source="purchase"))

Redis has acknowledged whatever a call returned for. When a call fails, PublishError says in one sentence what is
known, and carries the events: publish them again under the same keys, and each is still applied once.
"""

from __future__ import annotations

import os
import socket
import uuid
import zlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Self

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from .broker import connect, unusable
from .canonical import plain_number
from .events import Accrual, Event, event_json
from .messages import ACCRUE, APPLY_MANY, BURN, DEFAULT_QUEUE, MAX_EVENTS, celery_message
from .text import one_line_error
from .urls import public_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

MAX_PUSH_MESSAGES: Final = 500  # of one LPUSH
MAX_PUSH_BYTES: Final = 1 << 20  # of one message, and about of one LPUSH
_MAX_USERS_SHOWN: Final = 10  # of a bulk message, in Flower
_NO_HEADERS: Final[Mapping[str, str | int]] = MappingProxyType({})


class PublishError(Exception):
    """Events were not published, or it is unknown whether they were; the message says which.

    `events` are all that the call took and Redis did not acknowledge, in order. It is always safe to publish them
    again under the same keys. `acknowledged` is the number of events that Redis acknowledged before.
    """

    def __init__(self, sentence: str, events: Sequence[Event], acknowledged: int = 0) -> None:
        super().__init__(sentence)
        self.events = tuple(events)
        self.acknowledged = acknowledged


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
        self._address = public_address(broker_url)
        self._queue = queue
        self._lanes = lanes
        self._origin = f"{os.getpid()}@{socket.gethostname()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. A Publisher buffers nothing, so no event is lost."""
        self._redis.close()

    def publish(self, event: Event) -> str:
        """Send one event; returns the message's id, which is the task's id in Flower. Raises PublishError."""
        queue = self.queue_of(event)
        message_id, message = self._message_of(event, queue)
        self._push(queue, [message], [event])
        return message_id

    def publish_all(self, events: Iterable[Event]) -> int:
        """Send each event as a message of its own, in order for each user; returns how many.

        The messages go in batches of at most 500 and about 1 MiB; Redis takes a batch entirely or not at all.
        Raises PublishError at the first batch that Redis does not acknowledge; its `events` are all that the call
        took from the iterable and Redis did not acknowledge.
        """
        return self._publish((event, None, _NO_HEADERS) for event in events)

    def publish_named(self, events: Iterable[tuple[Event, str, Mapping[str, str | int]]]) -> int:
        """`publish_all` with a message id and further headers for each event.

        A caller that may have to send the very same message again, such as a replay of dead letters, needs it.
        """
        return self._publish(events)

    def _publish(self, events: Iterable[tuple[Event, str | None, Mapping[str, str | int]]]) -> int:
        pending: dict[str, _Push] = {}  # of each queue
        acknowledged = 0

        def send(queue: str, push: _Push) -> None:
            nonlocal acknowledged
            try:
                self._push(queue, push.messages, push.events)
            except PublishError as error:
                waiting = [event for other in pending.values() for event in other.events]
                raise PublishError(str(error), [*push.events, *waiting], acknowledged) from error
            acknowledged += len(push.events)

        for event, message_id, headers in events:
            queue = self.queue_of(event)
            _, message = self._message_of(event, queue, message_id, headers)
            push = pending.setdefault(queue, _Push())
            if push.has_room_for(message):
                push.add(event, message)
                continue
            pending[queue] = following = _Push()
            following.add(event, message)  # before sending: should that fail, its error has this event too
            send(queue, push)
        for queue in list(pending):
            send(queue, pending.pop(queue))
        return acknowledged

    def publish_bulk(self, events: Sequence[Event]) -> str:
        """Send 1 to 1,000 events as one message; returns its id.

        The worker decides the events in their order, all in one transaction except for burns that it parks for an
        accrual. Each event has its own outcome. With lanes, events of different lanes go to the common queue.
        Raises PublishError, also for more than 1,000 events or more than 1 MiB: `bulks` cuts a list accordingly.
        """
        if not 1 <= len(events) <= MAX_EVENTS:
            raise PublishError(f"One message carries 1 to {MAX_EVENTS} events, not {len(events)}.", events)
        queues = {self.queue_of(event) for event in events}
        queue = queues.pop() if len(queues) == 1 else self._queue
        users = list(dict.fromkeys(event.user_id for event in events))
        more = ", …" if len(users) > _MAX_USERS_SHOWN else ""
        shown = {"events": f"{len(events)}, of {', '.join(users[:_MAX_USERS_SHOWN])}{more}"}
        arguments = f'{{"events":[{",".join(map(event_json, events))}]}}'
        message_id, message = self._message(APPLY_MANY, arguments, shown, queue)
        self._push(queue, [message], events)
        return message_id

    def queue_of(self, event: Event) -> str:
        """The queue that the event goes to."""
        if not self._lanes:
            return self._queue
        return f"{self._queue}.{zlib.crc32(event.user_id.encode()) % self._lanes}"

    def _message_of(
        self, event: Event, queue: str, message_id: str | None = None, headers: Mapping[str, str | int] = _NO_HEADERS
    ) -> tuple[str, str]:
        is_accrual = isinstance(event, Accrual)
        shown = {
            "user_id": event.user_id,
            "amount": plain_number(event.amount),
            "idempotency_key": event.idempotency_key,
            "source" if is_accrual else "action": event.purpose,
        }
        task = ACCRUE if is_accrual else BURN
        return self._message(task, event_json(event, with_type=False), shown, queue, message_id, headers)

    def _message(
        self,
        task: str,
        arguments: str,
        shown: dict[str, str],
        queue: str,
        message_id: str | None = None,
        headers: Mapping[str, str | int] = _NO_HEADERS,
    ) -> tuple[str, str]:
        """Id and text of a message."""
        # kombu files a message in flight under its delivery tag, so a message that is sent twice needs two tags.
        delivery_tag = str(uuid.uuid4())
        message_id = message_id or delivery_tag
        return message_id, celery_message(
            task,
            arguments,
            arguments_shown=shown,
            message_id=message_id,
            delivery_tag=delivery_tag,
            queue=queue,
            origin=self._origin,
            headers=headers,
        )

    def _push(self, queue: str, messages: Sequence[str], events: Sequence[Event]) -> None:
        """Append to the queue, all or nothing. LPUSH is never sent twice: Redis may have taken the first."""
        pool = self._redis.connection_pool
        count = f"{len(events)} event{'s' if len(events) != 1 else ''}"
        # A message longer than the limit is alone in its push, see _Push.
        if len(messages[0]) > MAX_PUSH_BYTES:
            raise PublishError(
                f"{count} make a message of {len(messages[0])} bytes, and at most {MAX_PUSH_BYTES} are allowed:"
                " not published.",
                events,
            )
        try:
            connection = pool.get_connection()
        except (RedisError, OSError) as error:
            raise PublishError(f"{unusable(self._address, error)}: {count} not published.", events) from error
        try:
            connection.send_command("LPUSH", queue, *messages)  # type: ignore[no-untyped-call]
            connection.read_response()
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            connection.disconnect()  # type: ignore[no-untyped-call]
            raise PublishError(
                f"The connection to Redis at {self._address} broke while {count} were sent ({one_line_error(error)}):"
                " whether they arrived is unknown, so publish them again with the same keys.",
                events,
            ) from error
        except RedisError as error:
            raise PublishError(
                f"Redis at {self._address} refused the message ({one_line_error(error)}): {count} not published.",
                events,
            ) from error
        except BaseException:
            # Ctrl-C before the reply is read: the next command on this connection must not take it for its own.
            connection.disconnect()  # type: ignore[no-untyped-call]
            raise
        finally:
            pool.release(connection)


class _Push:
    """The messages of one LPUSH, and their events."""

    __slots__ = ("events", "messages", "size")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.messages: list[str] = []
        self.size = 0  # bytes: messages are ASCII

    def has_room_for(self, message: str) -> bool:
        """Whether the message fits; an empty push has room for a message of any length."""
        return not self.events or (len(self.events) < MAX_PUSH_MESSAGES and self.size + len(message) <= MAX_PUSH_BYTES)

    def add(self, event: Event, message: str) -> None:
        self.events.append(event)
        self.messages.append(message)
        self.size += len(message)


def bulks(events: Iterable[Event], count: int = 500) -> Iterator[list[Event]]:
    """The events in lists that `publish_bulk` takes: each of at most `count` events and half of its limit of bytes."""
    bulk: list[Event] = []
    size = 0  # bytes
    for event in events:
        length = len(event_json(event).encode())
        if bulk and (len(bulk) == min(count, MAX_EVENTS) or size + length > MAX_PUSH_BYTES // 2):  # base64 adds a third
            yield bulk
            bulk, size = [], 0
        bulk.append(event)
        size += length
    if bulk:
        yield bulk
