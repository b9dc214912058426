"""Waking the event loop from another thread."""

from __future__ import annotations

import socket
from contextlib import suppress


class Wakeup:
    """The self-pipe trick: a thread writes a byte into a socket that the event loop watches, and so ends its wait."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        """What the event loop watches for reading."""
        return self._receiver.fileno()

    def send(self) -> None:
        """Wake the event loop; any thread may call it."""
        with suppress(OSError):  # full of bytes that wake the event loop already; or closed, as the event loop is
            self._sender.send(b"!")

    def clear(self) -> None:
        """Forget all wake-ups so far. Call it before looking for work: a later wake-up must not be lost."""
        with suppress(BlockingIOError):
            self._receiver.recv(4096)

    def close(self) -> None:
        """Close both sockets."""
        self._receiver.close()
        self._sender.close()
