"""Heartbeats, messages whose worker sends none, and how often that happened to a message."""

from __future__ import annotations

import pytest
from kombu.asynchronous import Hub

from schema.messages import RESTORES_HEADER, SOLO_DEATHS_HEADER
from tests.kit.consumer import consuming
from tests.kit.logs import logged
from tests.kit.messages import message
from tests.kit.wait import eventually

from .broker import listed, of_wrong_type, push, stop_fetching, stop_heartbeats

# Heartbeats


def test_a_message_is_restored_once_its_heartbeats_stop_and_not_before(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as alive, consuming(broker_url, "other", visibility_timeout=10) as other:
        alive.drain_until(1)
        stop_fetching(alive)
        stop_heartbeats(broker)
        alive.channel.qos.heartbeat()
        other.channel.qos.restore_visible(interval=1)
        assert (broker.llen("tokens"), broker.hlen("unacked")) == (0, 1)
        stop_heartbeats(broker)
        other.channel.qos.restore_visible(interval=1)
        assert (broker.llen("tokens"), broker.hlen("unacked")) == (1, 0)
        alive.abandon()


@pytest.mark.parametrize("with_loop", [True, False], ids=["in Celery's loop", "without a loop"])
def test_a_consumer_sends_heartbeats_by_itself(broker_url, broker, with_loop):
    push(broker, message(1))
    with consuming(broker_url, visibility_timeout=3, unacked_restore_interval=3600) as consumer:
        tag = consumer.drain_until(1)[0].delivery_tag
        turn = consumer.turn
        if with_loop:
            hub = Hub()
            consumer.connection.register_with_event_loop(hub)
            loop = hub.create_loop()
            turn = lambda: next(loop)  # noqa: E731
        before = broker.zscore("unacked_index", tag)
        eventually(lambda: turn() or broker.zscore("unacked_index", tag) > before)
        if with_loop:
            hub.close()


def test_heartbeats_keep_the_order(broker_url, broker):
    push(broker, *map(message, range(1500)))
    with consuming(broker_url) as consumer:
        tags = [got.delivery_tag for got in consumer.drain_until(1500)]
        stop_heartbeats(broker)
        before = broker.zscore("unacked_index", tags[0])
        consumer.channel.qos.heartbeat()
        assert broker.zscore("unacked_index", tags[0]) > before + 900
        assert [tag.decode() for tag in broker.zrange("unacked_index", 0, -1)] == tags


def test_heartbeats_that_redis_refuses_are_sent_later(broker_url, broker, caplog):
    push(broker, message(1))
    with consuming(broker_url) as consumer:
        tag = consumer.drain_until(1)[0].delivery_tag
        event = "Redis refuses heartbeats or restores; retrying: …"
        with of_wrong_type(broker, "unacked_index"):
            consumer.channel.qos.heartbeat_due = 0
            eventually(lambda: consumer.turn() or logged(caplog.messages, event))
            assert "WRONGTYPE" in logged(caplog.messages, event)[0][0]
        before = broker.zscore("unacked_index", tag)
        eventually(lambda: consumer.turn() or broker.zscore("unacked_index", tag) > before)


def test_a_late_heartbeat_brings_nothing_back(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as late:
        late.drain_until(1)
        stop_fetching(late)
        stop_heartbeats(broker)
        with consuming(broker_url, "other", visibility_timeout=10) as consumer:
            consumer.channel.qos.restore_visible()
        late.channel.qos.heartbeat()
        assert broker.zcard("unacked_index") == 0
        late.abandon()


# Restore


def test_messages_are_restored_in_their_old_order_with_a_warning(broker_url, broker, caplog):
    originals = [message(number) for number in range(1200)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:
        consumer.drain_until(1200)
        consumer.abandon()
    stop_heartbeats(broker)
    with consuming(broker_url, visibility_timeout=10) as consumer:
        consumer.channel.pause()
        consumer.channel.qos.restore_visible()
        assert listed(broker) == originals
        assert broker.keys("unacked") == []
    warnings = logged(caplog.messages, "Restored … messages: their worker sent no heartbeat for … s.")
    assert sum(int(number) for number, _ in warnings) == 1200


def test_a_restored_message_has_the_number_of_its_restores_until_it_is_acknowledged(broker_url, broker):
    push(broker, message(1), message(2))
    for restores in range(3):
        with consuming(broker_url, prefetch=1, visibility_timeout=10) as consumer:
            consumer.channel.qos.restore_visible()
            (got,) = consumer.drain_until(1)
            assert got.headers.get(RESTORES_HEADER, 0) == restores
            assert bool(got.headers.get("redelivered")) == bool(restores)
            assert bool(got.delivery_info.get("redelivered")) == bool(restores)
            consumer.abandon()
        stop_heartbeats(broker)
    with consuming(broker_url, prefetch=1, visibility_timeout=10) as consumer:
        consumer.channel.qos.restore_visible()
        consumer.drain_until(1)[0].ack()
        (_, neighbour) = consumer.drain_until(2)
        assert RESTORES_HEADER not in neighbour.headers
        assert broker.exists("unacked_restores") == 0


def test_counts_of_messages_that_vanished_expire(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as consumer:
        consumer.drain_until(1)
        consumer.abandon()
    stop_heartbeats(broker)
    with consuming(broker_url, "other", visibility_timeout=10) as consumer:
        consumer.channel.qos.restore_visible()
    assert 0 < broker.ttl("unacked_restores") <= 7 * 86_400


def test_a_producer_cannot_claim_restores(broker_url, broker):
    push(broker, message(1, headers={"task": "t", "id": "i", RESTORES_HEADER: 9}))
    with consuming(broker_url) as consumer:
        assert RESTORES_HEADER not in consumer.drain_until(1)[0].headers


def test_a_record_that_fits_no_queue_stays_and_is_reported(broker_url, broker, caplog):
    for tag, record in {"a": "nonsense", "b": '[{},null,"q"]', "c": '[{},"gone","q"]', "d": ""}.items():
        broker.hset("unacked", tag, record)
        broker.zadd("unacked_index", {tag: 1})
    broker.zadd("unacked_index", {"no record": 1})
    with consuming(broker_url, visibility_timeout=10) as consumer:
        consumer.channel.qos.restore_visible()
        assert consumer.drain() == []
    assert sorted(broker.hkeys("unacked")) == [b"a", b"b", b"c", b"d"]
    assert broker.zcard("unacked_index") == 4
    event = "… messages in … fit no queue and stay there: check them and the bindings of their exchange."
    assert logged(caplog.messages, event) == [("4", "unacked")]


# Solo attempts


def test_deaths_are_counted_of_workers_that_attempted_a_message_alone_and_did_not_requeue_it(broker_url, broker):
    push(broker, message(1))
    lives = [
        *[(0, "dies"), (0, "dies alone"), (1, "undoes"), (1, "undoes late"), (1, "dies alone")],
        *[(2, "closes"), (2, "acknowledges")],
    ]
    for deaths, outcome in lives:
        with consuming(broker_url, visibility_timeout=10) as consumer:
            qos = consumer.channel.qos
            qos.restore_visible()
            (got,) = consumer.drain_until(1)
            assert got.headers.get(SOLO_DEATHS_HEADER, 0) == deaths
            if outcome != "dies":
                qos.record_solo_attempt(got.delivery_tag)
            if outcome == "acknowledges":
                got.ack()
            elif outcome == "undoes":
                qos.undo_solo_attempts(got.delivery_tag, 1)
            elif outcome == "undoes late":
                consumer.channel.do_restore = False  # as if Redis were unreachable
                qos.restore_unacked_once()
                qos.undo_solo_attempts(got.delivery_tag, 1)  # undone by the closing already
            elif outcome != "closes":
                consumer.abandon()
        stop_heartbeats(broker)
    assert broker.exists("unacked_restores") == 0


def test_a_solo_attempt_is_recorded_after_the_acknowledgements_before_it(broker_url, broker):
    push(broker, message(1), message(2))
    with consuming(broker_url) as consumer:
        consumer.drain_until(2)
        consumer.abandon()
    stop_heartbeats(broker)
    with consuming(broker_url, visibility_timeout=10) as consumer:
        consumer.channel.qos.restore_visible()
        first, suspect = consumer.drain_until(2)
        first.ack()
        consumer.channel.qos.record_solo_attempt(suspect.delivery_tag)
        assert broker.hkeys("unacked") == [suspect.delivery_tag.encode()]
        consumer.abandon()
