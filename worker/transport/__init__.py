"""A kombu transport for Redis that loses no message. It knows nothing of tokens. Read in this order:

channel.py   kombu's channel and transport, with the parts below
fetcher.py   how messages leave Redis
qos.py       messages in flight: prefetch, acknowledgements, requeues, heartbeats, restores
pending.py   operations that Redis has not been sent yet
poller.py    when channels fetch, poll and send heartbeats
envelope.py  parses the bytes on a list as a message
scripts.py   runs the Lua scripts
lua/         what happens inside Redis in one step
"""

from importlib import import_module
from typing import Any

transports: Any = import_module("kombu.transport")


def register() -> None:
    """Make redis://, rediss:// and sentinel:// mean the transport of this package, in this process."""
    for scheme, name in (("redis", "Transport"), ("rediss", "Transport"), ("sentinel", "SentinelTransport")):
        transports.TRANSPORT_ALIASES[scheme] = f"{__name__}.channel:{name}"
        transports._transport_cache.pop(scheme, None)  # noqa: SLF001 - kombu caches what an alias meant before
