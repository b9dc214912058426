"""schema/messages.py: the bytes on the wire, which old and new producers and workers share."""

from __future__ import annotations

import base64

from schema.events import Accrual, event_json
from schema.messages import ACCRUE, celery_message

ARGUMENTS = (
    '{"amount":"12.5","idempotency_key":"order-1","occurred_at":"2026-01-31T12:00:00Z","source":"shop",'
    '"user_id":"alice","metadata":{"a":0.10}}'
)
BODY = base64.b64encode(
    f'[[],{ARGUMENTS},{{"callbacks":null,"errbacks":null,"chain":null,"chord":null}}]'.encode()
).decode()
MESSAGE = (
    f'{{"body":"{BODY}","content-encoding":"utf-8","content-type":"application/json","headers":{{"lang":"py",'
    '"task":"tokens.accrue","id":"1","root_id":"1","parent_id":null,"group":null,"retries":0,"timelimit":[null,null],'
    '"eta":null,"expires":null,"ignore_result":true,"argsrepr":"()","kwargsrepr":"{\'user_id\': \'\\u00e9\'}",'
    '"origin":"7@host","tokentrail_dead_letter":3},"properties":{"correlation_id":"1","reply_to":"","delivery_mode":2,'
    '"delivery_info":{"exchange":"","routing_key":"tokens"},"priority":0,"body_encoding":"base64","delivery_tag":"2"}}'
)


def test_a_message_is_these_bytes():
    text = celery_message(
        ACCRUE,
        ARGUMENTS,
        arguments_shown={"user_id": "é"},
        message_id="1",
        delivery_tag="2",
        queue="tokens",
        origin="7@host",
        headers={"tokentrail_dead_letter": 3},
    )
    assert text == MESSAGE


def test_an_events_arguments_are_its_json_without_the_type():
    event = Accrual(
        user_id="alice",
        amount="12.5",
        idempotency_key="order-1",
        source="shop",
        occurred_at="2026-01-31T12:00:00Z",
        metadata={"a": 1},
    )
    assert event_json(event, with_type=False) == ARGUMENTS.replace("0.10", "1")
    assert event_json(event) == ARGUMENTS.replace("0.10", "1").replace('"user_id"', '"type":"accrual","user_id"')
