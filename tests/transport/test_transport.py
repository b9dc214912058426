"""The transport between Redis and a consumer: nothing is lost, nothing is reordered, no content stops it."""

from __future__ import annotations

import base64
import json
import logging
import time
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty

import kombu
import pytest
import redis

from schema import messages
from tests.kit.brokers import OURS, PRIORITY_STEPS, STOCK, consuming, eventually, key, message, queue_of
from tests.kit.logs import logged
from tests.kit.proxy import Proxy
from worker.transport import envelope, scripts
from worker.transport.channel import Channel, SentinelTransport, Transport, register


@pytest.fixture
def broker(broker_url):
    with redis.Redis.from_url(broker_url) as client:
        yield client


def push(broker, *messages, to="tokens"):
    for each in messages:
        broker.lpush(to, each)


def listed(broker, name="tokens"):
    """The messages in a list, the next one to be served first."""
    return broker.lrange(name, 0, -1)[::-1]


def age(broker, seconds=1000):
    """Let `seconds` pass for all messages that are held."""
    for tag, score in broker.zrange("unacked_index", 0, -1, withscores=True):
        broker.zadd("unacked_index", {tag: score - seconds})


def stall(consumer):
    """Let a consumer fetch nothing more, also not what it had asked for."""
    consumer.channel.pause()
    consumer.drain(0.5)


def as_it_was(back, raw):
    """Large ones keep their envelope: unpacking it in Redis would block it."""
    return back == raw or (len(raw) > 40_000 and json.loads(back)["body"] == base64.b64encode(raw).decode())


# Fetching


