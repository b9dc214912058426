"""A kombu consumer without Celery, for the tests of the transport."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import kombu

from tests.kit.wait import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator

STOCK = "kombu.transport.redis:Transport"
OURS = "worker.transport.channel:Transport"


def queue_of(name: str) -> kombu.Queue:
    return kombu.Queue(name, exchange=kombu.Exchange("", type="direct"), routing_key=name)


class Consumer:
    """A kombu consumer that keeps what it gets, and acknowledges what it is told to."""

    def __init__(self, connection: kombu.Connection, *queues: str, prefetch: int = 0) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.channel.basic_qos(0, prefetch, False)
        self.messages: list[Any] = []
        self.consumer = kombu.Consumer(
            self.channel,
            [queue_of(queue) for queue in queues or ("tokens",)],
            on_message=self.messages.append,
            accept=["json"],
        )
        self.consumer.consume()

    @property
    def numbers(self) -> list[int]:
        return [message.headers["number"] for message in self.messages]

    def drain(self, seconds: float = 0.2) -> list[Any]:
        """Take what comes within `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                self.connection.drain_events(timeout=left)
            except TimeoutError:
                break
        return self.messages

    def fetch(self) -> list[Any]:
        """Take what one fetch brings."""
        self.connection.drain_events(timeout=PATIENCE)
        return self.messages

    def drain_until(self, count: int) -> list[Any]:
        """Take what comes until there are `count` messages."""
        deadline = time.monotonic() + PATIENCE
        while len(self.messages) < count:
            assert time.monotonic() < deadline, f"{len(self.messages)} of {count} messages came"
            self.drain(0.05)
        return self.messages

    def turn(self) -> None:
        """One turn of the loop, in which acknowledgements reach Redis."""
        self.drain(0.06)

    def abandon(self) -> None:
        """Forget everything, as SIGKILL does."""
        self.channel.qos._delivered.clear()
        self.channel.qos._delivered.restored = True
        self.channel._disconnect_pools()
        self.channel._close_clients()
        self.connection.transport.cycle.close()


@contextmanager
def consuming(
    url: str, *queues: str, transport: str | None = OURS, prefetch: int = 0, **options: Any
) -> Iterator[Consumer]:
    with kombu.Connection(url, transport=transport, transport_options=options) as connection:
        yield Consumer(connection, *queues, prefetch=prefetch)
