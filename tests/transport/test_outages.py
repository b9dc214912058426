"""A Redis that crashes, is full, refuses, forgets or moves: nothing is lost, and the consumer goes on."""

from __future__ import annotations

import kombu
import pytest
import redis
from kombu.asynchronous import Hub

from schema.messages import RESTORES_HEADER, UNDECODABLE_TASK
from tests.kit.consumer import OURS, Consumer, consuming
from tests.kit.logs import logged
from tests.kit.messages import PRIORITY_STEPS, key, message
from tests.kit.servers import Broker, Certificate, Sentinel, free_port
from tests.kit.wait import eventually
from worker.transport import register

from .broker import push, stop_fetching, stop_heartbeats

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


def test_an_acknowledgement_survives_a_crash_of_redis(server_folder):
    with Broker(server_folder, *DURABLE) as broker:
        broker.client.lpush("tokens", message(1), message(2))
        with consuming(broker.url) as consumer:
            first, second = consumer.drain_until(2)
            broker.kill()
            first.ack()  # after a commit; Redis cannot know of it
            with pytest.raises(consumer.connection.connection_errors):
                consumer.drain_until(3)
            assert len(consumer.channel.pending) == 1
            consumer.abandon()
        broker.start()
        with consuming(broker.url, "other") as consumer:
            consumer.turn()
            assert broker.client.hkeys("unacked") == [second.delivery_tag.encode()]


def test_messages_that_an_outage_of_redis_interrupts_come_again_at_once_and_uncounted(server_folder):
    with Broker(server_folder, *DURABLE) as broker:
        for number in range(20):
            broker.client.lpush("tokens", message(number))
        with consuming(broker.url, visibility_timeout=1000) as consumer:
            consumer.drain_until(20)[0].ack()
            broker.kill()
        broker.start()
        with consuming(broker.url, visibility_timeout=1000) as consumer:
            consumer.drain_until(19)
            assert consumer.numbers == list(range(1, 20))
            assert all(RESTORES_HEADER not in got.headers for got in consumer.messages)


def test_closing_without_a_broker_raises_nothing_and_logs_what_happens_next(server_folder, caplog):
    with Broker(server_folder, *DURABLE) as broker:
        broker.client.lpush("tokens", message(1))
        with consuming(broker.url) as consumer:
            consumer.drain_until(1)
            broker.kill()
            consumer.connection.collect()
            consumer.connection.close()
            consumer.channel.close()
            consumer.channel._qos.restore_unacked_once()
        broker.start()
        assert broker.client.hlen("unacked") == 1
    event = "Could not requeue … unacknowledged messages (…): they are requeued with the next connection, or …."
    assert [number for number, *_ in logged(caplog.messages, event)] == ["1"]


def test_a_full_redis_is_drained(server_folder):
    with Broker(server_folder, "--maxmemory-policy", "noeviction") as broker:
        client = broker.client
        with consuming(broker.url) as consumer:
            consumer.drain(0.1)
            client.lpush("tokens", *[message(number, body="x" * 1000) for number in range(500)])
            client.lpush(key("tokens", 6), b"\xff")
            client.config_set("maxmemory", "1mb")
            with pytest.raises(redis.OutOfMemoryError):
                client.lpush("tokens", message(0))
            for got in consumer.drain_until(501):
                got.ack()
            consumer.turn()
            assert client.keys("*") == []
            assert consumer.messages[-1].headers["task"] == UNDECODABLE_TASK
            commands = client.info("stats")["total_commands_processed"]
            consumer.drain(1)
            assert client.info("stats")["total_commands_processed"] - commands < 2000, "it spins: BLMOVE is refused"


def test_every_operation_works_while_redis_is_full(server_folder, caplog):
    with Broker(server_folder) as broker, consuming(broker.url, visibility_timeout=10) as consumer:
        client, qos = broker.client, consumer.channel.qos
        push(client, b"\xff", message(1))
        consumer.drain_until(2)
        stop_fetching(consumer)
        stop_heartbeats(client)
        client.config_set("maxmemory", "1")
        qos.restore_visible()
        consumer.channel.resume()
        *_, undecodable, suspect = consumer.drain_until(4)
        assert (undecodable.headers["task"], suspect.headers[RESTORES_HEADER]) == (UNDECODABLE_TASK, 1)
        assert "Could not record an undecodable message" not in caplog.text
        qos.heartbeat()
        qos.record_solo_attempt(suspect.delivery_tag)
        qos.undo_solo_attempts(suspect.delivery_tag, 1)
        qos.requeue([suspect.delivery_tag])
        for got in (undecodable, consumer.drain_until(5)[-1]):
            got.ack()
        consumer.turn()
        assert client.keys("*") == []


