"""README.md, the client's, and docs/: every command is run, against one running system, and prints what is shown.

A block of `sh` is a script. What cannot be run here is listed with its reason, and looked at otherwise. A block without
a language right behind it shows what it prints: the same lines and numbers, at another time. A block of `python` is a
program of another project.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psycopg
import pytest
from typer.exceptions import TyperException
from typer.main import get_command
from typer.testing import CliRunner

from schema.events import Accrual, Burn, event_json
from schema.messages import APPLY_MANY
from tests.kit.brokers import eventually, free_port
from tests.kit.stage import LISTED
from worker.cli import app as cli
from worker.cli.examples import EXAMPLES, EXIT_CODES
from worker.config import Settings, settings
from worker.ledger.deliveries import Delivery, Origin
from worker.ledger.settle import Ledger
from worker.local.embedded import binaries
from worker.queue.parsing import read_work

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "client" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

#: Lines that no test can run, and why. All of them start with make: its rules are looked at with `make -n`.
NOT_RUN = {
    "make run": "installs packages and stays; what it runs in the end is what the blocks are run against",
    "make test": "is what runs this",
    "make chaos": "takes minutes",
    "make bench": "takes minutes",
    "make fuzz": "takes minutes",
    "make check": "is what runs this",
    "make compose-env": "tests/local/test_compose.py runs it elsewhere, for it writes passwords",
    "docker compose up": "needs an engine: tests/local/test_compose.py runs what it would start",
}
#: Lines that stay until they are stopped, and what they print once they work.
STAYING = {
    "tokentrail worker --processes 4": "-4@.* ready",
    "tokentrail api": "the API listens",
    "tokentrail flower": "Visit me at",
}
#: How lines end that tell what the workers have done so far, and what they print once that is done: a reader who was
#: too quick asks again.
ASKED_AGAIN = {"tokentrail history alice": " burn ", "llen tokens": "^0$", "hlen unacked": "^0$"}
#: What documents say for what a reader has.
OF_THE_READER = {
    "postgresql://user:password@host/database": "database_url",
    "postgresql://user:password@host/restored": "restored_url",
    "redis://:password@host:6379/0": "broker_url",
    "redis://localhost:6379/0": "broker_url",
    "http://127.0.0.1:8000": "api_url",
    "http://127.0.0.1:5555": "flower_url",
}
#: How the block begins that sets everything up by hand: it has a test of its own, in a folder of its own.
BY_HAND = "python3 -m venv .venv\n"


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    shows: str | None  # the block right behind it, if that has no language

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language):
    found = []
    for page in PAGES:
        text = page.read_text()
        fences = list(FENCE.finditer(text))
        for fence, following in zip(fences, [*fences, None][1:], strict=True):
            if fence[1] == language:
                adjacent = following and not following[1] and not text[fence.end() : following.start()].strip()
                line = text.count("\n", 0, fence.start()) + 1
                found.append(Block(page, line, language, fence[2], following[2] if adjacent else None))
    return found


class System(NamedTuple):
    """A running `tokentrail up --demo`, a reader's folder beside it, and what it has printed."""

    addresses: dict[str, str]
    folder: Path
    printed: str
    environment: dict[str, str]

    def as_here(self, text):
        for said, name in OF_THE_READER.items():
            text = text.replace(said, self.addresses[name])
        return text.replace(
            "redis://default:password@host:6379/0", self.addresses["broker_url"].replace("//:", "//default:")
        )

    def run(self, script):
        ended = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 0, f"{script}\n{ended.stdout}\n{ended.stderr}"
        assert "Traceback" not in ended.stderr
        return ended.stdout


