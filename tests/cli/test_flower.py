"""Flower itself, through its API and in a browser: each single event with its arguments, SUCCESS and result."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.kit.events import accrual, burn
from tests.kit.wait import eventually
from worker.config import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")


class Flower:
    """A real Flower on a port of its own."""

    def __init__(self, broker_url: str, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = psutil.Popen(
            [sys.executable, "-m", "worker.cli", "flower", "--port", str(port)],
            cwd=ROOT,
            env={**os.environ, "BROKER_URL": broker_url, "FLOWER_UNAUTHENTICATED_API": "true", **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(self._answers)

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.url}/healthcheck", timeout=1) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False

    def get(self, path: str) -> Any:
        return json.loads(self.text(path))

    def text(self, path: str) -> str:
        with urlopen(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def flower(broker_url) -> Iterator[Flower]:
    flower = Flower(broker_url)
    yield flower
    flower.close()


def test_flower_shows_each_event_with_arguments_success_and_result_and_nothing_stuck(stage, flower, requires_program):
    chromium = requires_program("chromium")
    stage.start(burn_patience=0.3)
    stage.publisher.publish_all(accrual(f"user-{n}", "0.000777", f"a{n}") for n in range(300))
    stage.publisher.publish_all([burn("ann", 5, "b"), accrual("zoe", "12.5", "order-4711")])

    eventually(lambda: len(flower.get("/api/tasks?limit=1000")) == 302)
    eventually(lambda: all(task["state"] == "SUCCESS" for task in flower.get("/api/tasks?limit=1000").values()))

    tasks = list(flower.get("/api/tasks?limit=1000").values())
    assert sum(task["result"] == "applied #1: 0 → 0.000777" for task in tasks) == 300
    assert sum(task["result"] == "rejected: insufficient tokens, 0 held, 5 asked" for task in tasks) == 1
    (zoe,) = (task for task in tasks if "order-4711" in task["kwargs"])
    assert zoe["name"] == "tokens.accrue"
    assert "'amount': '12.5'" in zoe["kwargs"]
    assert [queue["name"] for queue in flower.get("/api/queues/length")["active_queues"]] == ["tokens"]

    counted = re.findall(
        r'flower_events_total\{task="tokens\.(\w+)",type="task-succeeded",.*\} (\S+)', flower.text("/metrics")
    )
    assert dict(counted) == {"accrue": "301.0", "burn": "1.0"}, "what Prometheus reads"

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_page()
        page.goto(f"{flower.url}/task/{zoe['uuid']}")
        expect(page.locator("body")).to_contain_text("SUCCESS")
        expect(page.locator("body")).to_contain_text("applied #1: 0 → 12.5")
        expect(page.locator("body")).to_contain_text("order-4711")
        page.goto(f"{flower.url}/broker")
        expect(page.locator("body")).to_contain_text("tokens")
        browser.close()


@pytest.mark.parametrize(
    ("variables", "columns"),
    [
        ({}, ["Name", "State", "kwargs", "Result", "Received", "Runtime", "Worker", "UUID"]),
        ({"FLOWER_TASKS_COLUMNS": "name,retries"}, ["Name", "Retries"]),
    ],
    ids=["by itself", "as an operator wants it"],
)
def test_flower_listens_on_loopback_and_lists_what_became_of_each_task(broker_url, variables, columns):
    flower = Flower(broker_url, **variables)
    try:
        assert {each.laddr.ip for each in flower.process.net_connections() if each.status == "LISTEN"} == {"127.0.0.1"}
        assert [head.strip() for head in re.findall("<th [^>]*>(.*)</th>", flower.text("/tasks"))] == columns
    finally:
        flower.close()
