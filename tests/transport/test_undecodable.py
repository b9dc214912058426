"""No content stops the transport: bytes that are not a message are delivered as such, and come back as they were."""

from __future__ import annotations

import base64
import json
from contextlib import ExitStack, suppress

import kombu
import pytest

from schema.messages import UNDECODABLE_REASON_HEADER, UNDECODABLE_TASK
from tests.kit.consumer import OURS, STOCK, consuming
from tests.kit.logs import logged
from tests.kit.messages import message
from tests.kit.wait import eventually

from .broker import Interceptor, listed, of_wrong_type, push, stop_heartbeats

HOSTILE = {
    "not JSON": b"\x00\xff garbage",
    "empty": b"",
    "a number": b"5",
    "an array": b"[1, 2]",
    "null": b"null",
    "invalid UTF-8": b'{"body": "\xff", "properties": {}}',
    "nested beyond reason": b'{"properties": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested beyond cjson": b'{"properties": {}, "body": "", "x": ' + b"[" * 1100 + b"]" * 1100 + b', "headers": 1}',
    "no properties": message(properties=None),
    "properties a number": message(properties=5),
    "properties an array": message(properties=[]),
    "headers null": message(headers=None),
    "headers text": message(headers="x"),
    "delivery_info null": message(properties={"delivery_tag": "x", "delivery_info": None}),
    "delivery_info a number": message(properties={"delivery_tag": "x", "delivery_info": 5}),
    "body an object": message(body={"a": 1}),
    "body not base64": message(body="x", properties={"body_encoding": "base64"}),
    "unknown body encoding": message(properties={"body_encoding": "rot13"}),
    "body encoding a number": message(properties={"body_encoding": 7}),
    "content type a number": message(**{"content-type": 1}),
    "content encoding an array": message(**{"content-encoding": []}),
    "unknown compression": message(headers={"task": "t", "id": "i", "compression": "x"}),
    "lone surrogate": message(body="\ud800"),
    "task an object": message(headers={"task": {}, "id": "i"}),
    "id an array": message(headers={"task": "t", "id": []}),
    "priority infinite": message(properties={"priority": float("inf")}),
    "a type tag that lies": message(headers={"x": {"__type__": "decimal", "__value__": "x"}}),
    "a type tag of no type": message(headers={"x": {"__type__": [], "__value__": "x"}}),
    "an endless number": b'{"properties": {"x": ' + b"9" * 5000 + b"}}",
}

READABLE = {
    "delivery_tag null": message(properties={"delivery_tag": None}),
    "delivery_tag true": message(properties={"delivery_tag": True}),
    "delivery_tag an object": message(properties={"delivery_tag": {}}),
    "delivery_tag a number": message(properties={"delivery_tag": 5}),
    "no delivery_tag": message(properties={}),
    "no body": message(body=None),
    "priority text": message(properties={"priority": "high"}),
    "an id that is a UUID": message(headers={"task": "t", "id": {"__type__": "uuid", "__value__": {"hex": "0" * 32}}}),
}


def assert_undecodable(got):
    """That these messages are the HOSTILE ones, each delivered in an envelope with a reason."""
    for (name, raw), each in zip(HOSTILE.items(), got, strict=True):
        assert each.headers["task"] == UNDECODABLE_TASK, name
        assert each.headers[UNDECODABLE_REASON_HEADER], name
        assert each.body == raw, name
        assert not each.errors, name


def assert_back(broker):
    """That the list holds the HOSTILE bytes. Large ones keep their envelope: unpacking it would block Redis."""
    for (name, raw), back in zip(HOSTILE.items(), listed(broker), strict=True):
        assert back == raw or (len(raw) > 40_000 and json.loads(back)["body"] == base64.b64encode(raw).decode()), name


def test_bytes_that_are_not_a_message_are_delivered_in_an_envelope_and_requeued_without(broker_url, broker):
    for raw in HOSTILE.values():
        push(broker, message(1), raw)
    with consuming(broker_url) as consumer:
        consumer.drain_until(2 * len(HOSTILE))
        assert [got.headers["number"] for got in consumer.messages[::2]] == [1] * len(HOSTILE)
        assert_undecodable(consumer.messages[1::2])
        assert broker.hlen("unacked") == 2 * len(HOSTILE)
        for got in consumer.messages[::2]:
            got.ack()
    assert_back(broker)


