"""The files and packages that documents and package maps name exist, and package maps are complete."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    init.parent for top in ("schema", "worker", "bench", "tests") for init in (ROOT / top).rglob("__init__.py")
)
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FILE = r"[\w.-]+(?:/[\w.-]+)*\.(?:py|md|toml|lock|yml|svg|lua|mako)\b"


def dependencies_with_our_names():
    """Distributions, other than tokentrail's own, with a package `schema` or `worker`."""
    distributions = packages_distributions()
    return {name: sorted(set(distributions.get(name, [])) - {"tokentrail"}) for name in ("schema", "worker")}


def test_no_dependency_has_a_package_named_schema_or_worker():
    assert dependencies_with_our_names() == {"schema": [], "worker": []}


def test_a_dependency_with_such_a_package_would_be_detected(tmp_path, monkeypatch):
    for project, file in {"worker": "worker/__init__.py", "json-schema-of-others": "schema.py"}.items():
        installed = tmp_path / f"{project.replace('-', '_')}-1.0.dist-info"
        installed.mkdir()
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()  # newer Pythons ignore files of RECORD that do not exist
        (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        (installed / "RECORD").write_text(f"{file},,\n{installed.name}/METADATA,,\n{installed.name}/RECORD,,\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert dependencies_with_our_names() == {"schema": ["json-schema-of-others"], "worker": ["worker"]}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: str(package.relative_to(ROOT)))
def test_the_map_of_a_package_is_complete(package):
    """It has modules by name and packages with a slash; it may omit what pytest collects."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    collected = {*package.glob("test_*.py"), package / "conftest.py"}
    modules = {path.stem for path in {*package.glob("[!_]*.py")} - collected}
    inner = {path.name for path in package.glob("[!_.]*") if path.is_dir() and any(path.glob("[!_.]*"))}
    words = set(re.findall(r"\w+", text))
    assert modules - words == set()
    assert {name for name in inner if f"{name}/" not in text} == set()
    named = [*re.findall(FILE, text), *re.findall(r"^ *(\w+/)", text, re.MULTILINE)]
    assert [name for name in named if not any((folder / name).exists() for folder in (package, ROOT))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_file_and_folder_that_a_document_names_exists(document):
    """Relative to the root, the document or, in a drawing, worker/; a bare name may be anywhere."""
    tops = [ROOT / top for top in ("schema", "worker", "migrations", "bench", "tests", "docs")]
    anywhere = {path.name for top in tops for path in top.rglob("*")}
    text = document.read_text()
    named = {
        *re.findall(rf"(?<![\w/.:-]){FILE}", text),
        *(
            word
            for code in re.findall(r"`([^`\n]+)`", text)
            for word in code.split()
            if re.fullmatch(r"[\w./-]+/", word)
        ),
    }
    assert named or document.name != "ARCHITECTURE.md"
    folders = (ROOT, document.parent, ROOT / "worker")
    missing = {name for name in named if not any((folder / name).exists() for folder in folders)}
    assert {name for name in missing if name.rstrip("/") not in anywhere} == set()


def test_the_rules_of_the_ledger_need_nothing_but_the_standard_library():
    """Nor other modules of tokentrail, so that they can be audited alone."""
    for module in ("rules", "errors"):
        imports = [
            node
            for node in ast.walk(ast.parse((ROOT / "worker" / "ledger" / f"{module}.py").read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        names |= {"." * node.level + (node.module or "") for node in imports if isinstance(node, ast.ImportFrom)}
        assert names
        assert {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names} == set()
