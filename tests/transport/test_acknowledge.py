"""What becomes of messages in flight: acknowledged, requeued in order and uncounted, parked."""

from __future__ import annotations

from contextlib import ExitStack

import kombu
import pytest

from schema.messages import RESTORES_HEADER
from tests.kit.consumer import OURS, consuming, queue_of
from tests.kit.logs import logged
from tests.kit.messages import PRIORITY_STEPS, key, message

from .broker import listed, of_wrong_type, push, stop_fetching, stop_heartbeats

# Acknowledge


def test_acknowledgements_reach_redis_at_the_next_turn_of_the_loop(broker_url, broker):
    push(broker, *map(message, range(2500)))
    with consuming(broker_url) as consumer:
        for got in consumer.drain_until(2500):
            got.ack()
        consumer.turn()
        assert broker.keys("*") == []


def test_acknowledgements_survive_a_channel(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as consumer:
        (got,) = consumer.drain_until(1)
        consumer.abandon()
        got.ack()  # after a commit that outlived the connection
    with consuming(broker_url) as consumer:
        consumer.turn()
        assert broker.keys("unacked*") == []


def test_a_late_acknowledgement_does_not_touch_the_next_delivery(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as late:
        (first,) = late.drain_until(1)
        stop_fetching(late)
        stop_heartbeats(broker)
        with consuming(broker_url, visibility_timeout=10) as consumer:
            consumer.channel.qos.restore_visible()
            (second,) = consumer.drain_until(1)
            first.ack()
            consumer.turn()
            assert broker.hkeys("unacked") == [second.delivery_tag.encode()]


# Requeue


def test_closing_requeues_messages_in_order_uncounted(broker_url, broker):
    originals = [message(number) for number in range(1500)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:
        consumer.drain_until(1500)
        consumer.messages[0].ack()
    assert listed(broker) == originals[1:]
    assert broker.keys("unacked*") == []


def test_large_messages_are_requeued_in_order_too(broker_url, broker):
    originals = [message(number, body="x" * 600_000) for number in range(5)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:
        consumer.drain_until(5)
    assert listed(broker) == originals


@pytest.mark.parametrize("step", PRIORITY_STEPS)
def test_a_message_is_requeued_on_the_list_it_came_from(broker_url, broker, step):
    original = message(1, 'odd "queue"')
    push(broker, original, to=key('odd "queue"', step))
    with consuming(broker_url, 'odd "queue"') as consumer:
        consumer.drain_until(1)
    assert listed(broker, key('odd "queue"', step)) == [original]


def test_requeue_puts_messages_where_they_are_served_next_in_their_order(broker_url, broker):
    originals = [message(number) for number in range(6)]
    push(broker, *originals)
    with consuming(broker_url, prefetch=5) as consumer:
        got = consumer.drain_until(5)
        consumer.channel.pause()
        assert consumer.channel.qos.requeue([got[3].delivery_tag, got[1].delivery_tag]) == 2
        assert listed(broker) == [originals[1], originals[3], originals[5]]
        assert consumer.channel.qos.in_flight() == [got[at].delivery_tag for at in (0, 2, 4)]
        consumer.channel.resume()
        consumer.drain_until(7)
        assert consumer.numbers[5:] == [1, 3]
        assert RESTORES_HEADER not in consumer.messages[5].headers


def test_requeue_later_requeues_with_the_next_flush_and_ends_the_heartbeats(broker_url, broker):
    originals = [message(number) for number in range(4)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:
        got = consumer.drain_until(4)
        stop_fetching(consumer)
        consumer.channel.qos.requeue_later([got[3].delivery_tag, got[1].delivery_tag])
        assert consumer.channel.qos.in_flight() == [got[at].delivery_tag for at in (0, 2)]
        assert listed(broker) == []
        consumer.channel.flush_pending()
        assert listed(broker) == [originals[1], originals[3]]
        consumer.channel.resume()
        consumer.drain_until(6)
        assert consumer.numbers[4:] == [1, 3]
        assert RESTORES_HEADER not in consumer.messages[4].headers


def test_kombus_requeue_serves_a_message_last_and_its_reject_acknowledges(broker_url, broker):
    push(broker, *map(message, range(3)))
    with consuming(broker_url, prefetch=1) as consumer:
        consumer.drain_until(1)[0].requeue()
        consumer.drain_until(2)[1].reject()
        consumer.drain_until(3)[2].ack()
        consumer.drain_until(4)
        assert consumer.numbers == [0, 1, 2, 0]


def test_messages_behind_one_whose_consumer_raises_are_requeued(broker_url, broker):
    originals = [message(number) for number in range(5)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:

        def refuse(got):
            if got.headers["number"] == 2:
                raise ArithmeticError

        consumer.consumer.on_message = refuse
        with pytest.raises(ArithmeticError):
            consumer.drain_until(5)
        assert listed(broker) == originals[3:]
        assert broker.hlen("unacked") == 3


def test_fetched_messages_that_redis_does_not_take_back_are_requeued_later(broker_url, broker, caplog):
    push(broker, *map(message, range(3)))
    with ExitStack() as stack, kombu.Connection(broker_url, transport=OURS) as connection:

        def refuse(_):
            stack.enter_context(of_wrong_type(broker, "unacked_index"))
            raise ArithmeticError

        with (
            kombu.Consumer(connection.channel(), [queue_of("tokens")], on_message=refuse),
            pytest.raises(ArithmeticError),
        ):
            connection.drain_events(timeout=60)
        event = "Could not requeue … fetched messages (…): they are requeued with the next connection."
        assert logged(caplog.messages, event)[0][0] == "2"
        stack.close()
        connection.close()
    with consuming(broker_url) as consumer:
        consumer.drain_until(3)
        assert sorted(consumer.numbers) == [0, 1, 2]


# Park


def test_a_parked_message_does_not_count_against_prefetch_and_stays_in_flight(broker_url, broker):
    push(broker, *map(message, range(6)))
    with consuming(broker_url, prefetch=2) as consumer:
        first, second = consumer.drain_until(2)
        consumer.channel.qos.park(first.delivery_tag)
        consumer.drain_until(3)
        assert len(consumer.drain()) == 3
        assert broker.hexists("unacked", first.delivery_tag)
        second.ack()
        consumer.drain_until(4)
        first.ack()
        consumer.channel.qos.park(first.delivery_tag)  # acknowledged already: without effect
        assert len(consumer.drain()) == 4