@pytest.mark.parametrize("raw", READABLE.values(), ids=READABLE.keys())
def test_odd_properties_are_no_reason_not_to_deliver_a_message(broker_url, broker, raw):
    push(broker, raw)
    with consuming(broker_url) as consumer:
        (got,) = consumer.drain_until(1)
        assert got.headers["task"] != UNDECODABLE_TASK
        assert broker.hexists("unacked", got.delivery_tag)
        got.ack()
        consumer.turn()
    assert broker.keys("*") == []


def test_the_same_undecodable_bytes_have_the_same_task_id(broker_url, broker):
    push(broker, b"garbage", b"garbage", b"other")
    with consuming(broker_url) as consumer:
        first, second, third = consumer.drain_until(3)
        assert first.headers["id"] == second.headers["id"] != third.headers["id"]


def test_undecodable_messages_are_restored_as_they_were(broker_url, broker):
    push(broker, *HOSTILE.values())
    with consuming(broker_url) as consumer:
        consumer.drain_until(len(HOSTILE))
        consumer.abandon()
    stop_heartbeats(broker)
    with consuming(broker_url, visibility_timeout=10) as consumer:
        consumer.channel.pause()
        consumer.channel.qos.restore_visible()
        assert_back(broker)
        consumer.channel.resume()
        assert_undecodable(consumer.drain_until(len(HOSTILE)))


def test_undecodable_messages_survive_a_restore_by_kombus_own_transport(broker_url, broker):
    push(broker, *HOSTILE.values())
    with consuming(broker_url) as consumer:
        consumer.drain_until(len(HOSTILE))
        consumer.abandon()
    stop_heartbeats(broker)
    with kombu.Connection(broker_url, transport=STOCK, transport_options={"visibility_timeout": 10}) as connection:
        connection.default_channel.qos.restore_visible(num=None)
    assert (broker.llen("tokens"), broker.hlen("unacked")) == (len(HOSTILE), 0)
    with consuming(broker_url) as consumer:
        assert_undecodable(consumer.drain_until(len(HOSTILE)))


def test_a_queue_without_acknowledgements_drops_undecodable_bytes_with_a_warning(broker_url, broker, caplog):
    push(broker, b"garbage", message(1))
    with kombu.Connection(broker_url, transport=OURS) as connection:
        first, second = (connection.default_channel.basic_get("tokens", no_ack=True) for _ in range(2))
    assert first is None
    assert second.headers["number"] == 1
    assert logged(caplog.messages, "Dropped undecodable bytes from …, a queue without acknowledgements: …")


def test_an_undecodable_message_is_delivered_even_if_redis_does_not_record_its_envelope(broker_url, broker, caplog):
    push(broker, b"garbage")
    with ExitStack() as stack:
        refuse = lambda: stack.enter_context(of_wrong_type(broker, "unacked"))  # noqa: E731
        with Interceptor(broker_url, b"garbage", refuse) as proxy, consuming(proxy.url) as consumer:
            (got,) = consumer.drain_until(1)
            assert got.body == b"garbage"
            event = "Could not record an undecodable message in the form that kombu can restore: …."
            assert logged(caplog.messages, event)
            stack.close()
            got.ack()
            consumer.turn()
            assert broker.keys("unacked*") == []


# Broadcasts


@pytest.mark.parametrize(
    ("published", "event"),
    [
        (b'{"__type__": "decimal", "__value__": "x"}', "Dropped a broadcast that is not JSON: …"),
        (b'{"no": "message"}', "Dropped a broadcast that is not a message: …"),
    ],
)
def test_a_broadcast_that_is_not_a_message_is_dropped_with_a_warning(broker_url, broker, caplog, published, event):
    with kombu.Connection(broker_url, transport=OURS) as connection:
        news = kombu.Exchange("news", type="fanout")
        got = []
        channel = connection.channel()
        with kombu.Consumer(channel, [kombu.Queue("mine", news)], callbacks=[lambda body, _: got.append(body)]):

            def drained():
                with suppress(TimeoutError):
                    connection.drain_events(timeout=0.2)

            eventually(lambda: drained() or broker.pubsub_numpat())
            broker.publish(f"/{connection.virtual_host}.news", published)
            kombu.Producer(channel, exchange=news, serializer="json").publish("next")
            eventually(lambda: drained() or got)
    assert got == ["next"]
    assert logged(caplog.messages, event)
