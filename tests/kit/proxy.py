"""A TCP proxy between a worker and a server, whose connections a test can cut, stall and leave half-open.

Two more make a server say of itself that it is old.
"""

from __future__ import annotations

import re
import selectors
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

#: Closing with this sends RST at once, and throws away what was on its way.
ABORT = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards from a port of its own to the server of `target`; `url` is the same address through the proxy."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._server = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        user = parts.netloc.rpartition("@")[0]
        self.url = parts._replace(netloc=f"{user}@127.0.0.1:{self._listener.getsockname()[1]}").geturl()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._deaf: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._stalled = self._closed = False
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def cut(self) -> int:
        """Reset every connection at both ends; new ones are forwarded. Returns how many there were."""
        with self._lock:
            pairs = len(self._peers) // 2
            for end in list(self._peers):
                self._drop(end)
        return pairs

    def stall(self) -> None:
        """Forward nothing until `flow`; connections are neither closed nor refused."""
        self._stalled = True

    def flow(self) -> None:
        """Forward again, beginning with what was held back."""
        self._stalled = False

    def half_open(self) -> int:
        """From now on swallow what comes on the connections there are, and never close them, as when a router forgets
        them; new ones are forwarded. Returns how many there were.
        """
        with self._lock:
            self._deaf.update(self._peers)
            return len(self._peers) // 2

    def passed(self, data: bytes) -> bytes:
        """What becomes of bytes on their way, in either direction."""
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._thread.join(10)
        self.cut()
        self._selector.close()
        self._listener.close()

    def _run(self) -> None:
        while not self._closed:
            if self._stalled:
                time.sleep(0.02)
                continue
            for key, _ in self._selector.select(0.05):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._peers:
                        self._forward(key.fileobj)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._server, timeout=5)
        except OSError:
            client.close()
            return
        for end, peer in ((client, server), (server, client)):
            end.settimeout(5)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers[end] = peer
            self._selector.register(end, selectors.EVENT_READ)

    def _forward(self, end: socket.socket) -> None:
        try:
            data = end.recv(1 << 16)
            if data and end not in self._deaf:
                self._peers[end].sendall(self.passed(data))
        except OSError:
            data = b""
        if not data:
            self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        if end not in self._peers:
            return
        for each in (end, self._peers[end]):
            del self._peers[each]
            self._deaf.discard(each)
            self._selector.unregister(each)
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            each.close()


class OldPostgreSQL(Proxy):
    """A server that says of itself that it is of 2021: no package of the machine brings one."""

    def passed(self, data):
        return re.sub(rb"(server_version\0)\d\d", rb"\g<1>14", data)


class OldRedis(Proxy):
    """A server that says of itself that it is of 2020: no package of the machine brings one."""

    def passed(self, data):
        return re.sub(rb"(\nredis_version:)\d", rb"\g<1>6", data)
