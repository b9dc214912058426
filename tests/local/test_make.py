"""What make shows while pip installs, which is the first half minute that anybody has with us."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Stands where pip does: it says what pip says of four packages, one of them from a folder, and ends as told.
PIP = """#!/bin/sh
case "$*" in *--quiet*) quiet=yes;; esac
[ "$quiet" ] || printf '%s\\n' 'Collecting one==1 (from -r lock (line 1))' '  Downloading one-1.whl' \
    'Ignoring two: markers do not match' 'Collecting three==1' 'Processing /wheels/four-1.whl (from -r lock (line 4))' \
    'Installing collected packages: one, three, four'
[ -z "$TROUBLE" ] || echo "ERROR: $TROUBLE" >&2
[ -z "$TROUBLE" ]
"""


@pytest.fixture
def clone(tmp_path, requires_program):
    """The Makefile beside a virtual environment that is there, with a pip of ours."""
    requires_program("make")
    folder = tmp_path / "a clone"
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    (folder / "requirements.lock").write_text("one==1\ntwo==1\nthree==1\nfour==1\n")
    (folder / ".venv" / "made-in").write_text(f"{folder}\n")
    for name, text in (("python", "#!/bin/sh\n"), ("pip", PIP)):
        (folder / ".venv" / "bin" / name).write_text(text)
        (folder / ".venv" / "bin" / name).chmod(0o755)
    os.utime(folder / ".venv" / "made-in")
    return folder


def make(clone, output, trouble=""):
    command = ["make", ".venv/runtime", "PIP=.venv/bin/pip"]
    environment = {"PATH": os.environ["PATH"], "TROUBLE": trouble, "LC_ALL": "C"}
    return subprocess.run(command, cwd=clone, env=environment, stdout=output, stderr=output, check=False).returncode


def on_a_terminal(clone, trouble=""):
    """What make ends with, and what the terminal shows."""
    ours, theirs = pty.openpty()
    code = make(clone, theirs, trouble)
    os.close(theirs)
    shown = b""
    try:
        while said := os.read(ours, 4096):
            shown += said
    except OSError:  # nobody has the terminal open any more
        pass
    os.close(ours)
    return code, shown.decode()


def test_a_terminal_shows_how_far_it_is(clone):
    code, shown = on_a_terminal(clone)
    assert code == 0, shown
    assert "".join(f"\r  {n} of 4 packages" for n in range(1, 5)) + ", unpacking them\r\n" in shown
    assert (clone / ".venv" / "runtime").exists()


def test_what_goes_wrong_is_said_and_make_fails(clone, tmp_path):
    code, shown = on_a_terminal(clone, "no such package")
    assert code == 2
    assert "ERROR: no such package" in shown
    assert not (clone / ".venv" / "runtime").exists()
    with (tmp_path / "log").open("w") as log:
        assert make(clone, log, "no such package") == 2


def test_a_log_shows_a_line_and_no_progress(clone, tmp_path):
    with (tmp_path / "log").open("w") as log:
        assert make(clone, log) == 0
    assert (tmp_path / "log").read_text() == "Installing what requirements.lock names\n"