def test_a_message_is_recorded_before_anyone_has_seen_it(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as consumer:
        (got,) = consumer.drain_until(1)
        assert broker.llen("tokens") == 0
        assert broker.hkeys("unacked") == [got.delivery_tag.encode()]
        assert broker.zscore("unacked_index", got.delivery_tag) == pytest.approx(time.time(), abs=60)


def test_messages_come_in_the_order_they_were_pushed(broker_url, broker):
    push(broker, *map(message, range(1200)))
    with consuming(broker_url) as consumer:
        consumer.drain_until(1200)
        assert consumer.numbers == list(range(1200))


def test_scores_keep_the_order_of_a_fetch(broker_url, broker):
    push(broker, *map(message, range(300)))
    with consuming(broker_url) as consumer:
        tags = [got.delivery_tag for got in consumer.drain_until(300)]
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
        assert len(consumer.drain()) == 7
        assert broker.llen("tokens") == 43
        for got in consumer.messages[:3]:
            got.ack()
        assert len(consumer.drain()) == 10


def test_a_fetch_is_bounded_in_messages(broker_url, broker):
    push(broker, *map(message, range(50)))
    with consuming(broker_url, fetch_count=20) as consumer:
        consumer.connection.drain_events(timeout=5)
        assert len(consumer.messages) == 20


def test_a_fetch_is_bounded_in_bytes_but_takes_at_least_one(broker_url, broker):
    push(broker, *[message(number, body="x" * 100_000) for number in range(5)])
    with consuming(broker_url, fetch_bytes=250_000) as consumer:
        consumer.connection.drain_events(timeout=5)
        assert consumer.numbers == [0, 1]
    with consuming(broker_url, fetch_bytes=1) as consumer:
        consumer.connection.drain_events(timeout=5)
        assert consumer.numbers == [0]
        consumer.drain_until(5)


def test_an_idle_wait_changes_no_list(broker_url, broker):
    with consuming(broker_url, prefetch=1) as consumer:
        consumer.drain(0.1)
        push(broker, *map(message, range(3)))
        consumer.drain_until(1)
        before = listed(broker)
        consumer.drain(0.2)
        assert listed(broker) == before
        assert [json.loads(raw)["headers"]["number"] for raw in before] == [1, 2]


def test_messages_with_one_delivery_tag_are_three_messages(broker_url, broker):
    same = {"delivery_tag": "T", "delivery_info": {"exchange": "", "routing_key": "tokens"}}
    originals = [message(number, properties=same) for number in range(3)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:
        tags = {got.delivery_tag for got in consumer.drain_until(3)}
        assert len(tags) == 3 == broker.hlen("unacked") == broker.zcard("unacked_index")
        consumer.messages[1].ack()
        consumer.turn()
    assert listed(broker) == [originals[0], originals[2]]


def test_a_paused_channel_takes_nothing_and_goes_on_afterwards(broker_url, broker):
    with consuming(broker_url) as consumer:
        consumer.drain(0.1)  # a wait is on its way, and a fetch behind it
        consumer.channel.pause()
        push(broker, *map(message, range(3)))
        consumer.drain(1.5)
        assert consumer.messages == []
        assert broker.llen("tokens") == 3
        assert broker.hlen("unacked") == 0
        consumer.channel.resume()
        consumer.drain_until(3)
        assert consumer.numbers == [0, 1, 2]


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_on_its_way_to_a_paused_channel_goes_back_or_is_delivered(broker_url, broker, at_once):
    originals = [message(number) for number in range(400)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:

        def pause(got):
            consumer.messages.append(got)
            consumer.channel.pause(requeue_fetched=at_once)

        consumer.consumer.on_message = pause
        consumer.drain_until(1 if at_once else 400)
        push(broker, message(400))
        consumer.drain(0.5)
        assert consumer.numbers == ([0] if at_once else [*range(400)])
        assert listed(broker)[:-1] == (originals[1:] if at_once else [])


def test_a_paused_channel_still_acknowledges_and_gives_signs_of_life(broker_url, broker):
    push(broker, message(1), message(2))
    with consuming(broker_url, visibility_timeout=1) as consumer:
        first, second = consumer.drain_until(2)
        consumer.channel.pause()
        first.ack()
        score = broker.zscore("unacked_index", second.delivery_tag)
        consumer.drain(0.8)
        assert broker.hkeys("unacked") == [second.delivery_tag.encode()]
        assert broker.zscore("unacked_index", second.delivery_tag) > score


def test_a_consumer_that_raises_leaves_the_others_messages_in_the_queue(broker_url, broker):
    originals = [message(number) for number in range(5)]
    push(broker, *originals)
    with kombu.Connection(broker_url, transport=OURS) as connection:
        channel = connection.channel()

        def refuse(got):
            if got.headers["number"] == 2:
                raise ArithmeticError

        with kombu.Consumer(channel, [queue_of("tokens")], on_message=refuse), pytest.raises(ArithmeticError):
            connection.drain_events(timeout=5)
        assert listed(broker) == originals[3:]
        assert broker.hlen("unacked") == 3


@contextmanager
def of_a_wrong_type(broker, name):
    """A key that Redis refuses to work with, until it is as it was."""
    broker.rename(name, f"{name}, put aside")
    broker.set(name, "of a wrong type")
    yield
    broker.delete(name)
    broker.rename(f"{name}, put aside", name)


def test_what_cannot_go_back_to_the_queue_at_once_goes_later(broker_url, broker, caplog):
    originals = [message(number) for number in range(3)]
    push(broker, *originals)
    with ExitStack() as stack, kombu.Connection(broker_url, transport=OURS) as connection:

        def refuse(_):
            stack.enter_context(of_a_wrong_type(broker, "unacked_index"))
            raise ArithmeticError

        with (
            kombu.Consumer(connection.channel(), [queue_of("tokens")], on_message=refuse),
            pytest.raises(ArithmeticError),
        ):
            connection.drain_events(timeout=5)
        assert logged(caplog.messages, "Could not put … fetched messages back at once: ….")[0][0] == "2"
        stack.close()
        connection.close()
    with consuming(broker_url) as consumer:
        consumer.drain_until(3)
        assert sorted(consumer.numbers) == [0, 1, 2]


def test_messages_that_nobody_acknowledges_are_not_recorded(broker_url, broker):
    push(broker, message(1))
    with kombu.Connection(broker_url, transport=OURS) as connection:
        seen = []
        with kombu.Consumer(connection.channel(), [queue_of("tokens")], on_message=seen.append, no_ack=True):
            connection.drain_events(timeout=5)
        assert len(seen) == 1
        assert broker.keys("unacked*") == []


# Content

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
    "a tag that lies": message(headers={"x": {"__type__": "decimal", "__value__": "x"}}),
    "a tag of no type": message(headers={"x": {"__type__": [], "__value__": "x"}}),
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


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_bytes_that_are_no_message_are_delivered_as_such(broker_url, broker, raw):
    push(broker, message(1), raw, message(2))
    with consuming(broker_url) as consumer:
        before, odd, after = consumer.drain_until(3)
        assert [before.headers["number"], after.headers["number"]] == [1, 2]
        assert odd.headers["task"] == messages.UNDECODABLE_TASK
        assert odd.headers[messages.UNDECODABLE_REASON_HEADER]
        assert odd.body == raw
        assert not odd.errors
        assert broker.hlen("unacked") == 3
    assert as_it_was(listed(broker)[1], raw)


@pytest.mark.parametrize("raw", READABLE.values(), ids=READABLE.keys())
def test_an_odd_tag_is_no_reason_not_to_deliver_a_message(broker_url, broker, raw):
    push(broker, raw)
    with consuming(broker_url) as consumer:
        (got,) = consumer.drain_until(1)
        assert got.headers["task"] != messages.UNDECODABLE_TASK
        assert broker.hexists("unacked", got.delivery_tag)
        got.ack()
        consumer.turn()
    assert broker.keys("*") == []


def test_the_same_undecodable_bytes_are_the_same_task_again(broker_url, broker):
    push(broker, b"garbage", b"garbage", b"other")
    with consuming(broker_url) as consumer:
        first, second, third = consumer.drain_until(3)
        assert first.headers["id"] == second.headers["id"] != third.headers["id"]


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_an_undecodable_message_comes_back_as_it_was_after_its_worker_died(broker_url, broker, raw):
    push(broker, raw)
    with consuming(broker_url) as consumer:
        consumer.drain_until(1)
        consumer.abandon()
    age(broker)
    with consuming(broker_url, visibility_timeout=10, unacked_restore_interval=0.1) as consumer:
        consumer.channel.pause()
        consumer.channel.qos.restore_visible()
        (back,) = listed(broker)
        assert as_it_was(back, raw)
        consumer.channel.resume()
        (got,) = consumer.drain_until(1)
        assert got.body == raw
        assert got.headers["task"] == messages.UNDECODABLE_TASK


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE.keys())
def test_an_undecodable_message_survives_a_restore_by_kombu_itself(broker_url, broker, raw):
    push(broker, raw)
    with consuming(broker_url) as consumer:
        consumer.drain_until(1)
        consumer.abandon()
    age(broker)
    with kombu.Connection(broker_url, transport=STOCK, transport_options={"visibility_timeout": 10}) as connection:
        connection.default_channel.qos.restore_visible()
    assert broker.llen("tokens") == 1
    assert broker.hlen("unacked") == 0
    with consuming(broker_url) as consumer:
        (got,) = consumer.drain_until(1)
        assert got.body == raw
        assert got.headers["task"] == messages.UNDECODABLE_TASK


def test_a_queue_that_nobody_acknowledges_drops_unreadable_bytes_and_says_so(broker_url, broker, caplog):
    push(broker, b"garbage", message(1))
    with kombu.Connection(broker_url, transport=OURS) as connection:
        got = [connection.default_channel.basic_get("tokens", no_ack=True) for _ in range(2)]
    assert got[1].headers["number"] == 1 if got[1] else got[0] is None
    assert logged(caplog.messages, "Dropped unreadable bytes from …, where nobody acknowledges: …")


class _Meddler(Proxy):
    """Lets something happen the moment that bytes pass from Redis."""

    def __init__(self, target, when, happens):
        self._when, self._happens = when, happens
        super().__init__(target)

    def passed(self, data):
        if self._when in data and self._happens:
            self._happens, happens = None, self._happens
            happens()
        return data


def test_an_undecodable_message_is_delivered_though_redis_will_not_note_that_it_is_one(broker_url, broker, caplog):
    push(broker, b"garbage")
    with ExitStack() as stack:
        refuse = lambda: stack.enter_context(of_a_wrong_type(broker, "unacked"))  # noqa: E731
        with _Meddler(broker_url, b"garbage", refuse) as proxy, consuming(proxy.url) as consumer:
            (got,) = consumer.drain_until(1)
            assert got.body == b"garbage"
            assert logged(caplog.messages, "Could not record an undecodable message for other transports: ….")
            stack.close()
            got.ack()
            consumer.turn()
            assert broker.keys("unacked*") == []


@pytest.mark.parametrize(
    ("told", "event"),
    [
        (b'{"__type__": "decimal", "__value__": "x"}', "Dropped a broadcast that is no JSON: …"),
        (b'{"no": "message"}', "Dropped a broadcast that is no message: …"),
    ],
)
def test_a_broadcast_that_is_none_is_dropped_and_told(broker_url, broker, caplog, told, event):
    with kombu.Connection(broker_url, transport=OURS) as connection:
        news = kombu.Exchange("news", type="fanout")
        got = []
        channel = connection.channel()
        with kombu.Consumer(channel, [kombu.Queue("mine", news)], callbacks=[lambda body, _: got.append(body)]):

            def drained():
                with suppress(TimeoutError):
                    connection.drain_events(timeout=0.2)

            drained()
            broker.publish(f"/{connection.virtual_host}.news", told)
            kombu.Producer(channel, exchange=news, serializer="json").publish("next")
            eventually(lambda: drained() or got)
    assert got == ["next"]
    assert logged(caplog.messages, event)


# Acknowledging and giving back


def test_acknowledgements_reach_redis_at_the_next_turn_of_the_loop(broker_url, broker):
    push(broker, *map(message, range(2500)))
    with consuming(broker_url) as consumer:
        for got in consumer.drain_until(2500):
            got.ack()
        consumer.turn()
        assert broker.keys("*") == []


def test_closing_gives_messages_back_in_order_uncounted(broker_url, broker):
    originals = [message(number) for number in range(1500)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:
        consumer.drain_until(1500)
        consumer.messages[0].ack()
    assert listed(broker) == originals[1:]
    assert broker.keys("unacked*") == []


def test_large_messages_are_handed_back_in_order_too(broker_url, broker):
    originals = [message(number, body="x" * 600_000) for number in range(5)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:
        consumer.drain_until(5)
    assert listed(broker) == originals


@pytest.mark.parametrize("step", PRIORITY_STEPS)
def test_a_message_goes_back_to_the_list_it_came_from(broker_url, broker, step):
    original = message(1, 'odd "queue"')
    push(broker, original, to=key('odd "queue"', step))
    with consuming(broker_url, 'odd "queue"') as consumer:
        consumer.drain_until(1)
    assert listed(broker, key('odd "queue"', step)) == [original]


def test_hand_back_returns_these_messages_to_the_head_in_their_order(broker_url, broker):
    originals = [message(number) for number in range(6)]
    push(broker, *originals)
    with consuming(broker_url, prefetch=5) as consumer:
        got = consumer.drain_until(5)
        consumer.channel.pause()
        assert consumer.channel.qos.requeue([got[3].delivery_tag, got[1].delivery_tag]) == 2
        assert listed(broker) == [originals[1], originals[3], originals[5]]
        assert consumer.channel.qos.held() == [got[at].delivery_tag for at in (0, 2, 4)]
        consumer.channel.resume()
        consumer.drain_until(7)
        assert consumer.numbers[5:] == [1, 3]
        assert messages.RESTORES_HEADER not in consumer.messages[5].headers


def test_requeue_serves_a_message_last_and_reject_forgets_it(broker_url, broker):
    push(broker, *map(message, range(3)))
    with consuming(broker_url, prefetch=1) as consumer:
        consumer.drain_until(1)[0].requeue()
        consumer.drain_until(2)[1].reject()
        consumer.drain_until(3)[2].ack()
        consumer.drain_until(4)
        assert consumer.numbers == [0, 1, 2, 0]


def test_what_is_given_up_goes_back_when_redis_takes_it_and_is_no_longer_kept_alive(broker_url, broker):
    originals = [message(number) for number in range(4)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:
        got = consumer.drain_until(4)
        consumer.channel.pause()
        consumer.channel.qos.requeue_later([got[3].delivery_tag, got[1].delivery_tag])
        assert consumer.channel.qos.held() == [got[at].delivery_tag for at in (0, 2)]
        consumer.turn()
        assert listed(broker) == [originals[1], originals[3]]
        consumer.channel.resume()
        consumer.drain_until(6)
        assert consumer.numbers[4:] == [1, 3]
        assert messages.RESTORES_HEADER not in consumer.messages[4].headers


def test_a_message_set_aside_takes_no_prefetch_and_stays_held(broker_url, broker):
    push(broker, *map(message, range(6)))
    with consuming(broker_url, prefetch=2) as consumer:
        first, _ = consumer.drain_until(2)
        consumer.channel.qos.park(first.delivery_tag)
        assert len(consumer.drain()) == 3
        assert broker.hexists("unacked", first.delivery_tag)
        consumer.messages[1].ack()
        assert len(consumer.drain()) == 4
        first.ack()
        consumer.channel.qos.park(first.delivery_tag)  # too late, and without effect
        assert len(consumer.drain()) == 4


def test_acknowledgements_survive_a_channel(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as consumer:
        (got,) = consumer.drain_until(1)
        consumer.abandon()
        got.ack()  # its commit came through, its connection did not
    with consuming(broker_url) as consumer:
        consumer.turn()
        assert broker.keys("unacked*") == []


def test_what_a_lost_connection_brought_unread_comes_again_at_once_and_uncounted(broker_url, broker):
    with consuming(broker_url, visibility_timeout=1000) as consumer:
        consumer.drain(0.2)
        if consumer.channel._in_poll:  # else its answer is read already, and no other comes
            with suppress(Empty):
                consumer.channel._brpop_read()
        push(broker, *map(message, range(5)))
        consumer.channel._brpop_start()
        while broker.llen("tokens"):
            time.sleep(0.01)
        assert broker.hlen("unacked") == 5, "fetched, and the reply is on its way"
        consumer.channel.client.connection.disconnect()
        consumer.drain_until(5)
        assert consumer.numbers == [0, 1, 2, 3, 4]
        assert all(messages.RESTORES_HEADER not in got.headers for got in consumer.messages)


def test_deaths_are_counted_of_workers_that_had_a_message_alone_and_did_not_give_it_back(broker_url, broker):
    push(broker, message(1))
    lives = [
        *[(0, "dies"), (0, "dies alone"), (1, "gives back"), (1, "gives back late"), (1, "dies alone")],
        *[(2, "closes"), (2, "acknowledges")],
    ]
    for deaths, outcome in lives:
        with consuming(broker_url, visibility_timeout=10) as consumer:
            consumer.channel.qos.restore_visible()
            (got,) = consumer.drain_until(1)
            assert got.headers.get(messages.SOLO_DEATHS_HEADER, 0) == deaths
            if outcome != "dies":
                consumer.channel.qos.count_alone(got.delivery_tag, 1)
            if outcome == "acknowledges":
                got.ack()
            elif outcome == "gives back":
                consumer.channel.qos.count_alone(got.delivery_tag, -1)
            elif outcome == "gives back late":
                consumer.channel.do_restore = False  # as when Redis is away
                consumer.channel.qos.restore_unacked_once()
                consumer.channel.qos.count_alone(got.delivery_tag, -1)  # which was taken back by the closing
            elif outcome != "closes":
                consumer.abandon()
        age(broker)
    assert broker.exists("unacked_restores") == 0


def test_a_late_acknowledgement_does_not_touch_the_next_delivery(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as late:
        (first,) = late.drain_until(1)
        stall(late)
        age(broker)
        with consuming(broker_url, visibility_timeout=10) as consumer:
            consumer.channel.qos.restore_visible()
            (second,) = consumer.drain_until(1)
            first.ack()
            consumer.turn()
            assert broker.hkeys("unacked") == [second.delivery_tag.encode()]


# Restoring


def test_what_no_worker_cares_for_comes_back_in_its_old_order_and_is_told(broker_url, broker, caplog):
    originals = [message(number) for number in range(1200)]
    push(broker, *originals)
    with consuming(broker_url) as consumer:
        consumer.drain_until(1200)
        consumer.abandon()
    age(broker)
    with consuming(broker_url, visibility_timeout=10) as consumer:
        consumer.channel.pause()
        consumer.channel.qos.restore_visible()
        assert listed(broker) == originals
        assert broker.keys("unacked") == []
    told = logged(caplog.messages, "Put … messages back: their worker gave no sign of life.")
    assert sum(int(number) for (number,) in told) == 1200


def test_a_restored_message_says_how_often_it_was_until_it_is_acknowledged(broker_url, broker):
    push(broker, message(1), message(2))
    for times in range(3):
        with consuming(broker_url, prefetch=1, visibility_timeout=10) as consumer:
            consumer.channel.qos.restore_visible()
            (got,) = consumer.drain_until(1)
            assert got.headers.get(messages.RESTORES_HEADER, 0) == times
            assert bool(got.headers.get("redelivered")) == bool(times)
            assert bool(got.delivery_info.get("redelivered")) == bool(times)
            consumer.abandon()
        age(broker)
    with consuming(broker_url, prefetch=1, visibility_timeout=10) as consumer:
        consumer.channel.qos.restore_visible()
        consumer.drain_until(1)[0].ack()
        (_, neighbour) = consumer.drain_until(2)
        assert messages.RESTORES_HEADER not in neighbour.headers
        assert broker.exists("unacked_restores") == 0


def test_counts_of_messages_that_vanished_do_not_stay_for_ever(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as consumer:
        consumer.drain_until(1)
        consumer.abandon()
    age(broker)
    with consuming(broker_url, "other", visibility_timeout=10) as consumer:
        consumer.channel.qos.restore_visible()
    assert 0 < broker.ttl("unacked_restores") <= 7 * 86_400


def test_a_producer_cannot_claim_restores(broker_url, broker):
    push(broker, message(1, headers={"task": "t", "id": "i", messages.RESTORES_HEADER: 9}))
    with consuming(broker_url) as consumer:
        assert messages.RESTORES_HEADER not in consumer.drain_until(1)[0].headers


def test_messages_of_a_living_worker_are_not_restored(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url, visibility_timeout=1, unacked_restore_interval=0.1, unacked_restore_throttle=1) as alive:
        alive.drain_until(1)
        alive.drain(2.5)
        assert len(alive.messages) == 1
        assert broker.hlen("unacked") == 1


def test_signs_of_life_keep_the_order(broker_url, broker):
    push(broker, *map(message, range(1500)))
    with consuming(broker_url, visibility_timeout=10) as consumer:
        tags = [got.delivery_tag for got in consumer.drain_until(1500)]
        age(broker, 5)
        before = broker.zscore("unacked_index", tags[0])
        consumer.channel.qos._touch_due = 0
        consumer.channel.qos.touch()
        assert broker.zscore("unacked_index", tags[0]) > before + 4
        assert [tag.decode() for tag in broker.zrange("unacked_index", 0, -1)] == tags


def test_signs_of_life_that_redis_refuses_are_given_later(broker_url, broker, caplog):
    push(broker, message(1))
    with consuming(broker_url, visibility_timeout=10) as consumer:
        (got,) = consumer.drain_until(1)
        with of_a_wrong_type(broker, "unacked_index"):
            consumer.channel.qos._touch_due = 0
            consumer.drain(0.2)
            ((why,), *_) = logged(caplog.messages, "Redis refuses to look after held messages, tried again later: …")
            assert "WRONGTYPE" in why
        age(broker, 5)
        before = broker.zscore("unacked_index", got.delivery_tag)
        consumer.drain(0.2)
        assert broker.zscore("unacked_index", got.delivery_tag) > before + 4


def test_a_late_sign_of_life_brings_nothing_back(broker_url, broker):
    push(broker, message(1))
    with consuming(broker_url) as late:
        late.drain_until(1)
        stall(late)
        age(broker)
        with consuming(broker_url, "other", visibility_timeout=10) as consumer:
            consumer.channel.qos.restore_visible()
        late.channel.qos._touch_due = 0
        late.channel.qos.touch()
        assert broker.zcard("unacked_index") == 0
        late.abandon()


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
    said = "… messages in … fit no queue and stay there: look at them, and at their exchange's bindings."
    assert logged(caplog.messages, said) == [("4", "unacked")]


# Together with kombu's own


def test_kombu_can_restore_what_ours_recorded(broker_url, broker):
    push(broker, message(1), message(2))
    push(broker, message(3), to=key("tokens", 3))
    with consuming(broker_url) as consumer:
        consumer.drain_until(3)
        consumer.abandon()
    age(broker)
    with consuming(broker_url, transport=STOCK, visibility_timeout=10) as consumer:
        consumer.channel.qos.restore_visible()
        consumer.drain_until(3)
        assert sorted(consumer.numbers) == [1, 2, 3]


@pytest.mark.parametrize("exchange", ["", "events"])
def test_ours_can_restore_what_kombu_recorded(broker_url, broker, exchange):
    with kombu.Connection(broker_url, transport=STOCK) as connection:
        producer = connection.Producer()
        queue = kombu.Queue("tokens", kombu.Exchange(exchange, type="direct"), routing_key="tokens")
        declare = [queue] if exchange else []
        producer.publish({}, exchange=exchange, routing_key="tokens", declare=declare, headers={"number": 'ü"]'})
    with consuming(broker_url, transport=STOCK) as consumer:
        consumer.drain_until(1)
        consumer.abandon()
    age(broker)
    with consuming(broker_url, visibility_timeout=10) as consumer:
        consumer.channel.qos.restore_visible()
        (got,) = consumer.drain_until(1)
        assert got.headers["number"] == 'ü"]'
        assert got.headers[messages.RESTORES_HEADER] == 1


def test_ours_and_kombus_share_a_queue_and_nothing_is_lost_or_doubled(broker_url, broker):
    push(broker, *map(message, range(400)))
    with consuming(broker_url, prefetch=10) as ours, consuming(broker_url, transport=STOCK, prefetch=10) as stock:
        while broker.llen("tokens") or broker.hlen("unacked"):
            for consumer in (ours, stock):
                for got in consumer.drain(0.01):
                    if not got.acknowledged:
                        got.ack()
        assert sorted(ours.numbers + stock.numbers) == list(range(400))
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


# Without a consumer


def test_get_records_what_it_takes(broker_url, broker):
    push(broker, message(9), to=key("tokens", 9))
    push(broker, message(0))
    with kombu.Connection(broker_url, transport=OURS) as connection:
        channel = connection.default_channel
        first, second = channel.basic_get("tokens"), channel.basic_get("tokens")
        assert [first.headers["number"], second.headers["number"]] == [0, 9]
        assert broker.hlen("unacked") == 2
        assert channel.basic_get("tokens") is None
        first.ack()
        channel.settle()
        assert broker.hkeys("unacked") == [second.delivery_tag.encode()]


def test_size_and_purge_see_every_priority(broker_url, broker):
    for step in PRIORITY_STEPS:
        push(broker, message(step), to=key("tokens", step))
    with kombu.Connection(broker_url, transport=OURS) as connection:
        channel = connection.default_channel
        assert channel.queue_declare("tokens", passive=True).message_count == 4
        assert channel.queue_purge("tokens") == 4
        assert channel._size("tokens") == 0


# Choosing it


@pytest.fixture
def registered(monkeypatch):
    aliases, cache = kombu.transport.TRANSPORT_ALIASES, kombu.transport._transport_cache
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(aliases))
    monkeypatch.setattr(kombu.transport, "_transport_cache", dict(cache))


def test_urls_stay_the_same(registered, broker_url):
    assert not isinstance(kombu.Connection(broker_url).transport, Transport)
    register()
    assert type(kombu.Connection(broker_url).transport) is Transport
    assert type(kombu.Connection("rediss://localhost").transport) is Transport
    assert type(kombu.Connection("sentinel://localhost").transport) is SentinelTransport


def test_every_script_may_run_while_redis_is_full():
    for name in ("FETCH", "ACKNOWLEDGE", "TOUCH", "SHIELD", "COUNT", "RESTORE", "REQUEUE"):
        assert getattr(scripts, name).text.startswith("#!lua flags=allow-oom\n")


def test_defaults_are_those_of_the_design():
    assert (Channel.fetch_count, Channel.fetch_bytes, tuple(Channel.priority_steps)) == (500, 1 << 20, PRIORITY_STEPS)


def test_an_envelope_says_what_it_holds():
    payload = envelope.undecodable(b"\xff", "tokens", "why")
    assert base64.b64decode(payload["body"]) == b"\xff"
    assert envelope.text_of(payload).startswith(envelope.ENVELOPE_START)
    logging.getLogger(__name__).debug("%s", payload)
