"""How `make` finds the Python for .venv; what its targets run is tested by .ci/run."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from worker.config import ROOT


@pytest.fixture
def make(tmp_path, requires_program):
    """`make(script)`: make's exit code and standard error, with `script` as the Python to use."""
    requires_program("make")
    shutil.copy(ROOT / "Makefile", tmp_path)

    def run(script):
        python = tmp_path / "a python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
        ended = subprocess.run(
            ["make", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return ended.returncode, ended.stderr

    return run


def test_a_python_that_is_too_old_is_refused(make):
    code, error = make("exit 1")
    assert code == 2
    assert "No usable Python 3.11 or newer" in error


def test_a_python_without_venv_is_refused_with_the_package_to_install(make):
    code, error = make('case "$2" in *ensurepip*) exit 1;; esac')
    assert code == 2
    assert "python3-venv" in error
