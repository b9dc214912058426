"""`tokentrail up` and `tokentrail demo` as processes: they come up, they answer, and nothing of them is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from threading import Thread
from urllib.error import HTTPError

import psutil
import psycopg
import pytest

from tests.kit.brokers import free_port
from tests.kit.stage import LISTED
from worker.listening import CannotListen, claim, listen
from worker.processes import Child, Family
from worker.read.supply import read_supply

SECONDS = 60  # how long anything may take before the test fails; nothing is measured


class Command:
    """A `tokentrail …` in its own process, and what it has printed."""

    def __init__(self, home, *arguments):
        environment = {**os.environ, "TOKENTRAIL_HOME": str(home)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = []
        self._reader = Thread(target=lambda: self.lines.extend(self.process.stdout))
        self._reader.start()

    def wait_for(self, text):
        until(lambda: text in self.printed() or self.process.poll() is not None, self.printed)
        assert text in self.printed(), self.printed()

    def printed(self):
        return "".join(self.lines)

    def family(self):
        """Every process of it: worker, API, Flower, guard, PostgreSQL and Valkey and their own."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait(self):
        code = self.process.wait(SECONDS)
        self._reader.join()
        self.process.stdout.close()
        return code


def until(holds, explain=str):
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


def gone(processes):
    return all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in processes)


def get(url):
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture
def tokentrail(tmp_path):
    """`tokentrail("up")`: a running command; whatever a failing test leaves is ended."""
    started = []

    def start(*arguments):
        started.append(Command(tmp_path, *arguments))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            left = command.family()
            command.process.kill()
            command.wait()
            until(lambda left=left: gone(left))