@pytest.fixture(scope="module")
def system(given):
    """What `make run` starts, started as it says it would, in a folder as a reader's clone is."""
    with tempfile.TemporaryDirectory(prefix="tokentrail-docs-") as parent:
        folder = Path(parent)
        folder.chmod(0o755)
        for name in (".venv", "worker", "schema", "migrations", "celeryconfig.py", "pyproject.toml", "Makefile"):
            target = Path(sys.executable).parents[1] if name == ".venv" else ROOT / name
            (folder / name).symlink_to(target)
        environment = {
            **{name: value for name, value in os.environ.items() if name != "TOKENTRAIL_HOME"},
            "TOKENTRAIL_API_PORT": str(free_port()),
            "TOKENTRAIL_FLOWER_PORT": str(free_port()),
        }
        log = folder / "up.log"
        with log.open("wb") as output:
            up = subprocess.Popen(
                started_by_make_run(), cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            eventually(lambda: "tokentrail is running" in log.read_text() or up.poll() is not None, 120)
            assert up.poll() is None, log.read_text()
            addresses = json.loads((folder / ".tokentrail" / "servers.json").read_text())
            addresses["restored_url"] = urlsplit(addresses["database_url"])._replace(path="/restored").geturl()
            (folder / ".curlrc").write_text("fail\n")  # a reader sees what the API says, the test must hear of it
            environment |= {
                "CURL_HOME": str(folder),
                "PATH": os.pathsep.join([str(binaries.postgres_folder()), *plain_path()]),
                "TOKENTRAIL_API_PORT": str(free_port()),  # of a second one: the first is taken
                "FLOWER_PORT": str(free_port()),
            }
            yield System(addresses, folder, log.read_text(), environment)
        finally:
            up.send_signal(signal.SIGINT)
            try:
                up.wait(60)
            except subprocess.TimeoutExpired:
                up.kill()
                up.wait()
            shutil.rmtree(folder / ".tokentrail", ignore_errors=True)


def plain_path():
    """The folders of PATH without the virtual environment's: no reader's shell has that until told so."""
    ours = Path(sys.executable).parent.resolve()
    return [folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder).resolve() != ours]


