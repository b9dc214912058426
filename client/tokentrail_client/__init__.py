"""How a Python producer sends events to tokentrail.

    with Publisher("redis://localhost:6379/0") as tokens:
        tokens.publish(Burn(user_id="alice", amount="0.000777", action="embedding", idempotency_key="request-1"))

events.py has the rules of an event, publisher.py the guarantees of publishing.
"""

# The modules beside this one come from schema/ when the wheel is built: pyproject.toml names them.
from .canonical import read_json
from .events import Accrual, Burn, Event, InvalidEvent, event_json, parse_event
from .publisher import Publisher, PublishError, bulks

__all__ = [
    "Accrual",
    "Burn",
    "Event",
    "InvalidEvent",
    "PublishError",
    "Publisher",
    "bulks",
    "event_json",
    "parse_event",
    "read_json",
]
