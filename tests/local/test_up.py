"""`tokentrail up`, `demo` and `worker --processes` as processes: they start, answer, and leave nothing running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from threading import Thread
from urllib.error import HTTPError

import psutil
import pytest

from tests.kit.http import get, status
from tests.kit.servers import free_port
from tests.kit.stage import LISTED
from tests.kit.wait import PATIENCE, eventually
from worker.local.up import Service, UpError
from worker.processes import Child, Family
from worker.read.connection import read_once
from worker.read.supply import read_supply


class Command:
    """A `tokentrail …` in its own process, and what it has printed."""

    def __init__(self, home, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", *arguments],
            env={**os.environ, "TOKENTRAIL_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines = []
        self._reader = Thread(target=lambda: self._lines.extend(self.process.stdout))
        self._reader.start()

    def wait_for(self, text):
        eventually(lambda: text in self.printed or self.process.poll() is not None, text)
        assert text in self.printed, self.printed

    @property
    def printed(self):
        return "".join(self._lines)

    def descendants(self):
        """Its worker, API, Flower, guard, PostgreSQL and Valkey, and all their processes."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait(self):
        """Its exit code, once it has ended."""
        code = self.process.wait(PATIENCE)
        self._reader.join()
        self.process.stdout.close()
        return code


def have_ended(processes):
    return all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in processes)


@pytest.fixture
def tokentrail(tmp_path):
    """`tokentrail("up")` starts that command; all commands that a test leaves are killed."""
    started = []

    def start(*arguments):
        started.append(Command(tmp_path, *arguments))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            descendants = command.descendants()
            command.process.kill()
            command.wait()
            eventually(lambda descendants=descendants: have_ended(descendants), str(descendants))


def test_up_runs_everything_and_leaves_nothing_running(tokentrail, tmp_path):
    up = tokentrail("up")
    up.wait_for("tokentrail is running")

    addresses = tmp_path / "servers.json"
    assert addresses.stat().st_mode & 0o777 == 0o600  # it holds passwords
    urls = json.loads(addresses.read_text())
    assert urls["api_url"] in up.printed
    up.wait_for(urls["flower_url"])
    assert get(f"{urls['api_url']}/healthz") == '{"status":"ok"}'
    assert "Flower" in get(urls["flower_url"])

    # Other commands in this folder find the servers.
    publish = tokentrail("publish", "--type", "accrual", "--user", "alice", "--amount", "1.50", "--source", "shop")
    assert publish.wait() == 0, publish.printed
    history = f"{urls['api_url']}/api/account/transaction-history?userId=alice"
    eventually(lambda: json.loads(get(history))["pagination"]["total"] == 1)
    shown = tokentrail("history", "alice")
    assert shown.wait() == 0
    assert "+1.5" in shown.printed
    eventually(lambda: "tokens.accrue" in get(urls["flower_url"] + LISTED))
    with pytest.raises(HTTPError, match="401"):  # no page that an operator visits can send tasks
        get(f"{urls['flower_url']}/api/tasks")

    # Only this user can read or write the files.
    data = tmp_path / "data"
    files = [tmp_path / "up.lock", data / "password", *data.glob("*.lock"), *(data / "logs").iterdir()]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == 7 * ["0o600"], files

    # A second `up` of this folder does not start.
    second = tokentrail("up")
    assert second.wait() == 1
    (line,) = second.printed.splitlines()
    assert f"process {up.process.pid}" in line
    assert urls["api_url"] in line

    # An API or Flower that was killed is restarted with the same URL.
    for name, path in (("api", "/healthz"), ("flower", "/healthcheck")):
        (child,) = (
            each for each in up.descendants() if f"--port={urls[f'{name}_url'][17:]}" in "=".join(each.cmdline())
        )
        child.kill()
        up.wait_for(f"{name} (pid {child.pid}) was killed by SIGKILL")
        eventually(lambda url=urls[f"{name}_url"] + path: status(url) == 200)

    # A worker that was killed is restarted.
    (worker,) = (each for each in up.descendants() if "celeryd: worker@" in " ".join(each.cmdline()))
    worker.kill()
    up.wait_for(f"worker (pid {worker.pid}) was killed by SIGKILL; restarting in 1 s")
    again = tokentrail("publish", "--type", "burn", "--user", "alice", "--amount", "1", "--action", "chat")
    assert again.wait() == 0
    eventually(lambda: json.loads(get(history))["pagination"]["total"] == 2)

    descendants = up.descendants()
    assert len(descendants) >= 6
    up.process.send_signal(signal.SIGINT)
    assert up.wait() == 0
    assert have_ended(descendants), descendants
    assert "nothing is left running" in up.printed
    assert "Traceback" not in up.printed
    assert not addresses.exists()


