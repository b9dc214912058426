"""A listening socket, or one sentence why there is none."""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from worker.errors import TokentrailError

#: Variable with the descriptor of a listening socket that `tokentrail up` passes to the API and Flower. `up` holds the
#: ports, so that no other program can take one and its answers be taken for theirs.
INHERITED: Final = "TOKENTRAIL_LISTEN_FD"


class ListenError(TokentrailError):
    """The address cannot be used; the message says why."""

    def __init__(self, sentence: str, *, taken: bool) -> None:
        super().__init__(sentence)
        self.taken = taken  # another program listens there; the next port may be free


def listen(host: str, port: int) -> socket.socket:
    """Listen on the first address of `host`, or use the socket that `tokentrail up` passes on. Raises ListenError.

    The socket is created as TCP by name: otherwise asyncio does not set TCP_NODELAY, and each response would wait 40 ms
    for the client's acknowledgement.
    """
    if descriptor := os.environ.get(INHERITED):
        return socket.socket(fileno=int(descriptor))
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError, UnicodeError) as error:
        # Python appends the address in brackets, which the sentence has already.
        reason = str(error.strerror).partition(" (while")[0] if isinstance(error, OSError) else error
        raise ListenError(
            f"Cannot listen on port {port} of {host}: {reason}. Choose another host or port.",
            taken=isinstance(error, OSError) and error.errno == errno.EADDRINUSE,
        ) from None
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=server.detach())
