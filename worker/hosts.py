"""The host names that API and Flower answer to.

Any web page can let its own name point to this machine (DNS rebinding), and a browser then treats our answers as that
page's own. The Host header has that name, so names that are not ours are refused. IP addresses cannot be redirected.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_HOST: Final = re.compile(r"(?:\[(?P<address>[^\[\]]+)\]|(?P<name>[^:\[\]]+))(?::[0-9]*)?")
#: Characters of a refused name that the answer repeats.
_MAX_QUOTED: Final = 60


class Hosts:
    """The accepted names: IP addresses, localhost, this machine's name, and `names`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {_normalized(name) for name in (socket.gethostname(), *names)}

    def accept(self, host: str) -> bool:
        """Whether to answer a request with this Host header."""
        parts = _HOST.fullmatch(host)
        if parts is None:
            return False
        name = _normalized(parts["address"] or parts["name"])
        if parts["address"] is None and (name in self._names or name == "localhost" or name.endswith(".localhost")):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return (address.version == 6) == (parts["address"] is not None)  # noqa: PLR2004 - IPv6


def refusal(host: str) -> str:
    """The answer to a request for a name that is not accepted."""
    return (
        f"{host[:_MAX_QUOTED]!a} is not a name of this server: use an IP address or localhost, or add the name to its"
        " TOKENTRAIL_ALLOWED_HOSTS."
    )


def _normalized(name: str) -> str:
    return name.lower().removesuffix(".")