def test_a_consumer_that_starts_while_redis_is_full_drains_it_with_a_warning(server_folder, caplog):
    with Broker(server_folder, "--maxmemory-policy", "noeviction") as broker:
        client = broker.client
        client.lpush("tokens", message(1))
        client.config_set("maxmemory", "1")
        queue = kombu.Queue("tokens", kombu.Exchange("tokens", type="direct"), routing_key="tokens")
        with kombu.Connection(broker.url, transport=OURS) as connection:
            got = []
            kombu.Consumer(connection.channel(), [queue], on_message=got.append).consume()
            eventually(lambda: connection.drain_events(timeout=60) or got)
        ((name, _),) = logged(caplog.messages, "Redis is full: consuming … without storing its binding (…).")
        assert name == "tokens"


def test_a_refusal_of_redis_is_logged_once_and_tried_again(broker_url, broker, caplog):
    with consuming(broker_url) as consumer:
        broker.set("unacked", "of a wrong type")
        broker.lpush("tokens", message(1))
        eventually(lambda: consumer.turn() or consumer.channel.fetcher.refusal)
        consumer.drain(0.3)
        assert consumer.messages == []
        assert broker.llen("tokens") == 1
        assert "WRONGTYPE" in consumer.channel.fetcher.refusal
        assert len(logged(caplog.messages, "Redis rejects the worker's commands; retrying every second: …")) == 1
        broker.delete("unacked")
        consumer.drain_until(1)
        eventually(lambda: consumer.turn() or consumer.channel.fetcher.refusal is None)


def test_scripts_that_redis_forgot_are_loaded_again(broker_url, broker):
    with consuming(broker_url) as consumer:
        for number in range(3):
            broker.script_flush()
            broker.lpush(key("tokens", 3 * number), message(number))
            consumer.drain_until(number + 1)[-1].ack()
        consumer.turn()
        assert broker.keys("*") == []


def test_celerys_loop_gets_messages_of_every_list_and_survives_a_cut_connection(broker_url, broker):
    with consuming(broker_url) as consumer:
        hub = Hub()
        consumer.connection.register_with_event_loop(hub)
        loop = hub.create_loop()
        for number in range(8):
            broker.lpush(key("tokens", PRIORITY_STEPS[number % 4]), message(number))
            eventually(lambda number=number: next(loop) or len(consumer.messages) > number)
            consumer.messages[number].ack()
            if number == 3:
                consumer.channel.client.connection.disconnect()
        eventually(lambda: next(loop) or not broker.keys("*"))
        hub.close()


def test_it_works_over_tls(server_folder, requires_program):
    program = requires_program("redis-server")
    certificate = Certificate.create(server_folder, requires_program("openssl"))
    port = free_port()
    with Broker(server_folder, *certificate.server_options(port), program=program) as broker:
        for step in PRIORITY_STEPS:
            broker.client.lpush(key("tokens", step), *map(message, range(200)))
        ssl = {"ssl_ca_certs": str(certificate.certificate), "ssl_cert_reqs": "required"}
        with kombu.Connection(f"rediss://127.0.0.1:{port}/0", transport=OURS, ssl=ssl) as connection:
            consumer = Consumer(connection)
            for got in consumer.drain_until(800)[:-1]:
                got.ack()
            consumer.channel.flush_pending()
        assert broker.client.llen(key("tokens", 9)) == 1
        assert broker.client.dbsize() == 1


def test_it_follows_a_failover_of_three_sentinels(own_aliases, tmp_path):
    register()  # where kombu moves on from one sentinel to the next, the scheme of the URL chooses the transport
    with (
        Broker(tmp_path / "master", *DURABLE) as master,
        Broker(tmp_path / "replica", *DURABLE) as replica,
        Sentinel(tmp_path / "s") as one,
        Sentinel(tmp_path / "s") as two,
        Sentinel(tmp_path / "s") as three,
    ):
        replica.client.replicaof("127.0.0.1", master.port)
        eventually(lambda: replica.client.info("replication")["master_link_status"] == "up")
        sentinels = [one.client, two.client, three.client]
        for each in sentinels:
            each.execute_command("SENTINEL", "MONITOR", "tokens", "127.0.0.1", master.port, 2)
            each.execute_command("SENTINEL", "SET", "tokens", "down-after-milliseconds", 500)
            each.execute_command("SENTINEL", "SET", "tokens", "failover-timeout", 3000)
        for seen, count in (("num-other-sentinels", 2), ("num-slaves", 1)):
            eventually(
                lambda seen=seen, count=count: all(e.sentinel_master("tokens")[seen] == count for e in sentinels)
            )
        url = ";".join(f"sentinel://127.0.0.1:{each.port}/0" for each in (one, two, three))
        options = {"transport": None, "master_name": "tokens"}

        master.client.lpush("tokens", message(1), message(2))
        with consuming(url, **options) as consumer:
            consumer.drain_until(2)[0].ack()
            consumer.channel.flush_pending()
            client = master.client
            client.set("the replica", "is up to date")  # WAIT waits for the writes of its own connection
            assert client.wait(1, 60_000) == 1
            master.kill()
            with pytest.raises(consumer.connection.connection_errors):
                consumer.drain_until(3)

        def received():
            try:
                with consuming(url, **options) as consumer:
                    return consumer.drain_until(1)
            except (redis.RedisError, OSError):
                return None

        assert [got.headers["number"] for got in eventually(received)] == [2]
