"""PostgreSQL and Valkey of our own, from the wheels of two packages, for `tokentrail up` and the tests.

    __init__.py     servers(): a pair for as long as a `with` block lasts
    guard.py        the process between us and the pair: whoever is killed, nothing is left running
    postgres.py     one PostgreSQL: start, stop, kill, restart
    valkey.py       one Valkey, likewise
    process.py      what the two have in common: lock, log, port, readiness
    binaries.py     where the programs are
    unprivileged.py PostgreSQL refuses to run as root: as whom it runs then, and where

Only the binaries of the two packages are used. Their Python layers leave servers running when they are
killed, and one of them adds a system account and opens up parent folders when it runs as root.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from worker.config import ROOT
from worker.files import open_ours
from worker.local.embedded.binaries import postgres_folder, valkey_program
from worker.local.embedded.postgres import PostgresServer
from worker.local.embedded.process import FOLDER_MODE, LOGS, EmbeddedError, make_folder
from worker.local.embedded.unprivileged import discard
from worker.local.embedded.valkey import ValkeyServer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EmbeddedError", "PostgresServer", "Servers", "ValkeyServer", "discard", "make_folder", "servers"]

#: Seconds the guard may take to stop both servers before it is killed, and they with it.
STOP_SECONDS = 60


@dataclass(frozen=True)
class Servers:
    """A running pair. The addresses carry the passwords, so they are kept out of `repr`."""

    database_url: str = field(repr=False)
    broker_url: str = field(repr=False)
    pids: tuple[int, ...]  # guard, PostgreSQL, Valkey
    logs: Path
    _guard: subprocess.Popen[str] = field(repr=False, compare=False)

    def check(self) -> None:
        """Raise EmbeddedError, in one sentence, when a server has ended by itself. Costs a system call."""
        if self._guard.poll() is not None:
            raise _failure(self._guard, self.logs)


@contextlib.contextmanager
def servers(data: Path | None = None, *, durable: bool | None = None) -> Iterator[Servers]:
    """PostgreSQL with an empty database and Valkey, both on loopback, until the block is left.

    Without `data` they are thrown away afterwards and, unless `durable`, spare themselves all syncing.
    With it they are kept there, and what they have acknowledged survives any crash. Each start has new
    ports. Raises EmbeddedError when one does not start, or when another process has the same `data`, Untrusted when
    others can write there, OSError when the machine does not let it.
    """
    postgres_folder()  # where a program is missing, nothing is begun, and no folder of empty logs stays behind
    valkey_program()
    if data is None:
        folder = Path(tempfile.mkdtemp(prefix="tokentrail-"))
        folder.chmod(FOLDER_MODE)
    else:
        folder = data.absolute()
    guard = _start_guard(folder, throw_away=data is None, durable=durable)
    try:
        pair = _introduction(guard, folder)
    except BaseException:
        _stop_guard(guard)
        raise
    failed = False
    try:
        yield pair
    except EmbeddedError:
        failed = True  # it points to a log
        raise
    finally:
        _stop_guard(guard)
        if data is None:
            discard(folder, except_logs=failed)  # the guard has done it, unless it was killed


def _start_guard(folder: Path, *, throw_away: bool, durable: bool | None) -> subprocess.Popen[str]:
    make_folder(folder)
    logs = folder / LOGS
    logs.mkdir(mode=0o700, exist_ok=True)
    command = [sys.executable, "-m", "worker.local.embedded.guard", str(folder), str(os.getpid())]
    if throw_away:
        command.append("--throw-away")
    if durable if durable is not None else not throw_away:
        command.append("--durable")
    with open_ours(logs / "guard.log", "w") as log:
        return subprocess.Popen(  # noqa: S603  our own module
            command,
            stdin=subprocess.PIPE,  # never written to: that it closes is the sign to stop
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,  # where `worker` is found, installed or not
            # PGOPTIONS, PGSERVICE and the like are meant for other servers.
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
            start_new_session=True,  # Ctrl-C in the terminal is for us; the servers go last
        )


def _introduction(guard: subprocess.Popen[str], folder: Path) -> Servers:
    logs = folder / LOGS
    said = _pipe(guard.stdout).readline()
    answer: dict[str, Any] = json.loads(said) if said else {}
    if "database_url" not in answer:
        raise _failure(guard, logs, answer)
    return Servers(answer["database_url"], answer["broker_url"], tuple(answer["pids"]), logs, guard)


def _failure(guard: subprocess.Popen[str], logs: Path, answer: dict[str, Any] | None = None) -> Exception:
    """What the guard says went wrong, in `answer` or else in its last words."""
    if not answer:
        said = "" if _pipe(guard.stdout).closed else _pipe(guard.stdout).readline()
        answer = json.loads(said) if said else {}
    if answer.get("errno"):
        return OSError(answer["errno"], os.strerror(answer["errno"]), answer["path"])
    return EmbeddedError(
        answer.get("error")
        or "The guard of the embedded servers was killed or has failed, and they have ended with it: start again;"
        f" its log is {logs / 'guard.log'}."
    )


def _stop_guard(guard: subprocess.Popen[str]) -> None:
    _pipe(guard.stdin).close()
    try:
        guard.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.wait()
    _pipe(guard.stdout).close()


def _pipe(stream: IO[str] | None) -> IO[str]:
    return cast("IO[str]", stream)  # both were asked for in _start_guard
