"""client/: the wheel with which other Python projects send events, installed as they install it."""

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

from tests.kit.wait import eventually
from worker.config import ROOT

APPLICATION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"broker", "urls", "canonical", "events", "messages", "publisher", "text"}

#: A program of another project. It fails if it can import this repository.
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
def metadata(producer):
    (text,) = (text for name, text in contents(producer.wheel).items() if name.endswith("/METADATA"))
    return message_from_string(text)


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def requirements(metadata):
    """Requirement → its bounds of the version."""
    return dict(re.fullmatch(r"([\w-]+)(.*)", each).groups() for each in metadata.get_all("Requires-Dist"))


def test_what_another_project_publishes_is_applied_once(producer, stage):
    assert all(map(importlib.util.find_spec, ("schema", "worker"))), "else the program's check would prove nothing"
    stage.start()

    assert producer.run(PROGRAM, stage.broker_url) == "2\n"
    eventually(lambda: stage.count("transaction_record") == 2 and stage.in_redis() == 0)

    assert stage.balance("ann") == Decimal("12.499223")
    assert stage.count("dead_letter") == 0
    assert stage.broken() == []


def test_a_producer_learns_that_redis_is_unreachable(producer):
    output = producer.run(PROGRAM, "redis://127.0.0.1:1/0")
    assert re.fullmatch(r"Redis at 127\.0\.0\.1:1/0 cannot be used \(.*\): 1 event not published\.\n", output), output


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
    files = contents(producer.wheel)
    assert files[f"{about}/licenses/LICENSE"] == (ROOT / "LICENSE").read_text()
    for module in MODULES:
        assert files[f"tokentrail_client/{module}.py"] == (ROOT / "schema" / f"{module}.py").read_text()


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


@pytest.mark.network
def test_the_oldest_packages_that_the_wheel_allows_will_do(producer, metadata, broker_url, tmp_path):
    """Or the oldest of them that this Python can install."""
    bounds = [f"{name}{versions}" for name, versions in requirements(metadata).items() if versions]
    uv = [Path(sys.executable).with_name("uv"), "pip", "install", "--no-config", "--only-binary", ":all:"]
    options = ["--resolution", "lowest-direct", "--python", sys.executable, "--target", tmp_path]
    subprocess.run([*uv, *options, producer.wheel, *bounds], check=True, capture_output=True)
    assert producer.run(PROGRAM, broker_url, packages=tmp_path) == "2\n"


def test_a_type_checker_knows_what_the_client_takes(producer):
    program = producer.folder / "checked.py"
    program.write_text(
        "from tokentrail_client import Burn\n"
        'Burn(user_id="ann", amount="0.1", action="chat", idempotency_key="1", metadata={"tokens": 12})\n'
        'Burn(user_id="ann", amount=0.1, action="chat", idempotency_key="1")\n'
    )
    # Without the packages beside it, which the checker would read for most of ten seconds.
    checked = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--no-site-packages",
            "--ignore-missing-imports",
            "--config-file=",
            program.name,
        ],
        cwd=producer.folder,
        env={**os.environ, "MYPYPATH": str(producer.installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = re.findall(r"^checked\.py:(\d+): error: .* \[(.*)\]$", checked.stdout, re.MULTILINE)
    assert errors == [("3", "arg-type")], checked.stdout