def test_a_killed_up_ends_all_its_processes_and_the_data_is_kept(tokentrail, tmp_path):
    def records():
        url = json.loads((tmp_path / "servers.json").read_text())["api_url"]
        return json.loads(get(f"{url}/api/account/transaction-history?userId=alice"))["pagination"]["total"]

    up = tokentrail("up")
    up.wait_for("tokentrail is running")
    publish = tokentrail("publish", "--type", "accrual", "--user", "alice", "--amount", "1", "--source", "shop")
    assert publish.wait() == 0
    eventually(lambda: records() == 1)

    descendants = up.descendants()
    up.process.kill()
    up.wait()
    eventually(lambda: have_ended(descendants), str(descendants))

    # The next `up` ignores the addresses that the killed one left.
    up = tokentrail("up")
    up.wait_for("tokentrail is running")
    assert records() == 1
    up.process.send_signal(signal.SIGHUP)  # the terminal was closed
    assert up.wait() == 0


@pytest.mark.usefixtures("own_servers")
def test_up_uses_the_servers_that_are_set_and_reports_a_part_that_does_not_start(tokentrail, monkeypatch):
    monkeypatch.setenv("FLOWER_PERSISTENT", "nonsense")
    up = tokentrail("up")
    assert up.wait() == 1
    assert "PostgreSQL and Valkey" not in up.printed
    assert "nonsense" in up.printed
    assert up.printed.splitlines()[-1].startswith("tokentrail: flower (pid ")


def test_services_that_start_at_once_never_get_the_same_port():
    """`up` holds the port before it starts the child, so another program's answers are never taken for the child's."""
    services = [Service("flower", "127.0.0.1", free_port(), "/healthcheck")]
    services += [Service("flower", "127.0.0.1", int(services[0].arguments[4]), "/healthcheck") for _ in range(2)]
    try:
        for service in services:
            service.listen()
        assert len({service.url for service in services}) == len(services)
    finally:
        for service in services:
            service.close()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("::", "http://[::1]:8000"),
    ],
)
def test_a_service_has_a_url_that_this_machine_can_open(host, url):
    assert Service("api", host, 8000, "/readyz").url == url


def test_a_service_that_finds_no_free_port_names_its_setting():
    service = Service("flower", "127.0.0.1", 65_535, "/healthcheck")
    with (
        contextlib.suppress(OSError),
        socket.create_server(("127.0.0.1", 65_535)),
        pytest.raises(UpError, match=r"65535 .* TOKENTRAIL_FLOWER_PORT"),
    ):
        service.listen()


