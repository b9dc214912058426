"""What the tests of the transport share: brokers to break, a producer's bytes, and a consumer without Celery."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

import kombu
import redis

from worker.local.embedded import binaries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STOCK = "kombu.transport.redis:Transport"
OURS = "worker.transport.channel:Transport"
PRIORITY_STEPS = (0, 3, 6, 9)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(holds: Callable[[], Any], seconds: float = 10) -> None:
    """Return once `holds()` does; fail after a time that no healthy machine needs."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def cut_connections(client: redis.Redis) -> None:
    """Cut all other connections to the logical database of `client`; other tests may use others of this server."""
    database = str(client.get_connection_kwargs()["db"])
    own = client.client_id()
    for each in client.client_list():
        if each["db"] == database and int(each["id"]) != own:
            client.client_kill_filter(_id=each["id"])


class Broker:
    """A Valkey, or whatever `program` names, on a port of its own, that a test may kill and start again."""

    def __init__(self, folder: Path, *options: str, program: str | None = None) -> None:
        self.port = free_port()
        self.folder = folder
        self.command = [program or str(binaries.valkey_program()), *self._defaults(), *options]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def _defaults(self) -> list[str]:
        return ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(self._answers)

    def _answers(self) -> bool:
        try:
            with self.client as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False

    def kill(self) -> None:
        """As a power cut does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Sentinel(Broker):
    """One of the three that watch over a master."""

    def _defaults(self):
        configuration = self.folder / f"sentinel-{self.port}.conf"
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {self.folder.as_posix()}\n")
        return [str(configuration), "--sentinel"]


def message(number: int = 0, queue: str = "tokens", **changes: Any) -> bytes:
    """What a producer that is not Celery would push."""
    fields = {
        "body": json.dumps([[], {"number": number}, {}]),
        "headers": {"task": "tokens.burn", "id": str(uuid4()), "number": number},
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
        },
    }
    return json.dumps(fields | changes).encode()


def key(queue: str, step: int = 0) -> str:
    return f"{queue}\x06\x16{step}" if step else queue


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

    def drain_until(self, count: int, seconds: float = 10) -> list[Any]:
        """Take what comes until there are `count` messages."""
        deadline = time.monotonic() + seconds
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
def consuming(url: str, *queues: str, transport: str = OURS, prefetch: int = 0, **options: Any) -> Iterator[Consumer]:
    with kombu.Connection(url, transport=transport, transport_options=options) as connection:
        yield Consumer(connection, *queues, prefetch=prefetch)


def in_ci() -> bool:
    return os.environ.get("CI") == "true"
