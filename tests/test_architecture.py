"""ARCHITECTURE.md and the maps in the packages are true: what they say of this repository is looked up in it."""

from __future__ import annotations

import sys
from importlib.metadata import packages_distributions


def brought_in():
    """Who brings in what is called as our packages are: the own installation, editable or not, does not count."""
    found = packages_distributions()
    return {name: sorted(set(found.get(name, [])) - {"tokentrail"}) for name in ("schema", "worker")}


def test_no_dependency_is_imported_by_the_name_of_one_of_our_packages():
    assert brought_in() == {"schema": [], "worker": []}


def test_a_dependency_with_the_name_of_one_of_our_packages_would_be_found(tmp_path, monkeypatch):
    for project, file in {"worker": "worker/__init__.py", "json-schema-of-others": "schema.py"}.items():
        installed = tmp_path / f"{project.replace('-', '_')}-1.0.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        (installed / "RECORD").write_text(f"{file},,\n{installed.name}/METADATA,,\n{installed.name}/RECORD,,\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert brought_in() == {"schema": ["json-schema-of-others"], "worker": ["worker"]}
