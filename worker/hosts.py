"""By which names this machine may be asked over HTTP.

A page whose own name is made to point here (DNS rebinding) is of the same origin as what listens here, for its
reader's browser; what gives it away is that name, in the Host header. An address cannot be pointed elsewhere.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_HOST: Final = re.compile(r"(?:\[(?P<address>[^\[\]]+)\]|(?P<name>[^:\[\]]+))(?::[0-9]*)?")
#: Characters of a wrong name that its refusal repeats.
_SHOWN: Final = 60


class Hosts:
    """The names that are accepted beside addresses and localhost: this machine's own and `more`."""

    def __init__(self, more: Iterable[str]) -> None:
        self._names = {_same(name) for name in (socket.gethostname(), *more)}

    def accept(self, host: str) -> bool:
        """Whether a request with this Host header is meant for us."""
        parts = _HOST.fullmatch(host)
        if parts is None:
            return False
        name = _same(parts["address"] or parts["name"])
        if parts["address"] is None and (name in self._names or name == "localhost" or name.endswith(".localhost")):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return (address.version == 6) == (parts["address"] is not None)  # noqa: PLR2004 - of the Internet Protocol


def refusal(host: str) -> str:
    """The sentence for whoever asked by a name that is not accepted."""
    return (
        f"Nothing here is called {host[:_SHOWN]!a}: ask by an IP address or localhost, or add the name to"
        " TOKENTRAIL_ALLOWED_HOSTS here."
    )


def _same(name: str) -> str:
    """One spelling of each name."""
    return name.lower().removesuffix(".")
