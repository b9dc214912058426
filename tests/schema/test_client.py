"""client/: the wheel with which other Python projects send events, as they have it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from decimal import Decimal
from email import message_from_string
from pathlib import Path

import pytest

from tests.kit.brokers import eventually
from tests.kit.stage import Stage
from worker.config import ROOT

APPLICATION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"urls", "canonical", "events", "messages", "publisher"}

#: A program of another project. It ends with an error where this repository is in reach.
PROGRAM = """
import importlib.util
import sys

from tokentrail_client import Accrual, Burn, Publisher, PublishError

assert [name for name in ("schema", "worker") if importlib.util.find_spec(name)] == []
accrual = Accrual(user_id="ann", amount="12.5", source="shop", idempotency_key="order-1", metadata={"order": 1})
burn = Burn(user_id="ann", amount="0.000777", action="chat", idempotency_key="call-1")
try:
    with Publisher(sys.argv[1]) as tokens:
        tokens.publish(accrual)
        print(tokens.publish_all([accrual, burn]))
except PublishError as error:
    print(error)
"""


@pytest.fixture
def stage(database_url, broker_url, tmp_path):
    stage = Stage(database_url, broker_url, tmp_path)
    yield stage
    stage.close()


@pytest.fixture
def metadata(producer):
    (text,) = (text for name, text in contents(producer.wheel).items() if name.endswith("/METADATA"))
    return message_from_string(text)


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def requirements(metadata):
    """Each requirement's name, and what it asks of the version."""
    return dict(re.fullmatch(r"([\w-]+)(.*)", each).groups() for each in metadata.get_all("Requires-Dist"))


def test_what_another_project_publishes_is_applied_once(producer, stage):
    assert all(map(importlib.util.find_spec, ("schema", "worker"))), "the program shall miss what is found here"
    stage.start()

    assert producer.run(PROGRAM, stage.broker_url) == "2\n"
    eventually(lambda: stage.count("transaction_record") == 2 and stage.in_redis() == 0, 30)

    assert stage.balance("ann") == Decimal("12.499223")
    assert stage.count("dead_letter") == 0
    assert stage.broken() == []


def test_another_project_is_told_that_nobody_took_its_events(producer):
    said = producer.run(PROGRAM, "redis://127.0.0.1:1/0")
    assert re.fullmatch(r"Redis at 127\.0\.0\.1:1/0 cannot be used \(.*\): 1 event not published\.\n", said), said


def test_the_wheel_holds_what_a_producer_needs_and_nothing_else(producer):
    version = APPLICATION["version"]
    assert producer.wheel.name == f"tokentrail_client-{version}-py3-none-any.whl"
    about = f"tokentrail_client-{version}.dist-info"
    assert sorted(contents(producer.wheel)) == sorted(
        [
            "tokentrail_client/__init__.py",
            *(f"tokentrail_client/{module}.py" for module in MODULES),
            "tokentrail_client/py.typed",
            *(f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")),
        ]
    )
    held = contents(producer.wheel)
    assert held[f"{about}/licenses/LICENSE"] == (ROOT / "LICENSE").read_text()
    for module in MODULES:
        assert held[f"tokentrail_client/{module}.py"] == (ROOT / "schema" / f"{module}.py").read_text()


def test_every_module_of_the_wheel_imports(producer):
    program = """
import importlib, pkgutil, tokentrail_client
for module in pkgutil.iter_modules(tokentrail_client.__path__):
    print(importlib.import_module(f"tokentrail_client.{module.name}").__name__)
for name in tokentrail_client.__all__:
    getattr(tokentrail_client, name)
"""
    assert set(producer.run(program).split()) == {f"tokentrail_client.{module}" for module in MODULES}


def test_the_wheel_requires_what_its_modules_import(producer, metadata):
    imported = set()
    for name, text in contents(producer.wheel).items():
        for node in ast.walk(ast.parse(text)) if name.endswith(".py") else ():
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    provided = importlib.metadata.packages_distributions()
    assert requirements(metadata).keys() == {
        each.lower().replace("_", "-") for name in imported - sys.stdlib_module_names for each in provided[name]
    }


def test_the_wheel_says_what_it_is(metadata):
    assert metadata["Version"] == APPLICATION["version"]
    assert metadata["License-Expression"] == APPLICATION["license"]
    assert metadata["Requires-Python"] == APPLICATION["requires-python"]
    assert metadata.get_payload() == (ROOT / "client" / "README.md").read_text()


def test_the_oldest_packages_that_the_wheel_allows_will_do(producer, metadata, broker_url, tmp_path):
    """Or the oldest of them that this Python can install."""
    asked = [f"{name}{versions}" for name, versions in requirements(metadata).items() if versions]
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--no-config", "--only-binary", ":all:"]
    installed = subprocess.run(
        [
            *uv,
            "--resolution",
            "lowest-direct",
            "--python",
            sys.executable,
            "--target",
            tmp_path,
            producer.wheel,
            *asked,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode and "Failed to fetch" in installed.stderr and os.environ.get("CI") != "true":
        pytest.skip(f"uv reaches no package index: {installed.stderr.strip()[-300:]}")
    assert installed.returncode == 0, installed.stderr
    assert producer.run(PROGRAM, broker_url, packages=tmp_path) == "2\n"


def test_a_type_checker_knows_what_the_client_takes(producer):
    program = producer.folder / "checked.py"
    program.write_text(
        "from tokentrail_client import Burn\n"
        'Burn(user_id="ann", amount="0.1", action="chat", idempotency_key="1", metadata={"tokens": 12})\n'
        'Burn(user_id="ann", amount=0.1, action="chat", idempotency_key="1")\n'
    )
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", program.name],
        cwd=producer.folder,
        env={**os.environ, "PYTHONPATH": str(producer.installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    wrong = re.findall(r"^checked\.py:(\d+): error: (.*)  \[", checked.stdout, re.MULTILINE)
    assert [line for line, _ in wrong] == ["3"], checked.stdout
