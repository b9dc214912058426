"""schema/publisher.py: the messages in Redis, and the errors that a producer gets."""

from __future__ import annotations

import base64
import json
import time
import uuid
import zlib
from collections import Counter
from decimal import Decimal

import pytest
import redis
from kombu import Connection

from schema.broker import connect
from schema.canonical import read_json
from schema.events import Accrual, Burn, event_json, parse_event
from schema.publisher import MAX_PUSH_BYTES, MAX_PUSH_MESSAGES, Publisher, PublishError, bulks
from tests.kit.servers import Broker, Certificate, Sentinel, free_port
from tests.kit.wait import eventually
from worker.local.embedded import ValkeyServer
from worker.queue.parsing import read_body


def accrual(n=0, **changed):
    return Accrual(
        **{"user_id": "alice", "amount": "12.5", "idempotency_key": f"order-{n}", "source": "shop"} | changed
    )


def burn(n=0, **changed):
    return Burn(**{"user_id": "bob", "amount": "0.000777", "idempotency_key": f"call-{n}", "action": "chat"} | changed)


@pytest.fixture
def client(broker_url):
    with redis.Redis.from_url(broker_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def own_broker(tmp_path):
    """A server that a test may disturb."""
    server = ValkeyServer(tmp_path / "valkey", durable=False)
    server.start()
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        yield server.url, client
    server.stop()


def queued(client, queue="tokens"):
    """The messages in the order in which a worker fetches them."""
    return [json.loads(text) for text in reversed(client.lrange(queue, 0, -1))]


def call(message):
    return read_json(base64.b64decode(message["body"]))


def test_celery_reads_the_message(broker_url, client):
    event = accrual(occurred_at="2026-01-31T12:00:00Z", metadata={"order": 4711})
    with Publisher(broker_url) as publisher:
        message_id = publisher.publish(event)

    with Connection(broker_url) as connection:
        channel = connection.channel()
        message = channel.basic_get("tokens", no_ack=True)
        args, kwargs, embedded = message.decode()
        connection.close()
    assert (args, embedded) == ([], {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
    assert kwargs == {
        "user_id": "alice",
        "amount": "12.5",
        "idempotency_key": "order-0",
        "source": "shop",
        "occurred_at": "2026-01-31T12:00:00Z",
        "metadata": {"order": 4711},
    }
    assert message.headers["task"] == "tokens.accrue"
    assert message.headers["id"] == message.headers["root_id"] == message.properties["correlation_id"] == message_id
    assert message.headers["retries"] == 0
    assert message.headers["eta"] is message.headers["expires"] is None
    assert message.content_type == "application/json"
    assert uuid.UUID(message_id)


def test_no_digit_is_lost_between_event_and_message(broker_url, client):
    event = burn(amount="99999999999.000000000000000001", metadata=read_json('{"price": 0.1000000000000000055511}'))
    with Publisher(broker_url) as publisher:
        publisher.publish(event)

    _, kwargs, _ = read_body(base64.b64decode(queued(client)[0]["body"]))
    assert parse_event(kwargs, type_="burn") == event
    assert kwargs["metadata"]["price"] == Decimal("0.1000000000000000055511")


@pytest.mark.parametrize(
    "text", ['a","type":"burn",', "quote'\"", "zero\u200bwidth", "\N{SNOWMAN}", "\\", "\n", "x" * 128]
)
def test_every_text_of_an_event_arrives_unchanged(broker_url, client, text):
    event = burn(user_id=text, idempotency_key=text, action=text, metadata={"type": "burn", text: text})
    with Publisher(broker_url) as publisher:
        publisher.publish(event)

    (message,) = queued(client)
    assert message["headers"]["task"] == "tokens.burn"
    assert parse_event(call(message)[1], type_="burn") == event


def test_flower_shows_short_arguments(broker_url, client):
    with Publisher(broker_url) as publisher:
        publisher.publish(burn(amount="0.0000001"))
        publisher.publish(burn(user_id="u" * 128, idempotency_key="k" * 200, action="a" * 200))
        publisher.publish_bulk([burn(n, user_id=f"user-{n}") for n in range(1000)])
        publisher.publish_bulk([burn(n) for n in range(3)])

    short, long, bulk, small = (message["headers"]["kwargsrepr"] for message in queued(client))
    assert short == "{'user_id': 'bob', 'amount': '0.0000001', 'idempotency_key': 'call-0', 'action': 'chat'}"
    assert len(long) == 200
    assert bulk.startswith("{'events': '1000, of user-0, user-1, ")
    assert bulk.endswith(", user-9, …'}")
    assert small == "{'events': '3, of bob'}"


def test_events_keep_their_order_across_batches(broker_url, client):
    sent = [burn(n) for n in range(2 * MAX_PUSH_MESSAGES + 1)]
    with Publisher(broker_url) as publisher:
        assert publisher.publish_all(iter(sent)) == len(sent)

    assert [call(message)[1]["idempotency_key"] for message in queued(client)] == [e.idempotency_key for e in sent]
    assert len({message["headers"]["id"] for message in queued(client)}) == len(sent)


def test_batches_are_cut_by_bytes_too(own_broker):
    broker_url, client = own_broker
    events = [burn(n, metadata={"text": "x" * 16_000}) for n in range(100)]
    before = client.info("commandstats")["cmdstat_lpush"]["calls"] if client.lpush("warm", 1) else 0
    with Publisher(broker_url) as publisher:
        assert publisher.publish_all(events) == 100

    assert client.info("commandstats")["cmdstat_lpush"]["calls"] - before == 3  # of 2.2 MB in all
    assert client.llen("tokens") == 100


def test_lane_of_a_user_is_always_the_same(broker_url, client):
    events = [burn(n, user_id=f"user-{n % 20}") for n in range(1500)]
    with Publisher(broker_url, lanes=4) as publisher:
        assert publisher.publish_all(events) == 1500
        assert {publisher.queue_of(event) for event in events} == {f"tokens.{lane}" for lane in range(4)}

    for lane in range(4):
        calls = [call(message)[1] for message in queued(client, f"tokens.{lane}")]
        assert {zlib.crc32(each["user_id"].encode()) % 4 for each in calls} == {lane}
        in_order = [e.idempotency_key for e in events if zlib.crc32(e.user_id.encode()) % 4 == lane]
        assert [each["idempotency_key"] for each in calls] == in_order
    assert client.llen("tokens") == 0


def test_bulk_message_carries_its_events_in_order(broker_url, client):
    events = [accrual(1), burn(2), accrual(3, metadata={"a": 1})]
    with Publisher(broker_url) as publisher:
        publisher.publish_bulk(events)

    (message,) = queued(client)
    assert message["headers"]["task"] == "tokens.apply_many"
    assert [parse_event(each) for each in call(message)[1]["events"]] == events


def test_bulk_of_several_lanes_goes_to_the_common_queue(broker_url, client):
    alice = [accrual(n) for n in range(3)]
    everyone = [accrual(n, user_id=f"user-{n}") for n in range(10, 30)]
    with Publisher(broker_url, lanes=4) as publisher:
        publisher.publish_bulk(alice)
        publisher.publish_bulk(everyone)
        assert client.llen(publisher.queue_of(alice[0])) == 1
    assert client.llen("tokens") == 1


@pytest.mark.parametrize("count", [0, 1001])
def test_bulk_of_too_few_or_too_many_events_is_refused(broker_url, client, count):
    with Publisher(broker_url) as publisher, pytest.raises(PublishError, match=f"1 to 1000 events, not {count}"):
        publisher.publish_bulk([burn(n) for n in range(count)])
    assert client.llen("tokens") == 0


def test_message_of_more_than_a_mebibyte_is_refused(broker_url, client):
    events = [burn(n, metadata={"text": "x" * 16_000}) for n in range(60)]
    with Publisher(broker_url) as publisher:
        with pytest.raises(PublishError, match=f"at most {MAX_PUSH_BYTES} are allowed: not published") as raised:
            publisher.publish_bulk(events)
        assert raised.value.events == tuple(events)
        assert client.llen("tokens") == 0

        runs = list(bulks(events))
        assert [event for run in runs for event in run] == events
        for run in runs:
            publisher.publish_bulk(run)
    assert client.llen("tokens") == len(runs) > 1


def test_the_error_of_an_unreachable_redis_is_one_sentence_with_all_events():
    events = [burn(n) for n in range(3)]
    with (
        Publisher(f"redis://:secret@127.0.0.1:{free_port()}/0", timeout=0.5) as publisher,
        pytest.raises(
            PublishError, match=r"^Redis at 127\.0\.0\.1:\d+/0 cannot be used .*3 events not published\.$"
        ) as raised,
    ):
        publisher.publish_all(events)
    assert raised.value.events == tuple(events)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("lanes", [0, 2])
def test_every_event_taken_from_the_iterable_comes_back_with_the_error(lanes):
    """Also the event that did not fit into a full batch, and those of another lane."""
    left = (burn(n, user_id=f"user-{n}") for n in range(2 * MAX_PUSH_MESSAGES))
    url = f"redis://127.0.0.1:{free_port()}/0"
    with Publisher(url, timeout=0.5, lanes=lanes) as publisher, pytest.raises(PublishError) as raised:
        publisher.publish_all(left)
    keys = [event.idempotency_key for event in [*raised.value.events, *left]]
    assert sorted(keys) == sorted(f"call-{n}" for n in range(2 * MAX_PUSH_MESSAGES))


def test_the_error_has_events_whose_fate_is_unknown_and_not_the_acknowledged(own_broker):
    """Redis takes the second batch, and its reply comes too late: the producer cannot know."""
    broker_url, client = own_broker
    events = [burn(n) for n in range(MAX_PUSH_MESSAGES + 100)]

    def until_redis_hangs():
        yield from events[: MAX_PUSH_MESSAGES + 50]
        client.client_pause(60_000, all=False)
        yield from events[MAX_PUSH_MESSAGES + 50 :]

    with (
        Publisher(broker_url, timeout=0.3) as publisher,
        pytest.raises(
            PublishError, match=r"100 events were sent .*whether they arrived is unknown.*same keys"
        ) as raised,
    ):
        publisher.publish_all(until_redis_hangs())
    client.client_unpause()
    assert raised.value.events == tuple(events[MAX_PUSH_MESSAGES:])
    assert raised.value.acknowledged == MAX_PUSH_MESSAGES
    deadline = time.monotonic() + 10
    while client.llen("tokens") not in {MAX_PUSH_MESSAGES, len(events)} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.llen("tokens") in {MAX_PUSH_MESSAGES, len(events)}  # entirely or not at all

    with Publisher(broker_url) as publisher:
        publisher.publish_all(raised.value.events)
    keys = Counter(call(message)[1]["idempotency_key"] for message in queued(client))
    assert keys.keys() == {event.idempotency_key for event in events}


def test_a_connection_that_redis_closed_is_replaced(own_broker):
    broker_url, client = own_broker
    with Publisher(broker_url) as publisher:
        publisher.publish(burn(1))
        client.client_kill_filter(_type="normal", skipme=True)
        publisher.publish(burn(2))
    assert client.llen("tokens") == 2


def test_the_error_of_a_refusal_says_that_nothing_is_published(own_broker):
    broker_url, client = own_broker
    client.acl_setuser("reader", enabled=True, passwords="+reader", keys=["*"], commands=["+ping"])
    url = broker_url[: broker_url.index("//")] + "//reader:reader" + broker_url[broker_url.index("@") :]
    with Publisher(url) as publisher, pytest.raises(PublishError, match=r"refused the message .*1 event not published"):
        publisher.publish(burn())
    assert client.llen("tokens") == 0


def test_the_error_of_a_wrong_password_does_not_show_it(own_broker):
    broker_url, _ = own_broker
    url = broker_url[: broker_url.index("//")] + "//:mistyped" + broker_url[broker_url.index("@") :]
    with Publisher(url) as publisher, pytest.raises(PublishError, match=r"cannot be used .*password") as raised:
        publisher.publish(burn())
    assert "mistyped" not in str(raised.value)


def test_sentinel_url_finds_the_master(tmp_path):
    with Broker(tmp_path / "master", "--requirepass", "hush") as master, Sentinel(tmp_path / "sentinel") as sentinel:
        sentinel.client.execute_command("SENTINEL", "MONITOR", "tokens-master", "127.0.0.1", master.port, 1)
        sentinel.client.execute_command("SENTINEL", "SET", "tokens-master", "auth-pass", "hush")
        hosts = f"sentinel://127.0.0.1:{free_port()};sentinel://:hush@127.0.0.1:{sentinel.port}/0"
        with pytest.raises(ValueError, match="master_name"):
            connect(hosts)
        with Publisher(f"{hosts}?master_name=tokens-master", timeout=1) as publisher:
            eventually(lambda: published(publisher, burn(1), burn(2)), "the sentinel knows the master")
        assert master.client.llen("tokens") >= 2


def published(publisher, *events):
    try:
        publisher.publish_all(events)
    except PublishError:
        return False
    return True


def test_tls_url_as_celery_writes_it_works(tmp_path, requires_program):
    server_program = requires_program("redis-server")
    certificate = Certificate.create(tmp_path, requires_program("openssl"))
    port = free_port()
    with Broker(tmp_path, *certificate.server_options(port), program=server_program) as broker:
        url = f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={certificate.certificate}"
        with Publisher(url) as publisher:
            publisher.publish(burn())
        assert broker.client.llen("tokens") == 1
        with (
            Publisher(f"rediss://127.0.0.1:{port}/0", timeout=1) as publisher,
            pytest.raises(PublishError, match="certificate"),
        ):
            publisher.publish(burn())


def test_bulks_lose_nothing_and_keep_the_order():
    events = [burn(n) for n in range(1201)]
    runs = list(bulks(events))
    assert [len(run) for run in runs] == [500, 500, 201]
    assert [event for run in runs for event in run] == events
    assert all(len(event_json(event)) < MAX_PUSH_BYTES for event in events)
