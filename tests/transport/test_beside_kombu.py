"""The same queue with kombu's own transport, and what else a program gets from a kombu transport."""

from __future__ import annotations

import threading
from contextlib import suppress

import kombu
import kombu.pidbox
import pytest

from schema.messages import RESTORES_HEADER
from tests.kit.consumer import OURS, STOCK, consuming
from tests.kit.messages import PRIORITY_STEPS, key, message
from tests.kit.wait import eventually
from worker.transport import register
from worker.transport.channel import SentinelTransport, Transport

from .broker import push, stop_heartbeats


def test_kombu_restores_messages_that_ours_fetched(broker_url, broker):
    push(broker, message(1), message(2))
    push(broker, message(3), to=key("tokens", 3))
    with consuming(broker_url) as consumer:
        consumer.drain_until(3)
        consumer.abandon()
    stop_heartbeats(broker)
    with consuming(broker_url, transport=STOCK, visibility_timeout=10) as consumer:
        consumer.channel.qos.restore_visible()
        consumer.drain_until(3)
        assert sorted(consumer.numbers) == [1, 2, 3]


@pytest.mark.parametrize("exchange", ["", "events"])
def test_ours_restores_messages_that_kombu_fetched(broker_url, broker, exchange):
    with kombu.Connection(broker_url, transport=STOCK) as connection:
        producer = connection.Producer()
        queue = kombu.Queue("tokens", kombu.Exchange(exchange, type="direct"), routing_key="tokens")
        declare = [queue] if exchange else []
        producer.publish({}, exchange=exchange, routing_key="tokens", declare=declare, headers={"number": 'ü"]'})
    with consuming(broker_url, transport=STOCK) as consumer:
        consumer.drain_until(1)
        consumer.abandon()
    stop_heartbeats(broker)
    with consuming(broker_url, visibility_timeout=10) as consumer:
        consumer.channel.qos.restore_visible()
        (got,) = consumer.drain_until(1)
        assert got.headers["number"] == 'ü"]'
        assert got.headers[RESTORES_HEADER] == 1


def test_ours_and_kombus_share_a_queue_and_nothing_is_lost_or_doubled(broker_url, broker):
    push(broker, *map(message, range(200)))
    with consuming(broker_url, prefetch=10) as ours, consuming(broker_url, transport=STOCK, prefetch=10) as stock:
        while broker.llen("tokens") or broker.hlen("unacked"):
            for consumer in (ours, stock):
                for got in consumer.drain(0.01):
                    if not got.acknowledged:
                        got.ack()
        assert sorted(ours.numbers + stock.numbers) == list(range(200))
        assert ours.numbers
        assert stock.numbers


def test_a_global_key_prefix_is_on_every_key(broker_url, broker):
    with kombu.Connection(broker_url, transport=STOCK, transport_options={"global_keyprefix": "p:"}) as connection:
        for number in range(3):
            connection.Producer().publish({}, routing_key="tokens", headers={"number": number})
    options = {"global_keyprefix": "p:", "visibility_timeout": 10}
    with consuming(broker_url, **options) as consumer:
        consumer.drain_until(3)[0].ack()
        consumer.turn()
        assert sorted(broker.keys("*")) == [b"p:unacked", b"p:unacked_index"]
        consumer.abandon()
    for tag, _ in broker.zrange("p:unacked_index", 0, -1, withscores=True):
        broker.zadd("p:unacked_index", {tag: 1})
    with consuming(broker_url, **options) as consumer:
        consumer.channel.qos.restore_visible()
        consumer.drain_until(2)
        assert consumer.numbers == [1, 2]
        assert all(name.startswith(b"p:") for name in broker.keys("*"))


# As any kombu transport


def test_get_records_the_message_it_takes(broker_url, broker):
    push(broker, message(9), to=key("tokens", 9))
    push(broker, message(0))
    with kombu.Connection(broker_url, transport=OURS) as connection:
        channel = connection.default_channel
        first, second = channel.basic_get("tokens"), channel.basic_get("tokens")
        assert [first.headers["number"], second.headers["number"]] == [0, 9]
        assert broker.hlen("unacked") == 2
        assert channel.basic_get("tokens") is None
        first.ack()
        channel.flush_pending()
        assert broker.hkeys("unacked") == [second.delivery_tag.encode()]


def test_size_and_purge_see_every_priority(broker_url, broker):
    for step in PRIORITY_STEPS:
        push(broker, message(step), to=key("tokens", step))
    with kombu.Connection(broker_url, transport=OURS) as connection:
        channel = connection.default_channel
        assert channel.queue_declare("tokens", passive=True).message_count == 4
        assert channel.queue_purge("tokens") == 4
        assert broker.keys("tokens*") == []


def test_remote_control_commands_are_answered(broker_url, broker):
    """As `celery inspect ping` sends them: a broadcast, whose answer goes to a queue of the client."""
    mailbox = kombu.pidbox.Mailbox("control", type="fanout")
    answered = threading.Event()

    def work():
        with kombu.Connection(broker_url, transport=OURS) as connection:
            node = mailbox(connection).Node(
                "one@host", channel=connection.channel(), handlers={"ping": lambda _state, **_: "pong"}
            )
            with node.listen():
                while not answered.is_set():
                    with suppress(TimeoutError):
                        connection.drain_events(timeout=0.2)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        eventually(broker.pubsub_numpat, "the worker listens")
        with kombu.Connection(broker_url, transport=STOCK) as client:
            assert mailbox(client).multi_call("ping", timeout=60, limit=1) == [{"one@host": "pong"}]
    finally:
        answered.set()
        worker.join()


def test_urls_stay_the_same(own_aliases, broker_url):
    assert not isinstance(kombu.Connection(broker_url).transport, Transport)
    register()
    assert type(kombu.Connection(broker_url).transport) is Transport
    assert type(kombu.Connection("rediss://localhost").transport) is Transport
    assert type(kombu.Connection("sentinel://localhost").transport) is SentinelTransport
