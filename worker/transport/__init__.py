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
