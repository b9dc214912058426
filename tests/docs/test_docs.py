"""README.md, the client's, and docs/: every block of commands runs against one running system.

A block of `sh` is a script; NOT_RUN lists the lines that cannot run here. A block without a language directly after it
shows the script's output, except for times and ids. A block of `python` is a program of another project.
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
import tomllib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from schema.events import Accrual, Burn, event_json
from schema.messages import APPLY_MANY
from tests.kit.http import get
from tests.kit.servers import free_port
from tests.kit.wait import eventually
from worker.cli import app as cli
from worker.cli.examples import EXAMPLES, EXIT_CODES
from worker.config import Settings, load_settings
from worker.ledger.deliveries import Delivery, Origin
from worker.ledger.settle import Ledger
from worker.local.embedded import binaries
from worker.queue.parsing import parse_call

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "client" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

#: Lines that no test runs, and why. `make -n` checks the targets of make.
NOT_RUN = {
    "make run": "installs packages and keeps running; the system under test is what it starts",
    "make test": "runs this test",
    "make chaos": "takes minutes",
    "make bench": "takes minutes",
    "make fuzz": "takes minutes",
    "make check": "runs this test",
    "make compose-env": "writes passwords: tests/local/test_compose.py runs it in a copy",
    "docker compose up": "needs an engine: tests/local/test_compose.py runs its processes",
}
#: Commands that run until they are stopped, and what they print once they are ready.
SERVICES = {
    "tokentrail worker --processes 4": "-4@.* ready",
    "tokentrail api": "the API listens",
    "tokentrail flower": "Visit me at",
}
#: Ends of lines whose output depends on the workers' progress, and the output to wait for.
REPEATED = {"tokentrail history alice": " burn ", "llen tokens": "^0$", "hlen unacked": "^0$"}
#: Addresses in documents → field of the system's addresses.
ADDRESSES = {
    "postgresql://user:password@host/database": "database_url",
    "postgresql://user:password@host/restored": "restored_url",
    "redis://:password@host:6379/0": "broker_url",
    "redis://localhost:6379/0": "broker_url",
    "http://127.0.0.1:8000": "api_url",
    "http://127.0.0.1:5555": "flower_url",
}
#: The first line of the block that replaces `make run`; it has a test of its own.
WITHOUT_MAKE = "python3 -m venv .venv\n"


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    output: str | None  # the block directly after it, if that has no language

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language):
    result = []
    for page in PAGES:
        text = page.read_text()
        fences = list(FENCE.finditer(text))
        for fence, following in zip(fences, [*fences, None][1:], strict=True):
            if fence[1] == language:
                adjacent = following and not following[1] and not text[fence.end() : following.start()].strip()
                line = text.count("\n", 0, fence.start()) + 1
                result.append(Block(page, line, language, fence[2], following[2] if adjacent else None))
    return result


class System(NamedTuple):
    """A running `tokentrail up --demo`, its folder, and its output."""

    addresses: dict[str, str]
    folder: Path
    output: str
    environment: dict[str, str]

    def with_addresses(self, text):
        for documented, name in ADDRESSES.items():
            text = text.replace(documented, self.addresses[name])
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
        # psql goes on after an error, and redis-cli exits with 0.
        assert re.search(r"Traceback|^(psql:.*)?ERROR|^\(error\)", ended.stderr + ended.stdout, re.MULTILINE) is None
        return ended.stdout


@pytest.fixture(scope="module")
def system(external_urls):
    """The system that `make run` starts, in a folder like a clone."""
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
                command_of_make_run(), cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            eventually(lambda: "tokentrail is running" in log.read_text() or up.poll() is not None, seconds=120)
            assert up.poll() is None, log.read_text()
            addresses = json.loads((folder / ".tokentrail" / "servers.json").read_text())
            addresses["restored_url"] = urlsplit(addresses["database_url"])._replace(path="/restored").geturl()
            (folder / ".curlrc").write_text("fail\n")  # the API's errors must fail the test
            environment |= {
                "CURL_HOME": str(folder),
                "PATH": os.pathsep.join([str(binaries.postgres_folder()), *plain_path()]),
                "TOKENTRAIL_API_PORT": str(free_port()),  # of a second API; the first one's port is taken
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
    """PATH without the virtual environment."""
    ours = Path(sys.executable).parent.resolve()
    return [folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder).resolve() != ours]


def command_of_make_run():
    """The last line of the rule `run`; the lines before it install packages."""
    rule = subprocess.run(["make", "-n", "run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    last = shlex.split(rule.strip().splitlines()[-1])
    assert last == ["exec", ".venv/bin/tokentrail", "up", "--demo"]
    return last[1:]


def script(block, folder):
    """The block as a script for bash, with services in the background and their output in log files."""
    lines = []
    for line in block.text.replace("\\\n", "").splitlines():
        command = line.partition("  #")[0].strip()
        if command in NOT_RUN:
            continue
        if command in SERVICES:
            log = shlex.quote(str(folder / f"{command.split()[1]}.log"))
            lines += [
                f"{command} > {log} 2>&1 & echo $! >> services",
                f"until grep -Eq -e '{SERVICES[command]}' {log}",
                f"do kill -0 $! || {{ cat {log} >&2; exit 1; }}; sleep 0.2; done",
            ]
        else:
            awaited = next((output for end, output in REPEATED.items() if command.endswith(end)), None)
            if awaited is not None:
                lines.append(f"until {command} | grep -E -e '{awaited}' > /dev/null; do sleep 0.2; done")
            lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("block", [block for block in blocks("sh") if not block.text.startswith(WITHOUT_MAKE)], ids=str)
def test_every_block_of_commands_runs_and_prints_the_documented_output(system, block, requires_program):
    for program in ("curl", "redis-cli"):
        if program in block.text:
            requires_program(program)
    services = system.folder / "services"
    services.unlink(missing_ok=True)
    try:
        output = system.run(system.with_addresses(script(block, system.folder)))
    finally:
        stop(services)
    if block.output is not None:
        assert timeless(output) == timeless(block.output)


def test_the_commands_without_make_are_those_of_the_makefile():
    """tests/local/test_compose.py runs the system with no package but those of requirements.lock."""
    (block,) = (block for block in blocks("sh") if block.text.startswith(WITHOUT_MAKE))
    _, *installing, last = block.text.splitlines()
    rule = re.search(r"^\.venv/runtime:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert [line.partition(" pip install ")[2] for line in installing] == re.findall(r"\$\(PIP\) ([^)\n]*)", rule)
    assert last.split() == command_of_make_run()


def stop(services):
    pids = [int(pid) for pid in services.read_text().split()] if services.exists() else []
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not any(map(is_running, pids)), seconds=60)


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def timeless(text):
    """The lines without widths, times and random ids."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "UUID", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"\bdemo-\w+-(?=\d{6}\b)", "demo-RUN-", text)
    return [re.sub(r"[\s─]+", " ", line).strip() for line in text.splitlines() if line.strip(" ─")]


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target: document.name for document in DOCUMENTS for target in make_targets(document.read_text())}
    assert {"run", "test", "bench", "compose-env"} <= named.keys()
    assert {target: name for target, name in named.items() if target not in targets} == {}
    in_blocks = {line.partition("  #")[0].strip() for block in blocks("sh") for line in block.text.splitlines()}
    assert {line for line in in_blocks if line.startswith(("make", "docker"))} <= NOT_RUN.keys()


