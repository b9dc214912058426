"""The wire contract between producers and workers: task names, headers, limits, and the text of a Celery message."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from json import dumps
from json.encoder import encode_basestring_ascii as quoted
from typing import Final

ACCRUE: Final = "tokens.accrue"
BURN: Final = "tokens.burn"
APPLY_MANY: Final = "tokens.apply_many"

#: Task → the type of the one event that its arguments are.
TYPES: Final = {ACCRUE: "accrual", BURN: "burn"}

#: The default queue; lanes are `tokens.0`, `tokens.1`, …
DEFAULT_QUEUE: Final = "tokens"

MAX_EVENTS: Final = 1_000  # of one APPLY_MANY
MAX_AMOUNT: Final = 10**12  # tokens of one event; the default of TOKENTRAIL_MAX_AMOUNT
MAX_BODY_BYTES: Final = 16 * 1024 * 1024  # of a message that a worker reads

#: The header of a message that replays a dead letter: the letter's number.
REPLAY_HEADER: Final = "tokentrail_dead_letter"

# Headers that the transport sets, whatever the producer wrote there.

#: How often the message was restored because its worker's heartbeat had stopped.
RESTORES_HEADER: Final = "tokentrail_restores"

#: How often a worker died while it had this message in flight and no other.
SOLO_DEATHS_HEADER: Final = "tokentrail_deaths"

#: The task name that the transport gives to bytes that are not a message; the body holds those bytes.
UNDECODABLE_TASK: Final = "tokentrail.undecodable"

#: The sentence that says why those bytes are not a message.
UNDECODABLE_REASON_HEADER: Final = "tokentrail_reason"

_MAX_ARGUMENTS_SHOWN: Final = 200  # characters of arguments that Flower shows and searches
_NO_CALLBACKS: Final = '{"callbacks":null,"errbacks":null,"chain":null,"chord":null}'


def celery_message(
    task: str,
    arguments: str,
    *,
    arguments_shown: dict[str, str],
    message_id: str,
    delivery_tag: str,
    queue: str,
    origin: str,
    headers: Mapping[str, str | int],
) -> str:
    """The text of a Celery message, protocol 2, as kombu puts it on a Redis list.

    `arguments` is the JSON object of the keyword arguments; it goes into the body as it is, so that no number
    passes through a float. Flower shows `arguments_shown` instead, and `origin`, the producer's process.
    """
    shown = repr(arguments_shown)
    if len(shown) > _MAX_ARGUMENTS_SHOWN:
        shown = f"{shown[: _MAX_ARGUMENTS_SHOWN - 2]}…}}"
    body = base64.b64encode(f"[[],{arguments},{_NO_CALLBACKS}]".encode()).decode()
    more = "".join(f",{quoted(name)}:{dumps(value)}" for name, value in headers.items())
    # Written by hand: json.dumps of the same dictionary takes twice as long.
    return (
        f'{{"body":"{body}","content-encoding":"utf-8","content-type":"application/json","headers":{{'
        f'"lang":"py","task":"{task}","id":"{message_id}","root_id":"{message_id}","parent_id":null,'
        f'"group":null,"retries":0,"timelimit":[null,null],"eta":null,"expires":null,"ignore_result":true,'
        f'"argsrepr":"()","kwargsrepr":{quoted(shown)},"origin":{quoted(origin)}{more}}},'
        f'"properties":{{"correlation_id":"{message_id}","reply_to":"","delivery_mode":2,'
        f'"delivery_info":{{"exchange":"","routing_key":{quoted(queue)}}},"priority":0,'
        f'"body_encoding":"base64","delivery_tag":"{delivery_tag}"}}}}'
    )
