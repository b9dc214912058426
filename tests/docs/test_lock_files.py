"""The lock files have every dependency, with hashes, and name no package index."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ["requirements.lock", "requirements-dev.lock"]


def locked(lock: str) -> dict[str, str]:
    """Each package with its version and everything that follows up to the next."""
    entries = re.findall(r"^(\S+)==(\S+)(.*(?:\n[ #].*)*)", (ROOT / lock).read_text(), re.MULTILINE)
    return {name.partition("[")[0]: version + rest for name, version, rest in entries}


def required(group: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = project["project"]["dependencies"] if group == "runtime" else project["dependency-groups"][group]
    names = {re.match(r"[\w.-]+", each).group().lower() for each in requirements if isinstance(each, str)}
    included = {each["include-group"] for each in requirements if not isinstance(each, str)}
    return names.union(*map(required, included))


def test_lock_files_have_every_dependency_of_pyproject():
    assert required("runtime") | required("build") <= locked("requirements.lock").keys()
    assert required("runtime") | required("dev") <= locked("requirements-dev.lock").keys()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_its_hashes(lock):
    assert [name for name, rest in locked(lock).items() if "--hash=sha256:" not in rest] == []


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_names_no_package_index(lock):
    assert re.findall(r"^-.*|.*(?:://|file:).*", (ROOT / lock).read_text(), re.MULTILINE) == []


def test_tests_and_users_have_the_same_versions():
    tested, used = locked("requirements-dev.lock"), locked("requirements.lock")
    versions = [(name, rest.split()[0], tested[name].split()[0]) for name, rest in used.items()]
    assert [each for each in versions if each[1] != each[2]] == []