def make_targets(text):
    """The targets of make in blocks and in `code`."""
    code = "\n".join([*(block[2] for block in FENCE.finditer(text)), *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))])
    return re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)


def test_readme_shows_what_the_demo_prints(system):
    """To the last digit: the seed decides the events, and no accrual arrives in time for a parked burn."""
    documented = next(block.text for block in blocks("") if "What became of them" in block.text)
    output, expected = timeless(system.output), timeless(documented)
    begin = output.index(expected[0])
    assert output[begin : begin + len(expected) - 1] == expected[:-1]
    assert expected[-1] in output


def test_the_picture_in_readme_shows_what_the_demo_prints(system):
    picture = (ROOT / "docs" / "demo.svg").read_text()
    drawn = html.unescape(re.sub(r"<[^>]*>", " ", picture)).replace("\N{NO-BREAK SPACE}", " ")
    output, expected = timeless(system.output), timeless(drawn[drawn.index("What became of them") :])
    assert len(expected) > 30
    begin = output.index(expected[0])
    assert output[begin : begin + len(expected)] == expected


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_block_of_python_runs_and_its_event_is_applied(system, producer, block):
    """Under a key of its own, so that the receipt is not of another block's event."""
    (user,) = set(re.findall(r'"?user_id"?[:=] ?"(\w+)"', block.text))
    (key,) = set(re.findall(r'"?idempotency_key"?[:=] ?"([\w-]+)"', block.text))
    own = f"{key}-of-line-{block.line}"
    assert receipt(system, user, own)["status"] == "unknown"
    producer.run(system.with_addresses(block.text).replace(f'"{key}"', f'"{own}"'))
    eventually(lambda: receipt(system, user, own)["status"] in {"applied", "rejected"})


