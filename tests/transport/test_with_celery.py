"""Celery's own machinery on the transport: workers, remote control, events, Flower, and a Redis that restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from tests.kit.brokers import Broker, eventually, free_port, message

HERE = Path(__file__).parent


@contextmanager
def celery(url, *arguments, log=None):
    """`celery -A transport_app …` in a process of its own."""
    environment = os.environ | {"TRANSPORT_APP_URL": url, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    command = [sys.executable, "-m", "celery", "-A", "transport_app", *arguments]
    with subprocess.Popen(command, env=environment, cwd=HERE, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def worker(url, log, *more, name="one@host"):
    options = ["worker", "-P", "threads", "-c", "2", "-n", name, "-l", "INFO", *more]
    with log.open("ab") as file, celery(url, *options, log=file) as process:
        eventually(lambda: f"{name} ready." in log.read_text(), 30)
        yield process


def inspect(url, *arguments):
    environment = os.environ | {"TRANSPORT_APP_URL": url, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    command = [sys.executable, "-m", "celery", "-A", "transport_app", "inspect", *arguments, "--timeout", "5"]
    return subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=True).stdout


def send(client, numbers):
    for number in numbers:
        body = f'[[{number}], {{}}, {{"callbacks": null, "errbacks": null, "chain": null, "chord": null}}]'
        headers = {"task": "transport_app.note", "id": f"id-{number}", "lang": "py", "argsrepr": str(number)}
        client.lpush("tokens", message(body=body, headers=headers))


def test_workers_apply_answer_and_are_watched(broker_url, tmp_path):
    with redis.Redis.from_url(broker_url) as client:
        send(client, range(200))
        port = free_port()
        with worker(broker_url, tmp_path / "one"), worker(broker_url, tmp_path / "two", name="two@host"):
            eventually(lambda: client.scard("done") == 200 and not client.exists("unacked", "tokens"), 30)
            assert "sync with 1 nodes" in (tmp_path / "two").read_text(), "mingle found the first"
            assert inspect(broker_url, "ping").count("pong") == 2
            assert '"tokens"' in inspect(broker_url, "active_queues", "--json")
            with celery(broker_url, "flower", f"--port={port}", "--address=127.0.0.1", log=subprocess.DEVNULL):
                eventually(lambda: "tokens" in page(f"http://127.0.0.1:{port}/broker"), 30)


def page(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def test_a_worker_that_is_terminated_leaves_nothing_unacknowledged(broker_url, tmp_path):
    with redis.Redis.from_url(broker_url) as client:
        send(client, range(3000))
        with worker(broker_url, tmp_path / "log") as process:
            eventually(lambda: client.scard("done") > 50, 30)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        assert client.exists("unacked", "unacked_index") == 0
        assert client.llen("tokens") + client.scard("done") == 3000


@pytest.mark.parametrize("lean", [False, True], ids=["all defaults", "without mingle, gossip and heartbeat"])
def test_a_worker_outlives_crashes_of_redis(server_folder, tmp_path, lean):
    """With kombu's own transport it dies of them (NoneType has no attribute hostname)."""
    log = tmp_path / "log"
    options = ["--without-mingle", "--without-gossip", "--without-heartbeat"] if lean else []
    with (
        Broker(server_folder, "--appendonly", "yes", "--appendfsync", "always") as broker,
        worker(broker.url, log, *options) as process,
    ):
        for start in (0, 500):
            send(broker.client, range(start, start + 500))
            eventually(lambda start=start: broker.client.scard("done") > start + 20, 40)
            broker.kill()
            broker.start()
        eventually(lambda: broker.client.scard("done") == 1000, 60)
        eventually(lambda: not broker.client.exists("unacked", "tokens"), 30)
        assert process.poll() is None
        assert "Unrecoverable error" not in log.read_text()
