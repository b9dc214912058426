"""A TCP proxy between a worker and a server, whose connections a test can cut, stall and leave half-open.

Two subclasses change the version that a server reports.
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

#: SO_LINGER with which a close sends RST at once and discards unsent bytes.
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
        self._swallowing: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._stalled = self._closed = False
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def cut(self) -> int:
        """Reset every connection at both ends; new ones are forwarded. Returns how many were open."""
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
        """From now on discard what arrives on the open connections, without closing them, as a router can.

        New ones are forwarded. Returns how many were open.
        """
        with self._lock:
            self._swallowing.update(self._peers)
            return len(self._peers) // 2

    def transform(self, data: bytes) -> bytes:
        """The bytes to forward instead of these, in either direction."""
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
            if data and end not in self._swallowing:
                self._peers[end].sendall(self.transform(data))
        except OSError:
            data = b""
        if not data:
            self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        if end not in self._peers:
            return
        for each in (end, self._peers[end]):
            del self._peers[each]
            self._swallowing.discard(each)
            self._selector.unregister(each)
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            each.close()


class OldPostgreSQL(Proxy):
    """Makes a server report version 14, of which there is no package to test with."""

    def transform(self, data):
        return re.sub(rb"(server_version\0)\d\d", rb"\g<1>14", data)


class OldRedis(Proxy):
    """Makes a server report version 6, of which there is no package to test with."""

    def transform(self, data):
        return re.sub(rb"(\nredis_version:)\d", rb"\g<1>6", data)
