"""Flower, through its API and in a browser: every event with its arguments and result; no access for other sites."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psutil
import pytest
import redis
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

    def answer(self, path: str, method: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, Any, str]:
        """Send a request; returns status, headers and text of the answer."""
        request = Request(self.url + path, body, headers, method=method)
        try:
            with urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except HTTPError as refused:
            with refused:
                return refused.code, refused.headers, refused.read().decode()

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
    ids=["by itself", "as configured"],
)
def test_flower_listens_on_loopback_and_lists_what_became_of_each_task(broker_url, variables, columns):
    flower = Flower(broker_url, **variables)
    try:
        assert {each.laddr.ip for each in flower.process.net_connections() if each.status == "LISTEN"} == {"127.0.0.1"}
        assert [head.strip() for head in re.findall("<th [^>]*>(.*)</th>", flower.text("/tasks"))] == columns
    finally:
        flower.close()


SEND = "/api/task/send-task/tokens.accrue"
MINT = json.dumps({"kwargs": {"user_id": "eve", "amount": "777", "source": "gift", "idempotency_key": "k"}})
PASSWORD = "operator:hush"
CREDENTIALS = {"Authorization": f"Basic {base64.b64encode(PASSWORD.encode()).decode()}"}


@pytest.fixture(params=[{}, {"FLOWER_BASIC_AUTH": PASSWORD}], ids=["without a password", "with one"])
def protected(request, broker_url) -> Iterator[tuple[Flower, dict[str, str]]]:
    """A Flower, and the headers with which its API accepts requests."""
    flower = Flower(broker_url, TOKENTRAIL_ALLOWED_HOSTS="flower, flower.example", **request.param)
    yield flower, CREDENTIALS if request.param else {}
    flower.close()


def test_flower_answers_to_ip_addresses_and_its_own_host_names_only(protected):
    flower, credentials = protected
    accepted = (
        "127.0.0.1",
        "[::1]:5555",
        "localhost:5555",
        "x.localhost",
        socket.gethostname(),
        "Flower:1",
        "flower.example",
    )
    for path in ("/", "/healthcheck", "/metrics", "/tasks", "/api/tasks", "/static/js/flower.js"):
        for host in accepted:
            assert flower.answer(path, "GET", None, credentials | {"Host": host})[0] == 200, (path, host)
        for host in ("evil.example", "evil.example:5555", "127.0.0.1.evil.example", "flower.example.evil.example"):
            for method in ("GET", "POST", "OPTIONS"):
                status, headers, text = flower.answer(path, method, None, credentials | {"Host": host})
                assert status == 421, (path, host, method)
                assert headers["Content-Type"] == "text/plain; charset=utf-8"
                assert text.count("\n") == 1
                assert "TOKENTRAIL_ALLOWED_HOSTS" in text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # a program
        ({"Origin": "{url}"}, 200),
        ({"Origin": "{url}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://flower.example", "Host": "flower.example"}, 200),  # behind a gateway that ends TLS
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "{url}", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_flower_changes_nothing_for_a_page_of_another_site(protected, broker_url, headers, status):
    flower, credentials = protected
    headers = {name: value.format(url=flower.url) for name, value in headers.items()}
    for method, path in (("POST", SEND), ("POST", "/api/worker/shutdown/w"), ("PUT", SEND), ("OPTIONS", SEND)):
        found, said, _ = flower.answer(path, method, MINT.encode(), credentials | headers)
        assert status == 200 or found == 403, (method, path)
        assert not [name for name in said if name.startswith("Access-Control")]
        if (method, path) == ("POST", SEND):
            assert found == status
    with redis.Redis.from_url(broker_url) as broker:
        assert broker.llen("tokens") == (1 if status == 200 else 0)

    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    assert status == 200 or flower.answer("/", "GET", None, credentials | headers | upgrade)[0] == 403
    status, said, _ = flower.answer("/", "GET", None, credentials | headers)
    assert status == 200, "links from other sites work"
    assert said["X-Frame-Options"] == "DENY"
    assert not [name for name in said if name.startswith("Access-Control")]


#: A page of another site. It reads what it can, then sends what would issue 777 tokens and stop a worker.
PAGE = """
<!doctype html><title>under way</title><script>
(async () => {
  const flower = "FLOWER", read = [];
  for (const path of ["/api/tasks", "/api/workers", "/tasks", "/metrics"])
    for (const credentials of ["omit", "include"])
      await fetch(flower + path, {credentials}).then(answer => answer.text()).then(text => read.push(text), () => {});
  for (const path of ["SEND", "/api/worker/shutdown/w"])
    for (const credentials of ["omit", "include"])
      for (const mode of ["cors", "no-cors"])
        for (const type of ["text/plain", "application/json"])
          await fetch(flower + path, {method: "POST", mode, credentials, body: 'MINT', headers: {"Content-Type": type}})
            .then(answer => answer.text()).then(text => text && read.push(text), () => {});
  window.read = read;
  document.title = "done";
})();
</script>
"""


class Site(BaseHTTPRequestHandler):
    page = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def test_a_page_of_another_site_can_neither_read_flower_nor_send_tasks(protected, broker_url, requires_program):
    """In a browser that has just shown Flower, and knows its password if there is one."""
    chromium = requires_program("chromium")
    flower, credentials = protected
    page = PAGE.replace("FLOWER", flower.url).replace("SEND", SEND).replace("MINT", MINT)
    site = ThreadingHTTPServer(("127.0.0.1", 0), type("Evil", (Site,), {"page": page.encode()}))
    threading.Thread(target=site.serve_forever).start()
    port = urlsplit(flower.url).port
    try:
        with sync_playwright() as playwright, redis.Redis.from_url(broker_url) as broker:
            names = "--host-resolver-rules=MAP evil.example 127.0.0.1"
            browser = playwright.chromium.launch(executable_path=chromium, args=(*CHROMIUM, names))
            login = {"username": "operator", "password": "hush"} if credentials else None
            tab = browser.new_context(http_credentials=login).new_page()
            tab.goto(f"{flower.url}/tasks")
            expect(tab).to_have_title(re.compile("Flower"))

            for address in (f"http://evil.example:{site.server_port}", f"http://localhost:{site.server_port}"):
                tab.goto(address)
                expect(tab).to_have_title("done", timeout=20_000)
                assert tab.evaluate("window.read") == []
                assert broker.llen("tokens") == 0

            # DNS rebinding: the page's own name points to Flower.
            assert tab.goto(f"http://evil.example:{port}/tasks").status == 421

            # The counter-proof: Flower's own page can send the task.
            tab.goto(f"{flower.url}/tasks")
            sent = "([path, body]) => fetch(path, {method: 'POST', body}).then(answer => answer.status)"
            assert tab.evaluate(sent, [SEND, MINT]) == 200
            assert broker.llen("tokens") == 1
            browser.close()
    finally:
        site.shutdown()
        site.server_close()
