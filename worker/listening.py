"""An address to listen on, or a sentence why it is not to be had."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What helps, by the reason. The port's setting is not named: the API has one and Flower another.
_ADVICE: Final = {
    errno.EADDRINUSE: "Stop what listens there, or choose another port",
    errno.EACCES: "Choose a port from 1024 on, or let something that may listen there pass it on",
    errno.EADDRNOTAVAIL: "Choose an address that this machine has",
}
_NO_ADDRESS: Final = "Choose an address that this machine has, or a name of it"


class CannotListen(Exception):
    """The address is not to be had; the message says why and what to do."""

    def __init__(self, sentence: str, *, taken: bool = False) -> None:
        super().__init__(sentence)
        self.taken = taken  # by another; the next port may be free


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; of a name's addresses the first.

    Raises CannotListen. It is TCP by name: asyncio switches delays off (TCP_NODELAY) only where it can tell, and
    an answer would else wait 40 ms for the reader's acknowledgement.
    """
    with _told(host, port):
        family, address = _resolved(host, port)
        line = socket.create_server(address, family=family, backlog=2048)
        return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=line.detach())


def claim(host: str, port: int) -> socket.socket:
    """Hold a port that nobody listens on for a child that will; no other claim has it until this one is closed.

    Raises CannotListen. Two that only look would both find it free, and one would take the other's child for its
    own. What is held is the UDP port of that number: TCP's own would be in the child's way.
    """
    with _told(host, port), contextlib.ExitStack() as on_failure:
        family, address = _resolved(host, port)
        held = on_failure.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        held.bind(address)
        listen(host, port).close()
        on_failure.pop_all()
        return held


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address[:2]


@contextlib.contextmanager
def _told(host: str, port: int) -> Iterator[None]:
    """Turn what Python raises for an address into CannotListen."""
    try:
        yield
    except (OSError, OverflowError, UnicodeError) as error:
        # Python adds the address in brackets, which is said already.
        reason = str(error.strerror).partition(" (while")[0] if isinstance(error, OSError) else error
        number = error.errno if isinstance(error, OSError) and not isinstance(error, socket.gaierror) else None
        advice = _ADVICE.get(number or 0, _NO_ADDRESS)
        sentence = f"Cannot listen on port {port} of {host}: {reason}. {advice}."
        raise CannotListen(sentence, taken=number == errno.EADDRINUSE) from None