def started_by_make_run():
    """The last line of the rule `run`: those before it install packages."""
    said = subprocess.run(["make", "-n", "run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    last = shlex.split(said.strip().splitlines()[-1])
    assert last == ["exec", ".venv/bin/tokentrail", "up", "--demo"]
    return last[1:]


def script(block, folder):
    """The block as bash can run it here, and the logs of what stays."""
    lines = []
    for line in block.text.replace("\\\n", "").splitlines():
        command = line.partition("  #")[0].strip()
        if command in NOT_RUN:
            continue
        if command in STAYING:
            log = shlex.quote(str(folder / f"{command.split()[1]}.log"))
            lines += [
                f"{command} > {log} 2>&1 & echo $! >> staying",
                f"until grep -Eq -e '{STAYING[command]}' {log}",
                f"do kill -0 $! || {{ cat {log} >&2; exit 1; }}; sleep 0.2; done",
            ]
        else:
            awaited = next((said for end, said in ASKED_AGAIN.items() if command.endswith(end)), None)
            if awaited is not None:
                lines.append(f"until {command} | grep -E -e '{awaited}' > /dev/null; do sleep 0.2; done")
            lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("block", [block for block in blocks("sh") if not block.text.startswith(BY_HAND)], ids=str)
def test_every_block_of_commands_runs_and_prints_what_is_shown(system, block, requires_program):
    for program in ("curl", "redis-cli"):
        if program in block.text:
            requires_program(program)
    staying = system.folder / "staying"
    staying.unlink(missing_ok=True)
    try:
        printed = system.run(system.as_here(script(block, system.folder)))
    finally:
        stop(staying)
    if block.shows is not None:
        assert at_any_time(printed) == at_any_time(block.shows)


def test_psql_and_redis_cli_are_told_to_fail_where_what_they_print_is_not_compared():
    """Else a script of psql goes on behind what failed, and redis-cli exits with 0 after an error of the server."""
    told = {"psql": r"\s-v ON_ERROR_STOP=1\b|\s-c\b", "redis-cli": r"\s-e\b"}
    called = [
        (str(block), program, line)
        for block in blocks("sh")
        if block.shows is None
        for line in block.text.replace("\\\n", "").splitlines()
        for program in re.findall(r"^(psql|redis-cli)\b", line)
    ]
    assert {program for _, program, _ in called} == told.keys()
    assert [each for each in called if not re.search(told[each[1]], each[2])] == []


@pytest.fixture
def copied():
    """What the README's commands need of a clone, as it is here now."""
    with tempfile.TemporaryDirectory(prefix="tokentrail-docs-") as parent:
        Path(parent).chmod(0o755)  # when we are root, PostgreSQL runs as somebody else
        folder = Path(parent) / "a clone"
        folder.mkdir()
        for name in ("worker", "schema", "migrations"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("celeryconfig.py", "pyproject.toml", "requirements.lock", "README.md"):
            shutil.copy(ROOT / name, folder)
        yield folder


def test_where_there_is_no_make_the_commands_of_the_readme_do_the_same(copied, tmp_path):
    """On a PATH where there is nothing but a Python."""
    (block,) = (block for block in blocks("sh") if block.text.startswith(BY_HAND))
    _, *installing, last = block.text.splitlines()
    rule = re.search(r"^\.venv/runtime:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert [line.partition(" pip install ")[2] for line in installing] == re.findall(
        r"\$\(PIP\)(?: --quiet)? ([^)\n]*)", rule
    )
    assert last.split() == started_by_make_run()

    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(str(Path(sys.executable).resolve()))} "$@"\n')
    python.chmod(0o755)
    not_inherited = {"TOKENTRAIL_HOME", "PYTHONPATH", "LANGUAGE"}
    environment = {name: value for name, value in os.environ.items() if name not in not_inherited}
    environment |= {
        "PATH": str(tmp_path),
        "LC_ALL": "C",
        "TOKENTRAIL_API_PORT": str(free_port()),
        "TOKENTRAIL_FLOWER_PORT": str(free_port()),
    }

    def bash(script):
        command = ["/bin/bash", "-euc", script]
        return subprocess.run(
            command, cwd=copied, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    without = bash("make run")
    assert (without.returncode, "make: command not found" in without.stderr) == (127, True)
    installed = bash(block.text.removesuffix(f"{last}\n"))
    if "Could not find a version" in installed.stderr and os.environ.get("CI") != "true":
        pytest.skip(f"pip reaches no package index: {installed.stderr.strip()[-300:]}")
    assert installed.returncode == 0, installed.stderr
    log = copied / "up.log"
    with log.open("wb") as output:
        up = subprocess.Popen(last.split(), cwd=copied, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: "tokentrail is running" in log.read_text() or up.poll() is not None, 120)
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0, log.read_text()
    finally:
        up.kill()
        up.wait()
    assert "every token is accounted for" in log.read_text()


def stop(staying):
    for pid in map(int, staying.read_text().split()) if staying.exists() else ():
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline, f"process {pid} does not end"
            time.sleep(0.1)


def at_any_time(text):
    """The lines without their widths, the time of day, and what is drawn by lot."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "UUID", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"\bdemo-\w+-(?=\d{6}\b)", "demo-RUN-", text)
    return [re.sub(r"[\s─]+", " ", line).strip() for line in text.splitlines() if line.strip(" ─")]


def test_every_make_target_in_the_documents_exists():
    """`make -n` prints what it would do for one that does."""
    said = {target: document.name for document in DOCUMENTS for target in made_in(document.read_text())}
    said |= {target: "NOT_RUN" for command in NOT_RUN for target in made_in(f"`{command}`")}
    assert {"run", "test", "bench", "compose-env"} <= said.keys()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target: where for target, where in said.items() if target not in targets} == {}
    for target in said:
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)
    in_blocks = {line.partition("  #")[0].strip() for block in blocks("sh") for line in block.text.splitlines()}
    assert {line for line in in_blocks if line.startswith(("make", "docker"))} <= NOT_RUN.keys()


def made_in(text):
    """The targets of make that a document names in its code: in prose "make a note" is no command."""
    code = [
        *(line for fence in FENCE.finditer(text) for line in fence[2].splitlines()),
        *re.findall(r"`([^`]+)`", FENCE.sub("", text)),
    ]
    for command in code:
        if called := re.match(r"\s*make((?:\s+[\w.=/-]+)+)", command.partition("#")[0]):
            yield from (word for word in called[1].split() if re.fullmatch(r"[a-z][\w-]*", word))


def test_targets_of_make_are_found_in_code_and_not_in_prose():
    prose = "Many make a mess of it: `make`, `make one`, `make two ARGS=--fast`.\n"
    assert list(made_in(f"{prose}```sh\nmake three  # make no\n```\nmake us laugh")) == ["three", "one", "two"]


def test_readme_shows_what_the_demo_prints(system):
    """To the last digit: the seed decides what is published, and no accrual comes in time for a burn that waits."""
    shown = next(block.text for block in blocks("") if "What became of them" in block.text)
    printed, expected = at_any_time(system.printed), at_any_time(shown)
    begin = printed.index(expected[0])
    assert printed[begin : begin + len(expected) - 1] == expected[:-1]
    assert expected[-1] in printed


def test_the_picture_in_readme_shows_what_the_demo_prints(system):
    picture = (ROOT / "docs" / "demo.svg").read_text()
    drawn = html.unescape(re.sub(r"<[^>]*>", " ", picture)).replace("\N{NO-BREAK SPACE}", " ")
    printed, expected = at_any_time(system.printed), at_any_time(drawn[drawn.index("What became of them") :])
    assert len(expected) > 30
    begin = printed.index(expected[0])
    assert printed[begin : begin + len(expected)] == expected


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_block_of_python_runs_and_its_event_is_applied(system, producer, block):
    """Under a key of its own: what another block sent is no answer to this one."""
    (user,) = set(re.findall(r'"?user_id"?[:=] ?"(\w+)"', block.text))
    (key,) = set(re.findall(r'"?idempotency_key"?[:=] ?"([\w-]+)"', block.text))
    own = f"{key}-of-line-{block.line}"
    assert receipt(system, user, own)["status"] == "unknown"
    producer.run(system.as_here(block.text).replace(f'"{key}"', f'"{own}"'))
    eventually(lambda: receipt(system, user, own)["status"] in {"applied", "rejected"}, 30)


def receipt(system, user, key):
    url = f"{system.addresses['api_url']}/api/account/receipts?userId={user}&idempotencyKey={key}"
    with opener().open(url, timeout=10) as answer:
        return json.load(answer)["receipts"][0]


def opener():
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def test_what_the_concepts_say_becomes_of_their_examples_becomes_of_them(system):
    """Runs behind the blocks of the page."""
    user = "concept-ann"
    expected = {"order-1": "applied", "call-1": "applied", "call-2": "rejected"}
    eventually(lambda: all(receipt(system, user, key)["status"] == what for key, what in expected.items()), 30)
    assert [receipt(system, "concept-bob", key)["status"] for key in ("early", "late")] == ["applied", "applied"]
    letters = json.loads(system.run(f".venv/bin/tokentrail dead-letters list --user {user} --json"))
    assert [(each["reason"], each["idempotency_key"]) for each in letters] == [("conflict", "order-1")]
    history = json.loads(system.run(f".venv/bin/tokentrail history {user} --json"))["transactions"]
    table = re.findall(r"^\| (\d) \| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", page("concepts.md"), re.MULTILINE)
    fields = ("sequence", "type", "amount", "balanceBefore", "balanceAfter")
    assert [tuple(str(record[field]) for field in fields) for record in reversed(history)] == table


def page(name):
    return (ROOT / "docs" / name).read_text()


def test_noted_heads_name_the_accounts_whose_chain_was_rewritten_to_its_end(database_url):
    """By its owner, and no other account."""
    compared = re.search(r"^SELECT n\.\*, .*?;$", page("concepts.md"), re.DOTALL | re.MULTILINE).group()
    noted = re.search(r"COPY \((.*?)\) TO STDOUT", page("concepts.md"), re.DOTALL).group(1)
    ledger = Ledger(Settings(DATABASE_URL=database_url), stripe=1)

    def decide(events):
        ledger.settle([Delivery.of(event) for event in events])

    def events(key):
        for user in ("ann", "bob", "cid"):
            yield Accrual(user_id=user, amount=5, idempotency_key=f"{key}-accrual", source="s")
            yield Burn(user_id=user, amount=9_999, idempotency_key=f"{key}-burn", action="a")

    with psycopg.connect(database_url, autocommit=True) as owner:
        decide([*events("1"), *events("2")])
        owner.execute(f"CREATE TEMPORARY TABLE noted AS {noted}")
        decide(events("3"))
        assert owner.execute(compared).fetchall() == [], "accounts move on, and their pasts do not"

        owner.execute("SET session_replication_role = replica")
        owner.execute("DELETE FROM transaction_record WHERE user_id = 'ann' AND sequence > 1")
        owner.execute("DELETE FROM accrual_record WHERE user_id = 'ann' AND sequence > 1")
        owner.execute("DELETE FROM rejected_event WHERE user_id = 'cid' AND number > 1")
        owner.execute(
            "UPDATE account a SET sequence = 1, balance = t.balance_after, head_hash = t.hash FROM transaction_record t"
            " WHERE a.user_id = 'ann' AND t.user_id = 'ann'"
        )
        owner.execute(
            "UPDATE account a SET rejections = 1, rejection_head = r.hash FROM rejected_event r"
            " WHERE a.user_id = 'cid' AND r.user_id = 'cid'"
        )
        decide(Accrual(user_id="ann", amount=1, idempotency_key=f"another-{n}", source="s") for n in range(9))
        assert sorted(row[0] for row in owner.execute(compared)) == ["ann", "cid"]
    ledger.close()


def test_configuration_page_is_current():
    program = "docs/configuration.py"
    written = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert page("configuration.md") == written, f"python {program} > docs/configuration.md"


def test_every_address_in_the_documents_answers(system):
    said = {
        (document.name, address)
        for document in DOCUMENTS
        for address in re.findall(r"http://127\.0\.0\.1:\d+[^\s`\"]*", document.read_text())
    }
    assert ("README.md", "http://127.0.0.1:5555") in said
    for document, address in said:
        with opener().open(system.as_here(address), timeout=10) as answer:
            assert answer.status == 200, f"{document}: {address}"
            if "acme-research" in address:
                assert json.load(answer)["transactions"], f"{document}: {address} is empty"


def test_flower_says_what_the_readme_says_it_says(system):
    """Of the README's first event, which runs again here and changes nothing."""
    (block,) = (block for block in blocks("sh") if block.page.name == "README.md" and "--key order-4711" in block.text)
    system.run(system.as_here(block.text))
    said = re.search(
        r"these are `(.*)` and `(.*)`; the Result of the first is `(.*)`\.", (ROOT / "README.md").read_text()
    )

    def shown():
        with opener().open(system.addresses["flower_url"] + LISTED, timeout=10) as answer:
            tasks = json.load(answer)["data"]
        return {(each["name"], each["result"]) for each in tasks if "alice" in (each["kwargs"] or "")}

    eventually(lambda: (said[1], said[3]) in shown(), 30)
    assert said[2] in {name for name, _ in shown()}


def test_architecture_names_every_layer_of_imports():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert f"`{' → '.join(layers)}`" in (ROOT / "ARCHITECTURE.md").read_text()


def test_links_between_the_documents_lead_somewhere():
    """To a page, and to a heading of it where they name one."""
    anchored = 0
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text()):
            there = document.parent / target if target else document
            assert there.exists(), f"{document.name}: {target}"
            if anchor:
                assert anchor in anchors(there), f"{document.name}: {target}#{anchor}"
                anchored += 1
    assert anchored


def anchors(page):
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_an_event_costs_the_bytes_that_the_migration_page_says(database_url, monkeypatch):
    """The tables only: indexes grow in steps."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    said = {
        what: int(size)
        for what, size in re.findall(r"^\| ([a-z ]+) \| (\d+) \|", page("audit-trail-migration.md"), re.MULTILINE)
    }
    tables = {
        "accrual": ("transaction_record", "accrual_record"),
        "burn": ("transaction_record", "burned_credit"),
        "rejected burn": ("rejected_event",),
    }
    assert said.keys() == tables.keys()
    found = settings()
    ledger = Ledger(found, stripe=1)

    def size(names):
        with psycopg.connect(database_url) as connection:
            return sum(connection.execute("SELECT pg_relation_size(%s)", [name]).fetchone()[0] for name in names)

    count = 4000
    for what, amount in (("rejected burn", 5), ("accrual", 1000), ("burn", "0.000777")):
        before = size(tables[what])
        for start in range(0, count, 500):
            events = [json.loads(event_json(one(what, amount, n))) for n in range(start, start + 500)]
            work = read_work(APPLY_MANY, (), {"events": events}, Origin(task=APPLY_MANY), max_amount=found.max_amount)
            ledger.settle(work.deliveries, work.letters)
        assert (size(tables[what]) - before) / count == pytest.approx(said[what], rel=0.1), what
    ledger.close()


def one(what, amount, number):
    key = f"{what[:3]}-{number:032d}"  # as long as a UUID
    if what == "accrual":
        return Accrual(user_id=f"user-{number % 1000:06}", amount=amount, idempotency_key=key, source="purchase")
    return Burn(user_id=f"user-{number % 1000:06}", amount=amount, idempotency_key=key, action="embedding")


def test_every_command_and_group_shows_examples_that_it_understands():
    """Of itself, or of what it groups; read as the command line reads them, and not run."""
    assert set(EXAMPLES) == set(commands(cli))
    program = get_command(cli)
    for name, examples in EXAMPLES.items():
        shown = help_of(*name.split())
        for example in examples:
            assert example in shown
            called = understood(program, *shlex.split(example))
            assert called in {f"tokentrail {each}" for each in EXAMPLES if each}
            assert f"{called} ".startswith(f"{shlex.join(['tokentrail', *name.split()])} ")
    assert EXIT_CODES in help_of()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_command_within_a_sentence_is_one_that_there_is(document):
    """Where it is whole, its options and arguments too."""
    prose = FENCE.sub("", document.read_text())
    program = get_command(cli)
    for said in re.findall(r"`([^`]+)`", re.sub(r"\bID\b", "17", prose)):
        words = shlex.split(said.partition("tokentrail ")[2]) if re.search(r"(^|\s)tokentrail ", said) else []
        if not words:
            continue
        if words[0].startswith("--"):
            assert words[0] in help_of(), said
        elif " ".join(words) not in EXAMPLES:
            assert understood(program, "tokentrail", *words) in {f"tokentrail {each}" for each in EXAMPLES}, said


def understood(command, name, *arguments, parent=None):
    """What is called, such as `tokentrail migrate status`. Raises TyperException where a word of it is wrong."""
    with command.make_context(name, list(arguments), parent=parent) as context:
        rest = [*context._protected_args, *context.args]
        if not rest:
            return context.command_path
        name, inner, arguments = command.resolve_command(context, rest)
        return understood(inner, name, *arguments, parent=context)


@pytest.mark.parametrize("wrong", ["up --no-such", "history", "api --port http", "dead-letters lost", "supply all"])
def test_what_the_command_line_cannot_read_is_not_understood(wrong):
    with pytest.raises(TyperException):
        understood(get_command(cli), "tokentrail", *wrong.split())


def help_of(*command):
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(cli, [*command, "--help"])
    assert shown.exit_code == 0
    return re.sub(r"\s+", " ", shown.output)


def commands(group, prefix=""):
    """The names of all commands and groups; that of the program itself is empty."""
    yield prefix.rstrip()
    for command in group.registered_commands:
        yield f"{prefix}{command.name or command.callback.__name__}"
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, f"{prefix}{inner.name} ")


def test_shell_completes_commands(system):
    """In bash, with what --show-completion prints: it asks the program, through _TOKENTRAIL_COMPLETE, at each Tab."""
    script = """
        . .venv/bin/activate
        eval "$(tokentrail --show-completion)"
        complete -p tokentrail
        COMP_WORDS=(WORDS); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _tokentrail_completion tokentrail "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    for words, expected in {
        "tokentrail dead": ["dead-letters"],
        "tokentrail s": ["supply", "settings"],
        "tokentrail dead-letters re": ["replay"],
        "tokentrail history alice --pa": ["--page"],
    }.items():
        printed = system.run(script.replace("(WORDS)", f"({words})")).splitlines()
        assert printed == ["complete -o default -F _tokentrail_completion tokentrail", *expected]
