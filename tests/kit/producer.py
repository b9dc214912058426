"""Another Python project: it has installed the client's wheel, and cannot import this repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

from worker.config import ROOT


class Producer(NamedTuple):
    """Where the wheel is, where it is installed, and the folder where the project's programs are."""

    wheel: Path
    installed: Path
    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Producer:
        wheel, installed, programs = build_wheel(folder), folder / "installed", folder / "programs"
        programs.mkdir()
        with zipfile.ZipFile(wheel) as archive:  # what pip does with a wheel of Python modules only
            archive.extractall(installed)
        return cls(wheel, installed, programs)

    def run(self, program: str, *arguments: str, packages: Path | None = None) -> str:
        """What `program` prints, as a script in its own process; `packages` is a folder to import from."""
        script = self.folder / "program.py"
        script.write_text(program)
        paths = [packages] if packages else [self.installed, sysconfig.get_path("purelib")]
        ended = subprocess.run(
            # Without `site` no .pth file is read: one of our virtual environment leads to this repository.
            [sys.executable, "-S", script, *arguments],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(map(str, paths))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 0, f"{program}\n{ended.stdout}\n{ended.stderr}"
        assert "Traceback" not in ended.stderr
        return ended.stdout


def build_wheel(folder: Path) -> Path:
    """The wheel that `make client` builds, in a copy of the parts of this repository that it needs."""
    clone = folder / "a clone"
    for name in ("client", "schema"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    (clone / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (clone / ".venv" / part).symlink_to(Path(sys.executable).parents[1] / part)
    (clone / ".venv" / "made-in").write_text(f"{clone.resolve()}\n")
    (clone / ".venv" / "runtime").touch()  # everything is installed
    made = subprocess.run(
        ["make", "client"],
        cwd=clone,
        env={**os.environ, "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert made.returncode == 0, f"{made.stdout}\n{made.stderr}"
    return clone / made.stdout.strip()