def receipt(system, user, key):
    url = f"{system.addresses['api_url']}/api/account/receipts?userId={user}&idempotencyKey={key}"
    return json.loads(get(url))["receipts"][0]


def test_the_examples_of_the_concepts_have_the_documented_outcomes(system):
    """Runs after the blocks of the page."""
    user = "concept-ann"
    expected = {"order-1": "applied", "call-1": "applied", "call-2": "rejected"}
    eventually(lambda: all(receipt(system, user, key)["status"] == status for key, status in expected.items()))
    assert [receipt(system, "concept-bob", key)["status"] for key in ("early", "late")] == ["applied", "applied"]
    letters = json.loads(system.run(f".venv/bin/tokentrail dead-letters list --user {user} --json"))
    assert [(each["reason"], each["idempotency_key"]) for each in letters] == [("conflict", "order-1")]
    history = json.loads(system.run(f".venv/bin/tokentrail history {user} --json"))["transactions"]
    table = re.findall(r"^\| (\d) \| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", page("concepts.md"), re.MULTILINE)
    fields = ("sequence", "type", "amount", "balanceBefore", "balanceAfter")
    assert [tuple(str(record[field]) for field in fields) for record in reversed(history)] == table


def page(name):
    return (ROOT / "docs" / name).read_text()


def test_stored_heads_reveal_a_chain_that_was_rewritten_to_its_end(database_url):
    """The documented query names them, and no other account."""
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
        assert owner.execute(compared).fetchall() == [], "new records do not change stored heads"

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
    addresses = {
        (document.name, address)
        for document in DOCUMENTS
        for address in re.findall(r"http://127\.0\.0\.1:\d+[^\s`\"]*", document.read_text())
    }
    assert ("README.md", "http://127.0.0.1:5555") in addresses
    for document, address in addresses:
        body = get(system.with_addresses(address))
        if "acme-research" in address:
            assert json.loads(body)["transactions"], f"{document}: {address} is empty"


def test_architecture_names_every_layer_of_imports():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert f"`{' → '.join(layers)}`" in (ROOT / "ARCHITECTURE.md").read_text()


