"""The command line: in this process, which is fast, or in one of its own, which is as a user runs it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.kit.wait import PATIENCE
from worker import config
from worker.cli import main
from worker.config import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

TOKENTRAIL = (sys.executable, "-m", "worker.cli")


class Result(NamedTuple):
    """What a command that has ended leaves behind."""

    code: int
    out: str
    err: str


def assert_one_line(result: Result, code: int, *nouns: str) -> None:
    """The command refused with this exit code and one line that names what is wrong, without traceback or password."""
    assert result.code == code, result.err
    assert result.err.startswith("tokentrail: "), result.err
    assert result.err.count("\n") == 1, "one line"
    assert "Traceback" not in result.err
    assert "hush" not in result.err, "no password"
    for noun in nouns:
        assert noun in result.err, result.err


class Tokentrail:
    """The fixture `tokentrail`: `tokentrail("history", "ann", DATABASE_URL=url)` runs the command in this process.

    Environment variables stay set until the end of the test; None unsets one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capture = monkeypatch, capture

    def __call__(self, *arguments: object, stdin: bytes = b"", **environment: object) -> Result:
        for name, value in environment.items():
            if value is None:
                self._monkeypatch.delenv(name, raising=False)
            else:
                self._monkeypatch.setenv(name, str(value))
        self._monkeypatch.setattr(sys, "argv", ["tokentrail", *map(str, arguments)])
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        config.load_settings.cache_clear()
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(ended.value.code, *self._capture.readouterr())  # type: ignore[arg-type]


def run(
    *arguments: object, program: Sequence[object] = TOKENTRAIL, cwd: Path = ROOT, stdin: str = "", **environment: str
) -> Result:
    """Run `tokentrail …`, or another program, in a process of its own until it ends."""
    ended = subprocess.run(
        [*map(str, program), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return Result(ended.returncode, ended.stdout, ended.stderr)


@contextmanager
def started(
    *arguments: object, program: Sequence[object] = TOKENTRAIL, cwd: Path = ROOT, output: Any = None, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Start `tokentrail …`, or another program, in a process of its own; it is killed in the end.

    Both its streams go to the file `output`; without one each is a pipe.
    """
    with subprocess.Popen(
        [*map(str, program), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if output is None else output,
        stderr=subprocess.PIPE if output is None else output,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
