"""Redis ↔ kombu: messages leave their list and are recorded as unacknowledged in one step. Knows nothing of tokens.

channel.py   kombu's channel and transport, with what follows put in
fetching.py  how messages leave Redis
qos.py       messages in flight: prefetch, acknowledgements, heartbeats, requeueing
pending.py   acknowledgements and requeues that Redis was not told yet
poller.py    when channels are asked
envelope.py  what lies on the list: bytes that should be a kombu message
scripts.py   the Lua scripts, which are in lua/
lua/         what happens inside Redis as one step
"""

from importlib import import_module
from typing import Any

transports: Any = import_module("kombu.transport")


def register() -> None:
    """Make redis://, rediss:// and sentinel:// mean the transport of this package, in this process."""
    for scheme, name in (("redis", "Transport"), ("rediss", "Transport"), ("sentinel", "SentinelTransport")):
        transports.TRANSPORT_ALIASES[scheme] = f"worker.transport.channel:{name}"
        transports._transport_cache.pop(scheme, None)  # noqa: SLF001 - kombu caches what an alias meant before
