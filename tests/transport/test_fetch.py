"""How messages leave their lists: recorded in the same step, in order, within limits, and not while paused."""

from __future__ import annotations

import json
import time

import kombu
import pytest

from schema.messages import RESTORES_HEADER
from tests.kit.consumer import OURS, consuming, queue_of
from tests.kit.messages import PRIORITY_STEPS, key, message
from tests.kit.wait import eventually

from .broker import Interceptor, listed, push, stop_fetching


def test_a_message_is_recorded_before_its_consumer_gets_it(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as consumer:
        (got,) = consumer.drain_until(1)
        assert broker.llen("tokens") == 0
        assert broker.hkeys("unacked") == [got.delivery_tag.encode()]
        assert broker.zscore("unacked_index", got.delivery_tag) == pytest.approx(time.time(), abs=60)


def test_messages_come_in_the_order_they_were_pushed(broker_url, broker):
    push(broker, *map(message, range(1200)))
    with consuming(broker_url) as consumer:
        tags = [got.delivery_tag for got in consumer.drain_until(1200)]
        assert consumer.numbers == list(range(1200))
        assert [tag.decode() for tag in broker.zrange("unacked_index", 0, -1)] == tags


@pytest.mark.parametrize("step", PRIORITY_STEPS)
def test_every_priority_of_every_queue_is_consumed(broker_url, broker, step):
    with consuming(broker_url, "tokens", "tokens.0", "tokens.1") as consumer:
        consumer.drain(0.05)
        for number, queue in enumerate(("tokens.1", "tokens", "tokens.0")):
            push(broker, message(number, queue), to=key(queue, step))
            consumer.drain_until(number + 1)
        assert consumer.numbers == [0, 1, 2]


def test_lower_steps_are_served_first(broker_url, broker):
    for step in reversed(PRIORITY_STEPS):
        push(broker, message(step), to=key("tokens", step))
    with consuming(broker_url) as consumer:
        consumer.drain_until(4)
        assert consumer.numbers == [0, 3, 6, 9]


def test_no_queue_starves_another(broker_url, broker):
    for queue in ("a", "b", "c"):
        push(broker, *[message(number, queue) for number in range(100)], to=queue)
    with consuming(broker_url, "a", "b", "c", prefetch=10) as consumer:
        for rounds in range(1, 10):
            consumer.drain_until(rounds * 10)
            for got in consumer.messages[-10:]:
                got.ack()
        served = [got.delivery_info["routing_key"] for got in consumer.messages]
        assert {queue: served.count(queue) for queue in "abc"} == {"a": 30, "b": 30, "c": 30}


def test_a_fetch_takes_no_more_than_prefetch_allows(broker_url, broker):
    push(broker, *map(message, range(50)))
    with consuming(broker_url, prefetch=7) as consumer:
        consumer.drain_until(7)
        assert len(consumer.drain()) == 7
        assert broker.llen("tokens") == 43
        for got in consumer.messages[:3]:
            got.ack()
        consumer.drain_until(10)
        assert len(consumer.drain()) == 10


def test_a_fetch_is_limited_in_messages(broker_url, broker):
    push(broker, *map(message, range(50)))
    with consuming(broker_url, fetch_count=20) as consumer:
        consumer.fetch()
        assert len(consumer.messages) == 20


def test_a_fetch_is_limited_in_bytes_but_takes_at_least_one_message(broker_url, broker):
    push(broker, *[message(number, body="x" * 100_000) for number in range(5)])
    with consuming(broker_url, fetch_bytes=250_000) as consumer:
        consumer.fetch()
        assert consumer.numbers == [0, 1]
    with consuming(broker_url, fetch_bytes=1) as consumer:
        consumer.fetch()
        assert consumer.numbers == [0]
        consumer.drain_until(5)


def test_a_wait_for_messages_changes_no_list(broker_url, broker):
    with consuming(broker_url, prefetch=1) as consumer:
        consumer.drain(0.1)
        push(broker, *map(message, range(3)))
        consumer.drain_until(1)
        before = listed(broker)
        consumer.drain(0.2)
        assert listed(broker) == before
        assert [json.loads(raw)["headers"]["number"] for raw in before] == [1, 2]


def test_messages_with_the_same_delivery_tag_are_different_messages(broker_url, broker):
    same = {"delivery_tag": "T", "delivery_info": {"exchange": "", "routing_key": "tokens"}}
    originals = [message(number, properties=same) for number in range(3)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:
        tags = {got.delivery_tag for got in consumer.drain_until(3)}
        assert len(tags) == 3 == broker.hlen("unacked") == broker.zcard("unacked_index")
        consumer.messages[1].ack()
        consumer.turn()
    assert listed(broker) == [originals[0], originals[2]]


def test_messages_in_a_lost_reply_are_delivered_again_at_once_and_uncounted(broker_url, broker):
    def lose():
        raise OSError

    with Interceptor(broker_url, b"fetched", lose) as proxy:
        with consuming(proxy.url, visibility_timeout=1000) as consumer:
            consumer.turn()
            broker.lpush("tokens", *[message(number, body="fetched") for number in range(5)])
            with pytest.raises(consumer.connection.connection_errors):
                consumer.drain_until(5)
            assert broker.hlen("unacked") == 5, "Redis has recorded what the consumer never saw"
        with consuming(proxy.url, visibility_timeout=1000) as consumer:
            consumer.drain_until(5)
            assert consumer.numbers == [0, 1, 2, 3, 4]
            assert all(RESTORES_HEADER not in got.headers for got in consumer.messages)


def test_messages_without_acknowledgement_are_not_recorded(broker_url, broker):
    push(broker, message(1))
    with kombu.Connection(broker_url, transport=OURS) as connection:
        got = []
        with kombu.Consumer(connection.channel(), [queue_of("tokens")], on_message=got.append, no_ack=True):
            eventually(lambda: connection.drain_events(timeout=5) or got)
        assert broker.keys("unacked*") == []


# Pause


def test_a_paused_channel_takes_nothing_until_it_resumes(broker_url, broker):
    with consuming(broker_url) as consumer:
        consumer.drain(0.1)  # a wait is sent, and a fetch behind it
        consumer.channel.pause()
        push(broker, *map(message, range(3)))
        stop_fetching(consumer)
        consumer.drain(0.3)
        assert consumer.messages == []
        assert broker.llen("tokens") == 3
        assert broker.hlen("unacked") == 0
        consumer.channel.resume()
        consumer.drain_until(3)
        assert consumer.numbers == [0, 1, 2]


@pytest.mark.parametrize("requeue", [True, False])
def test_messages_under_way_to_a_paused_channel_are_requeued_or_delivered(broker_url, broker, requeue):
    originals = [message(number) for number in range(400)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:

        def pause(got):
            consumer.messages.append(got)
            consumer.channel.pause(requeue_fetched=requeue)

        consumer.consumer.on_message = pause
        consumer.drain_until(1 if requeue else 400)
        push(broker, message(400))
        consumer.drain(0.3)
        assert consumer.numbers == ([0] if requeue else [*range(400)])
        assert listed(broker)[:-1] == (originals[1:] if requeue else [])


def test_a_paused_channel_still_acknowledges_and_sends_heartbeats(broker_url, broker):
    push(broker, message(1), message(2))
    with consuming(broker_url, visibility_timeout=1000) as consumer:
        first, second = consumer.drain_until(2)
        consumer.channel.pause()
        first.ack()
        score = broker.zscore("unacked_index", second.delivery_tag)
        consumer.channel.qos.heartbeat_due = 0
        eventually(lambda: consumer.turn() or broker.zscore("unacked_index", second.delivery_tag) > score)
        assert broker.hkeys("unacked") == [second.delivery_tag.encode()]