@pytest.mark.usefixtures("own_servers")
def test_a_service_that_does_not_answer_in_time_stops_everything(tmp_path):
    hurried = "import worker.local.up; worker.local.up._START_SECONDS = 0; from worker.cli import main; main()"
    up = subprocess.run(
        [sys.executable, "-c", hurried, "up"],
        env={**os.environ, "TOKENTRAIL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert up.returncode == 1
    assert up.stderr.startswith("tokentrail: api and flower did not answer within 0 s")


@pytest.mark.usefixtures("own_servers")
def test_up_makes_a_folder_that_only_its_user_can_write_in_whatever_the_umask(tmp_path):
    code = "import os; os.umask(0); from worker.cli import main; main()"
    environment = {**os.environ, "TOKENTRAIL_HOME": str(tmp_path / "new"), "TOKENTRAIL_API_HOST": "192.0.2.1"}
    ended = subprocess.run([sys.executable, "-c", code, "up"], env=environment, capture_output=True, check=False)
    assert b"Cannot listen on port" in ended.stderr, "it has to end soon"
    assert (tmp_path / "new").stat().st_mode & 0o022 == 0
    assert (tmp_path / "new" / "up.lock").stat().st_mode & 0o777 == 0o600


def test_a_child_that_cannot_be_restarted_is_tried_later_and_its_siblings_live(tmp_path):
    """As when the machine has no free process; here the child's folder is missing."""
    folder = tmp_path / "folder"
    folder.mkdir()
    wait = [sys.executable, "-c", "import time; time.sleep(600)"]
    family = Family()
    sibling, child = family.add(Child("sibling", wait)), family.add(Child("child", wait, cwd=folder))
    try:
        child.signal(signal.SIGKILL)
        child.process.wait()
        assert family.step() == [child]
        folder.rmdir()
        child.restart_later()
        child.restart_at = 0
        assert family.step() == [child]
        assert child.ending == "child could not be started (No such file or directory)"
        assert sibling.running
        assert child.restart_later() == 2  # seconds: the second failure in a row
        folder.mkdir()
        child.restart_at = 0
        assert family.step() == []
        assert child.running
    finally:
        family.stop([sibling, child], grace=5)


def test_the_demo_alone_runs_to_its_end(tokentrail):
    demo = tokentrail("demo", "--events", "600", "--seed", "7")
    assert demo.wait() == 0, demo.printed
    for heading in ("insufficient_tokens", "delivered again", "Balances", "Supply", "History of"):
        assert heading in demo.printed
    assert "every token is accounted for" in demo.printed.splitlines()[-1]


@pytest.mark.usefixtures("own_servers")
def test_the_demo_prints_its_report_as_json(tokentrail, tmp_path):
    tokentrail("worker", "--name", "w")
    demo = subprocess.run(
        [sys.executable, "-m", "worker.cli", "demo", "--events", "200", "--json"],
        env={**os.environ, "TOKENTRAIL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    report = json.loads(demo.stdout)
    assert sum(outcome["events"] for outcome in report["outcomes"]) == 200
    assert report["balanced"] is True
    assert report["held"] == report["supply"]["circulating"]
    assert report["history"]["pagination"]["limit"] == 10
    assert "Publishing 200 events" in demo.stderr


def test_workers_under_one_parent_are_restarted_and_the_same_run_again_moves_nothing(tokentrail, own_servers):
    workers = tokentrail("worker", "--processes", "2", "--name", "w")
    eventually(lambda: len(workers.descendants()) == 2)

    demo = tokentrail("demo", "--events", "300", "--run", "twice")
    assert demo.wait() == 0, demo.printed
    before = read_once(own_servers, read_supply, application_name="tokentrail test")

    killed = workers.descendants()[0]
    killed.kill()
    workers.wait_for(f"(pid {killed.pid}) was killed by SIGKILL; restarting in 1 s")
    demo = tokentrail("demo", "--events", "300", "--run", "twice")
    assert demo.wait() == 0, demo.printed
    assert read_once(own_servers, read_supply, application_name="tokentrail test") == before

    eventually(lambda: len(workers.descendants()) == 2)
    descendants = workers.descendants()
    assert killed not in descendants
    workers.process.terminate()
    assert workers.wait() == 0
    assert have_ended(descendants)


def test_workers_under_one_parent_end_when_it_is_killed(tokentrail, own_servers):
    workers = tokentrail("worker", "--processes", "2", "--name", "w")
    eventually(lambda: len(workers.descendants()) == 2)
    descendants = workers.descendants()
    workers.process.kill()
    workers.wait()
    eventually(lambda: have_ended(descendants), str(descendants))
