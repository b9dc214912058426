"""Messages as they lie on Redis lists, written by a producer that is not Celery."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

PRIORITY_STEPS = (0, 3, 6, 9)


def message(number: int = 0, queue: str = "tokens", **changes: Any) -> bytes:
    """What a producer that is not Celery would push."""
    fields = {
        "body": json.dumps([[], {"number": number}, {}]),
        "headers": {"task": "tokens.burn", "id": str(uuid4()), "number": number},
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
        },
    }
    return json.dumps(fields | changes).encode()


def key(queue: str, step: int = 0) -> str:
    return f"{queue}\x06\x16{step}" if step else queue