def test_links_between_the_documents_lead_somewhere():
    """To a file, and to a heading if they name one."""
    anchored = 0
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text()):
            linked = document.parent / target if target else document
            assert linked.exists(), f"{document.name}: {target}"
            if anchor:
                assert anchor in anchors(linked), f"{document.name}: {target}#{anchor}"
                anchored += 1
    assert anchored


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_an_event_costs_the_bytes_that_the_migration_page_says(database_url, monkeypatch):
    """Only the tables' bytes: indexes grow in steps."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    documented = {
        kind: int(size)
        for kind, size in re.findall(r"^\| ([a-z ]+) \| (\d+) \|", page("audit-trail-migration.md"), re.MULTILINE)
    }
    tables = {
        "accrual": ("transaction_record", "accrual_record"),
        "burn": ("transaction_record", "burned_credit"),
        "rejected burn": ("rejected_event",),
    }
    assert documented.keys() == tables.keys()
    settings = load_settings()
    ledger = Ledger(settings, stripe=1)

    def size(names):
        with psycopg.connect(database_url) as connection:
            return sum(connection.execute("SELECT pg_relation_size(%s)", [name]).fetchone()[0] for name in names)

    count = 4000
    for kind, amount in (("rejected burn", 5), ("accrual", 1000), ("burn", "0.000777")):
        before = size(tables[kind])
        for start in range(0, count, 500):
            events = [json.loads(event_json(one(kind, amount, n))) for n in range(start, start + 500)]
            work = parse_call(
                APPLY_MANY, (), {"events": events}, Origin(task=APPLY_MANY), max_amount=settings.max_amount
            )
            ledger.settle(work.deliveries, work.letters)
        assert (size(tables[kind]) - before) / count == pytest.approx(documented[kind], rel=0.1), kind
    ledger.close()


def one(kind, amount, number):
    key = f"{kind[:3]}-{number:032d}"  # as long as a UUID
    if kind == "accrual":
        return Accrual(user_id=f"user-{number % 1000:06}", amount=amount, idempotency_key=key, source="purchase")
    return Burn(user_id=f"user-{number % 1000:06}", amount=amount, idempotency_key=key, action="embedding")


def test_every_command_and_group_shows_examples_that_it_understands():
    """Parsed as the command line parses them, and not run."""
    assert set(EXAMPLES) == set(commands(get_command(cli)))
    program = get_command(cli)
    for name, examples in EXAMPLES.items():
        text = help_of(*name.split())
        for example in examples:
            assert example in text
            called = understood(program, *shlex.split(example))
            assert called in {f"tokentrail {each}" for each in EXAMPLES if each}
            assert f"{called} ".startswith(f"{shlex.join(['tokentrail', *name.split()])} ")
    assert EXIT_CODES in help_of()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_command_in_a_sentence_exists(document):
    """If it is complete, its options and arguments exist too."""
    prose = FENCE.sub("", document.read_text())
    program = get_command(cli)
    for code in re.findall(r"`([^`]+)`", re.sub(r"\bID\b", "17", prose)):
        words = shlex.split(code.partition("tokentrail ")[2]) if re.search(r"(^|\s)tokentrail ", code) else []
        if not words:
            continue
        if words[0].startswith("--"):
            assert words[0] in help_of(), code
        elif " ".join(words) not in EXAMPLES:
            assert understood(program, "tokentrail", *words) in {f"tokentrail {each}" for each in EXAMPLES}, code


def understood(command, name, *arguments, parent=None):
    """The command that is called, such as `tokentrail migrate status`. Raises TyperException for a wrong word."""
    with command.make_context(name, list(arguments), parent=parent) as context:
        rest = [*context._protected_args, *context.args]
        if not rest:
            return context.command_path
        name, inner, arguments = command.resolve_command(context, rest)
        return understood(inner, name, *arguments, parent=context)


def help_of(*command):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    return re.sub(r"\s+", " ", result.output)


def commands(command, prefix=""):
    """The names of all commands and groups; the program's own is empty."""
    yield prefix.rstrip()
    if hasattr(command, "list_commands"):
        context = command.make_context(None, [], resilient_parsing=True)
        for name in command.list_commands(context):
            yield from commands(command.resolve_command(context, [name])[1], f"{prefix}{name} ")


def test_shell_completes_commands(system):
    """In bash, with the script that --show-completion prints."""
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
