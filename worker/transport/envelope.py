"""What lies on the list: bytes that should be a kombu message, and what becomes of those that are none.

Used by `transport.py`. Whoever can write to Redis can write anything, so nothing here trusts the bytes: they become a
message that neither kombu nor Celery can choke on, nor kombu's own transport, which may have to restore it; or else an
envelope around the bytes, under the task name `UNDECODABLE_TASK`, that the worker turns into a dead letter.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any
from uuid import UUID, uuid5

from kombu.utils.json import loads

from schema.messages import UNDECODABLE_REASON_HEADER, UNDECODABLE_TASK
from schema.text import ascii_line

#: What an undecodable's envelope begins with; `put_back.lua` knows it by this.
ENVELOPE_START = f'{{"headers":{{"task":"{UNDECODABLE_TASK}"'

#: Bytes of a message with its headers. A body of 16 MiB fits, in base64 or with every letter escaped; and its escapes
#: may grow sixfold on their way into a dead letter, which has to stay below PostgreSQL's 1 GiB.
MOST_BYTES = 128 * 1024 * 1024

_NAMESPACE = UUID("5f0b6a52-97f4-4b36-9a0e-6d2c1f3f3f7e")


class NotAMessage(Exception):
    """The bytes are not a message that can be delivered; the text says why."""


def parse(raw: bytes, queue: str) -> dict[str, Any]:
    """The message in `raw`, checked so far that building and restoring it cannot fail for its shape.

    Raises NotAMessage.
    """
    if len(raw) > MOST_BYTES:
        raise NotAMessage(f"it is {len(raw)} bytes long with its headers: at most {MOST_BYTES} are read")
    try:
        payload = loads(raw)
    except Exception as error:  # noqa: BLE001 - kombu's `__type__` tags run constructors on content: any exception is possible
        raise NotAMessage(f"not readable as JSON: {type(error).__name__}: {ascii_line(str(error), 200)}") from None
    if not isinstance(payload, dict):
        raise NotAMessage(f"a message is a JSON object, this is {_kind(payload)}")
    properties = _object(payload, "properties", "the message")
    _object(properties, "delivery_info", "properties", {"exchange": "", "routing_key": queue})
    headers = _object(payload, "headers", "the message", {})
    for name in ("content-type", "content-encoding", "body"):
        _text(payload, name, "the message")
    for name in ("task", "id"):
        if not isinstance(headers.get(name), str | UUID | None):
            raise NotAMessage(f"{name} in headers is {_kind(headers[name])}, not text")
    if headers.get("compression"):
        # kombu unpacks while it builds the message, and all of it: a megabyte may be a gigabyte then.
        raise NotAMessage("its body is compressed, send it plain")
    priority = properties.get("priority")
    if isinstance(priority, float) and not math.isfinite(priority):
        raise NotAMessage("priority in properties is not a finite number")
    return payload


def undecodable(raw: bytes, queue: str, reason: str) -> dict[str, Any]:
    """An envelope around `raw`: a message for `UNDECODABLE_TASK` whose body is `raw`.

    Its id depends on the bytes alone: the same bytes delivered again are the same dead letter.
    """
    identity = str(uuid5(_NAMESPACE, base64.b64encode(raw).decode()))
    return {
        "headers": {  # first, and the task first in it, see ENVELOPE_START
            "task": UNDECODABLE_TASK,
            "id": identity,
            "root_id": identity,
            "lang": "py",
            "retries": 0,
            "argsrepr": repr(raw[:200]),
            "kwargsrepr": "{}",
            UNDECODABLE_REASON_HEADER: reason,
        },
        "properties": {
            "correlation_id": identity,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": identity,
        },
        "content-type": "application/octet-stream",
        "content-encoding": "binary",
        "body": base64.b64encode(raw).decode(),  # last, see put_back.lua
    }


def text_of(payload: dict[str, Any]) -> str:
    """The envelope as it is recorded in Redis: compact, in the order in which it was made."""
    return json.dumps(payload, separators=(",", ":"))


def _object(holder: dict[str, Any], name: str, where: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None:
        holder.setdefault(name, default)
    value = holder.get(name)
    if not isinstance(value, dict):
        raise NotAMessage(f"{name} in {where} is {_kind(value)}, not an object")
    return value


def _text(holder: dict[str, Any], name: str, where: str) -> None:
    if not isinstance(holder.get(name), str | None):
        raise NotAMessage(f"{name} in {where} is {_kind(holder[name])}, not text")


def _kind(value: object) -> str:
    return "missing or null" if value is None else f"of type {type(value).__name__}"