@pytest.fixture
def own_servers(database_url, broker_url, monkeypatch):
    """DATABASE_URL and BROKER_URL are set; the database's URL."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("BROKER_URL", broker_url)
    return database_url


def test_up_runs_everything_and_leaves_nothing_behind(tokentrail, tmp_path):
    up = tokentrail("up")
    up.wait_for("tokentrail is running")

    addresses = tmp_path / "servers.json"
    assert addresses.stat().st_mode & 0o777 == 0o600  # it holds passwords
    urls = json.loads(addresses.read_text())
    assert urls["api_url"] in up.printed()
    assert urls["flower_url"] in up.printed()
    assert get(f"{urls['api_url']}/healthz") == '{"status":"ok"}'
    assert "Flower" in get(urls["flower_url"])

    # A second terminal of the same folder finds them.
    publish = tokentrail("publish", "--type", "accrual", "--user", "alice", "--amount", "1.50", "--source", "shop")
    assert publish.wait() == 0, publish.printed()
    history = f"{urls['api_url']}/api/account/transaction-history?userId=alice"
    until(lambda: json.loads(get(history))["pagination"]["total"] == 1, up.printed)
    shown = tokentrail("history", "alice")
    assert shown.wait() == 0
    assert "+1.5" in shown.printed()
    until(lambda: "tokens.accrue" in get(urls["flower_url"] + LISTED), up.printed)
    with pytest.raises(HTTPError, match="401"):  # no page that its reader visits has tasks sent
        get(f"{urls['flower_url']}/api/tasks")

    # Nobody but us reads what lies there, and nobody else can have put it there.
    data = tmp_path / "data"
    kept = [tmp_path / "up.lock", data / "password", *data.glob("*.lock"), *(data / "logs").iterdir()]
    assert [oct(file.stat().st_mode & 0o777) for file in kept] == 7 * ["0o600"], kept

    # A second `up` of the same folder does not start.
    second = tokentrail("up")
    assert second.wait() == 1
    assert second.printed() == (
        f"tokentrail: `tokentrail up` runs here already (process {up.process.pid}): its API is at {urls['api_url']},"
        f" Flower at {urls['flower_url']}; stop it first, or use another folder (TOKENTRAIL_HOME).\n"
    )

    # A worker that dies is started again.
    (worker,) = (each for each in up.family() if "celeryd: worker@" in " ".join(each.cmdline()))
    worker.kill()
    up.wait_for("worker was killed by SIGKILL")
    again = tokentrail("publish", "--type", "burn", "--user", "alice", "--amount", "1", "--action", "chat")
    assert again.wait() == 0
    until(lambda: json.loads(get(history))["pagination"]["total"] == 2, up.printed)

    family = up.family()
    assert len(family) >= 6
    up.process.send_signal(signal.SIGINT)
    assert up.wait() == 0
    assert gone(family), family
    assert "nothing is left running" in up.printed()
    assert "Traceback" not in up.printed()
    assert not addresses.exists()


def test_up_that_is_killed_takes_everything_with_it_and_keeps_the_data(tokentrail, tmp_path):
    def history():
        url = json.loads((tmp_path / "servers.json").read_text())["api_url"]
        return json.loads(get(f"{url}/api/account/transaction-history?userId=alice"))["pagination"]["total"]

    up = tokentrail("up")
    up.wait_for("tokentrail is running")
    publish = tokentrail("publish", "--type", "accrual", "--user", "alice", "--amount", "1", "--source", "shop")
    assert publish.wait() == 0
    until(lambda: history() == 1, up.printed)

    family = up.family()
    up.process.kill()
    up.wait()
    until(lambda: gone(family), lambda: str(family))

    # What the killed one wrote about itself misleads nobody.
    up = tokentrail("up")
    up.wait_for("tokentrail is running")
    assert history() == 1
    up.process.send_signal(signal.SIGHUP)  # the terminal was closed
    assert up.wait() == 0


def test_up_uses_the_servers_that_are_set_and_says_why_a_part_does_not_start(tokentrail, monkeypatch, own_servers):
    monkeypatch.setenv("FLOWER_PERSISTENT", "nonsense")
    up = tokentrail("up")
    assert up.wait() == 1
    assert "PostgreSQL and Valkey" not in up.printed()
    assert "tokentrail: flower ended with code" in up.printed()
    assert "nonsense" in up.printed()


def test_two_ups_that_start_at_once_never_choose_the_same_port():
    """All have chosen before anybody listens: each would announce the Flower of whoever is first as its own."""
    first = free_port()
    choose = (
        "import contextlib, sys\n"
        "from worker.local.up import _free_port\n"
        "with contextlib.ExitStack() as stack:\n"
        f"    print(_free_port(stack, 'FLOWER', '127.0.0.1', {first}), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with contextlib.ExitStack() as stack:
        ups = [
            stack.enter_context(
                subprocess.Popen([sys.executable, "-c", choose], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            for _ in range(3)
        ]
        chosen = [int(each.stdout.readline()) for each in ups]
        assert len({*chosen}) == len(ups), chosen
        for port in chosen:  # what is held is not in the way of the child
            listen("127.0.0.1", port).close()
        for each in ups:
            each.stdin.close()
    claim("127.0.0.1", chosen[0]).close()


@pytest.mark.parametrize("host", ["::1", "::"])
@pytest.mark.usefixtures("own_servers")
def test_up_listens_where_it_is_told_to_and_tells_where_that_is(tokentrail, monkeypatch, host):
    try:
        listen("::1", 0).close()
    except CannotListen as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    monkeypatch.setenv("TOKENTRAIL_API_HOST", host)
    up = tokentrail("up")
    up.wait_for("http://[::1]:")


def test_up_makes_a_folder_that_nobody_else_can_write_in_whatever_the_umask(tmp_path, own_servers):
    code = "import os; os.umask(0); from worker.cli import main; main()"
    environment = {**os.environ, "TOKENTRAIL_HOME": str(tmp_path / "new"), "TOKENTRAIL_API_HOST": "192.0.2.1"}
    ended = subprocess.run([sys.executable, "-c", code, "up"], env=environment, capture_output=True, check=False)
    assert b"Cannot listen on port" in ended.stderr, "it ends soon"
    assert (tmp_path / "new").stat().st_mode & 0o022 == 0
    assert (tmp_path / "new" / "up.lock").stat().st_mode & 0o777 == 0o600


def test_child_that_cannot_be_started_again_is_tried_later_and_its_siblings_live(tmp_path):
    """As when the machine has no more processes: a folder that is away makes the start fail as truly."""
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
        child.restart_at = time.monotonic()
        assert family.step() == [child]
        assert child.last_words == "could not be started (No such file or directory)"
        assert sibling.running
        assert child.restart_later() == 2  # seconds: the second failure in a row
        folder.mkdir()
        child.restart_at = time.monotonic()
        assert family.step() == []
        assert child.running
    finally:
        family.stop([sibling, child], grace=5)


def test_demo_by_itself_runs_to_its_end(tokentrail):
    demo = tokentrail("demo", "--events", "600", "--seed", "7")
    assert demo.wait() == 0, demo.printed()
    for expected in (
        "What became of them",
        "insufficient_tokens",
        "delivered again",
        "Balances",
        "Supply",
        "History of",
    ):
        assert expected in demo.printed()
    assert "every token is accounted for" in demo.printed().splitlines()[-1]


@pytest.mark.usefixtures("own_servers")
def test_demo_says_the_same_to_a_machine(tokentrail, tmp_path):
    tokentrail("worker", "--name", "w")
    demo = subprocess.run(
        [sys.executable, "-m", "worker.cli", "demo", "--events", "200", "--json"],
        env={**os.environ, "TOKENTRAIL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    found = json.loads(demo.stdout)
    assert sum(fate["events"] for fate in found["outcomes"]) == 200
    assert found["balanced"] is True
    assert found["held"] == found["supply"]["circulating"]
    assert found["history"]["pagination"]["limit"] == 10
    assert "Publishing 200 events" in demo.stderr


def test_workers_under_one_parent_are_restarted_and_the_same_run_again_moves_nothing(tokentrail, own_servers):
    workers = tokentrail("worker", "--processes", "2", "--name", "w")
    until(lambda: len(workers.family()) == 2, workers.printed)

    demo = tokentrail("demo", "--events", "300", "--run", "twice")
    assert demo.wait() == 0, demo.printed()
    with psycopg.connect(own_servers) as connection:
        before = read_supply(connection)

    killed = workers.family()[0]
    killed.kill()
    workers.wait_for("was killed by SIGKILL")
    demo = tokentrail("demo", "--events", "300", "--run", "twice")
    assert demo.wait() == 0, demo.printed()
    with psycopg.connect(own_servers) as connection:
        assert read_supply(connection) == before

    until(lambda: len(workers.family()) == 2, workers.printed)
    family = workers.family()
    assert killed not in family
    workers.process.terminate()
    assert workers.wait() == 0
    assert gone(family)
