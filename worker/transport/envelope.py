"""Parses the bytes on a list as a kombu message, and wraps those that are not one.

Any client can write anything to Redis, so nothing here trusts the bytes. `parse` returns only what neither kombu nor
Celery fails on, nor kombu's own transport, which may have to restore it. All other bytes go into an envelope: a message
for the task `UNDECODABLE_TASK` with the bytes as its body, which the worker stores as a dead letter.
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

#: The beginning of every envelope; return_to_list.lua recognizes an envelope by it.
ENVELOPE_START = f'{{"headers":{{"task":"{UNDECODABLE_TASK}"'

#: Of a message with its headers. A body of 16 MiB fits, in base64 or with every letter escaped. Escapes may grow
#: sixfold on their way into a dead letter, which has to stay below PostgreSQL's limit of 1 GiB.
MAX_MESSAGE_BYTES = 128 * 1024 * 1024

_NAMESPACE = UUID("5f0b6a52-97f4-4b36-9a0e-6d2c1f3f3f7e")


class UndecodableError(Exception):
    """The bytes are not a message that can be delivered; the text says why."""


def parse(raw: bytes, queue: str) -> dict[str, Any]:
    """Parse `raw` and check every part whose type kombu or Celery rely on. Raises UndecodableError."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise UndecodableError(f"it is {len(raw)} bytes long with its headers: at most {MAX_MESSAGE_BYTES} are read")
    try:
        payload = loads(raw)
    except Exception as error:  # noqa: BLE001 - kombu's `__type__` tags run constructors on content, which raise anything
        raise UndecodableError(f"not readable as JSON: {type(error).__name__}: {ascii_line(str(error), 200)}") from None
    if not isinstance(payload, dict):
        raise UndecodableError(f"a message is a JSON object, this is {_kind(payload)}")
    properties = _object(payload, "properties", "the message")
    _object(properties, "delivery_info", "properties", {"exchange": "", "routing_key": queue})
    headers = _object(payload, "headers", "the message", {})
    for name in ("content-type", "content-encoding", "body"):
        _text(payload, name, "the message")
    for name in ("task", "id"):
        if not isinstance(headers.get(name), str | UUID | None):
            raise UndecodableError(f"{name} in headers is {_kind(headers[name])}, not text")
    if headers.get("compression"):
        # kombu decompresses the whole body while it builds the message: a megabyte may become a gigabyte.
        raise UndecodableError("its body is compressed, send it plain")
    priority = properties.get("priority")
    if isinstance(priority, float) and not math.isfinite(priority):
        raise UndecodableError("priority in properties is not a finite number")
    return payload


def undecodable(raw: bytes, queue: str, reason: str) -> dict[str, Any]:
    """Wrap `raw` in an envelope. Its id depends on the bytes alone: delivered again, they are the same dead letter."""
    identity = str(uuid5(_NAMESPACE, base64.b64encode(raw).decode()))
    return {
        "headers": {  # comes first, and the task first in it, see ENVELOPE_START
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
        "body": base64.b64encode(raw).decode(),  # comes last, see return_to_list.lua
    }


def to_json(payload: dict[str, Any]) -> str:
    """The envelope as it is recorded in Redis: compact, its members in the order in which `undecodable` writes them."""
    return json.dumps(payload, separators=(",", ":"))


def _object(holder: dict[str, Any], name: str, where: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None:
        holder.setdefault(name, default)
    value = holder.get(name)
    if not isinstance(value, dict):
        raise UndecodableError(f"{name} in {where} is {_kind(value)}, not an object")
    return value


def _text(holder: dict[str, Any], name: str, where: str) -> None:
    if not isinstance(holder.get(name), str | None):
        raise UndecodableError(f"{name} in {where} is {_kind(holder[name])}, not text")


def _kind(value: object) -> str:
    return "missing or null" if value is None else f"of type {type(value).__name__}"
