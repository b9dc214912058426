"""The transport while processes and brokers die, freeze, fill up and move: nothing is lost, and the worker lives on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import kombu
import pytest
import redis
from kombu.asynchronous import Hub

from schema import messages
from tests.kit.brokers import OURS, Broker, Sentinel, consuming, eventually, free_port, key, message, queue_of
from tests.kit.logs import logged
from worker.transport.channel import SentinelTransport

HERE = Path(__file__).parent
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


@contextmanager
def process(url, visibility_timeout=1.0):
    """A consumer in a process of its own, that consumes."""
    command = [sys.executable, str(HERE / "consume.py"), url, OURS, str(visibility_timeout)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=HERE.parent, env={"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    ) as it:
        try:
            assert it.stdout.readline() == b"consuming\n"
            yield it
        finally:
            it.send_signal(signal.SIGCONT)
            it.kill()


def all_done(client, count):
    return client.scard("done") == count and not client.exists("tokens", "unacked", "unacked_index")


def test_nothing_is_lost_when_consumers_are_killed_at_any_instant(broker_url):
    count = 30_000
    with redis.Redis.from_url(broker_url) as client:
        for start in range(0, count, 1000):
            client.lpush("tokens", *[message(number) for number in range(start, start + 1000)])
        kills = 0
        deadline = time.monotonic() + 9
        while client.llen("tokens") and (time.monotonic() < deadline or kills < 5):
            with process(broker_url):
                time.sleep(random.uniform(0, 0.3))
            kills += 1
        print(f"{kills} kills, {client.scard('done')} done by then")
        assert kills > 3, "the machine was so fast that too few were killed with work in hand"
        with process(broker_url):
            eventually(lambda: all_done(client, count), 60)


def test_a_frozen_consumer_loses_nothing_and_its_messages_are_restored(broker_url):
    with redis.Redis.from_url(broker_url) as client, process(broker_url) as frozen:
        sent = freeze_with_a_message(frozen, client)
        with process(broker_url):
            eventually(lambda: all_done(client, sent))
            frozen.send_signal(signal.SIGCONT)
            client.lpush("tokens", message(sent + 1))
            eventually(lambda: all_done(client, sent + 1))


def freeze_with_a_message(consumer, client):
    """Freeze an idle consumer so that Redis gives it one more message; how many were sent to it.

    It asks again every tenth of a second. Frozen just in between, it gets nothing, and another try is due.
    """
    for number in range(1, 50):
        eventually(lambda: all_done(client, number - 1))  # noqa: B023
        time.sleep(0.3)  # it is idle, and waits
        consumer.send_signal(signal.SIGSTOP)
        client.lpush("tokens", message(number))
        with suppress(AssertionError):
            eventually(lambda: client.hlen("unacked") == 1, 0.5)
            return number
        consumer.send_signal(signal.SIGCONT)
    raise AssertionError("Redis never gave it a message")


def test_a_terminated_consumer_leaves_nothing_behind(broker_url):
    with redis.Redis.from_url(broker_url) as client, process(broker_url, 1000) as consumer:
        client.lpush("tokens", *map(message, range(5000)))
        eventually(lambda: client.scard("done") > 100)
        consumer.terminate()
        assert consumer.wait(10) == 0
        assert client.exists("unacked", "unacked_index") == 0
        assert client.llen("tokens") + client.scard("done") == 5000


def test_a_consumer_outlives_crashes_of_redis_and_loses_nothing(server_folder):
    with Broker(server_folder, *DURABLE) as broker, process(broker.url) as consumer:
        for round_ in range(3):
            broker.client.lpush("tokens", *map(message, range(round_ * 300, (round_ + 1) * 300)))
            time.sleep(random.uniform(0, 0.1))
            broker.kill()
            time.sleep(0.2)
            broker.start()
        eventually(lambda: all_done(broker.client, 900), 30)
        assert consumer.poll() is None


def test_an_acknowledgement_survives_a_crash_of_redis(server_folder):
    with Broker(server_folder, *DURABLE) as broker:
        broker.client.lpush("tokens", message(1), message(2))
        with consuming(broker.url) as consumer:
            first, _ = consumer.drain_until(2)
            broker.kill()
            first.ack()  # the commit is done, Redis cannot know
            with pytest.raises(consumer.connection.connection_errors):
                consumer.drain(1)
            assert len(consumer.channel.owed) >= 1
        broker.start()
        with consuming(broker.url) as consumer:
            consumer.turn()
            assert broker.client.hlen("unacked") == 1


def test_an_outage_of_redis_is_not_counted_against_messages_nor_waited_for(server_folder):
    with Broker(server_folder, *DURABLE) as broker:
        originals = [message(number) for number in range(20)]
        for original in originals:
            broker.client.lpush("tokens", original)
        with consuming(broker.url, visibility_timeout=1000) as consumer:
            consumer.drain_until(20)[0].ack()
            broker.kill()
        broker.start()
        with consuming(broker.url, visibility_timeout=1000) as consumer:
            consumer.drain_until(19)
            assert consumer.numbers == list(range(1, 20))
            assert all(messages.RESTORES_HEADER not in got.headers for got in consumer.messages)


def test_closing_without_a_broker_raises_nothing_and_says_what_happens_next(server_folder, caplog):
    with Broker(server_folder, *DURABLE) as broker:
        broker.client.lpush("tokens", message(1))
        connection = kombu.Connection(broker.url, transport=OURS)
        channel = connection.channel()
        got = []
        kombu.Consumer(channel, [queue_of("tokens")], on_message=got.append).consume()
        connection.drain_events(timeout=5)
        broker.kill()
        connection.collect()
        connection.close()
        channel.close()
        channel._qos.restore_unacked_once()
        broker.start()
        assert broker.client.hlen("unacked") == 1
    said = "Could not put … unacknowledged messages back (…): they go with the next connection, else in … s."
    assert [number for number, *_ in logged(caplog.messages, said)] == ["1"]


@pytest.mark.parametrize("with_loop", [True, False])
def test_a_full_redis_is_drained(server_folder, with_loop):
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
            assert consumer.messages[-1].headers["task"] == messages.UNDECODABLE_TASK
            commands = client.info("stats")["total_commands_processed"]
            consumer.drain(1)
            assert client.info("stats")["total_commands_processed"] - commands < 2000, "idles, though BLMOVE is refused"


def test_a_worker_that_starts_while_redis_is_full_drains_it_and_tells(server_folder, caplog):
    with Broker(server_folder, "--maxmemory-policy", "noeviction") as broker:
        client = broker.client
        client.lpush("tokens", message(1))
        client.config_set("maxmemory", "1")
        queue = kombu.Queue("tokens", kombu.Exchange("tokens", type="direct"), routing_key="tokens")
        with kombu.Connection(broker.url, transport=OURS) as connection:
            got = []
            kombu.Consumer(connection.channel(), [queue], on_message=got.append).consume()
            eventually(lambda: connection.drain_events(timeout=5) or got)
        (said,) = logged(caplog.messages, "Redis is full: … is consumed without a note of its binding (…).")
        assert said[0] == "tokens"


def test_what_redis_refuses_is_tried_again_and_told(broker_url, caplog):
    with redis.Redis.from_url(broker_url) as client, consuming(broker_url) as consumer:
        client.set("unacked", "of a wrong type")
        client.lpush("tokens", message(1))
        consumer.drain(0.5)
        assert consumer.messages == []
        assert client.llen("tokens") == 1
        assert "WRONGTYPE" in consumer.channel.refusal
        assert len(logged(caplog.messages, "Redis refuses its part, the worker tries again every second: …")) == 1
        client.delete("unacked")
        consumer.drain_until(1)
        assert consumer.channel.refusal is None


def test_scripts_that_redis_forgot_are_loaded_again(broker_url):
    with redis.Redis.from_url(broker_url) as client, consuming(broker_url) as consumer:
        for number in range(3):
            client.script_flush()
            client.lpush(key("tokens", 3 * number), message(number))
            consumer.drain_until(number + 1)[-1].ack()
        consumer.turn()
        assert client.keys("*") == []


def test_celerys_loop_gets_messages_of_every_list_and_survives_a_cut_connection(broker_url):
    with redis.Redis.from_url(broker_url) as client, kombu.Connection(broker_url, transport=OURS) as connection:
        got = []
        with kombu.Consumer(connection.channel(), [queue_of("tokens")], on_message=got.append) as consumer:
            hub = Hub()
            connection.register_with_event_loop(hub)
            loop = hub.create_loop()
            for number in range(8):
                client.lpush(key("tokens", (0, 3, 6, 9)[number % 4]), message(number))
                deadline = time.monotonic() + 5
                while len(got) <= number and time.monotonic() < deadline:
                    next(loop)
                got[number].ack()
                if number == 3:
                    consumer.channel.client.connection.disconnect()
            for _ in range(5):
                next(loop)
            assert client.keys("*") == []
            hub.close()


def test_it_works_over_tls(server_folder, requires_program):
    program, openssl = requires_program("redis-server"), requires_program("openssl")
    server_folder.mkdir(parents=True)
    cert, secret = server_folder / "cert.pem", server_folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    files = ["-keyout", str(secret), "-out", str(cert)]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    port = free_port()
    tls = (
        "--tls-port",
        str(port),
        "--tls-cert-file",
        str(cert),
        "--tls-key-file",
        str(secret),
        "--tls-auth-clients",
        "no",
    )
    with Broker(server_folder, *tls, program=program) as broker:
        for step in (0, 3, 6, 9):
            broker.client.lpush(key("tokens", step), *map(message, range(200)))
        ssl = {"ssl_ca_certs": str(cert), "ssl_cert_reqs": "required"}
        url = f"rediss://127.0.0.1:{port}/0"
        with kombu.Connection(url, transport=OURS, ssl=ssl) as connection:
            got = []
            with kombu.Consumer(connection.channel(), [queue_of("tokens")], on_message=got.append) as consumer:
                while len(got) < 800:
                    connection.drain_events(timeout=5)
                for each in got[:-1]:
                    each.ack()
                consumer.channel.settle()
        assert broker.client.llen("tokens\x06\x169") == 1
        assert broker.client.dbsize() == 1


def test_it_follows_a_failover_of_three_sentinels(tmp_path):
    with Broker(tmp_path / "master", *DURABLE) as master, Broker(tmp_path / "replica", *DURABLE) as replica:
        replica.client.replicaof("127.0.0.1", master.port)
        eventually(lambda: replica.client.info("replication")["master_link_status"] == "up", 20)
        with Sentinel(tmp_path / "s") as one, Sentinel(tmp_path / "s") as two, Sentinel(tmp_path / "s") as three:
            sentinels = (one, two, three)
            for each in sentinels:
                each.client.execute_command("SENTINEL", "MONITOR", "tokens", "127.0.0.1", master.port, 2)
                each.client.execute_command("SENTINEL", "SET", "tokens", "down-after-milliseconds", 500)
                each.client.execute_command("SENTINEL", "SET", "tokens", "failover-timeout", 3000)
            eventually(
                lambda: all(each.client.sentinel_master("tokens")["num-other-sentinels"] == 2 for each in sentinels), 20
            )
            eventually(lambda: all(each.client.sentinel_master("tokens")["num-slaves"] == 1 for each in sentinels), 20)
            url = ";".join(f"sentinel://127.0.0.1:{each.port}/0" for each in sentinels)
            options = {"master_name": "tokens", "socket_timeout": 2, "visibility_timeout": 2}
            options |= {"unacked_restore_interval": 0.2, "unacked_restore_throttle": 1}
            transport = f"{SentinelTransport.__module__}:SentinelTransport"
            master.client.lpush("tokens", message(1))
            done = []
            followed = False
            deadline = time.monotonic() + 120
            while set(done) != {1, 2} and time.monotonic() < deadline:
                connection = kombu.Connection(url, transport=transport, transport_options=options)
                try:
                    with kombu.Consumer(
                        connection.channel(),
                        [queue_of("tokens")],
                        on_message=lambda got: (done.append(got.headers["number"]), got.ack()),
                    ):
                        while set(done) != {1, 2}:
                            if 1 in done and not followed:  # again, should one of these commands be cut off
                                if master.process.poll() is None:
                                    master.client.wait(1, 1000)
                                    master.kill()
                                eventually(lambda: replica.client.info("replication")["role"] == "master", 30)
                                replica.client.lpush("tokens", message(2))
                                followed = True
                            connection.drain_events(timeout=1)
                except TimeoutError:
                    continue
                except (*connection.connection_errors, redis.sentinel.MasterNotFoundError):
                    time.sleep(0.2)
                finally:
                    connection.close()
            assert set(done) == {1, 2}
