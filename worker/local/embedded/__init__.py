"""PostgreSQL and Valkey from the wheels of two packages, for `tokentrail up`, `demo` and the tests.

    __init__.py     servers(): both of them while a `with` block lasts
    guard.py        the process between the program and the servers: whichever is killed, nothing is left running
    postgres.py     one PostgreSQL: start, stop, kill, restart
    valkey.py       one Valkey, likewise
    process.py      what both have in common: lock, log, port, readiness
    binaries.py     where the programs are
    unprivileged.py for root: another account for PostgreSQL, and folders that it can reach

Only the binaries of the packages are used. Their Python code leaves servers running when it is killed and, as root,
one of them adds a system account and changes the permissions of parent folders.
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
from typing import IO, TYPE_CHECKING, Any, Final, cast

from worker.config import ROOT
from worker.files import open_own
from worker.local.embedded.binaries import postgres_folder, valkey_program
from worker.local.embedded.postgres import PostgresServer
from worker.local.embedded.process import FOLDER_MODE, LOGS, EmbeddedError, make_folder
from worker.local.embedded.unprivileged import discard
from worker.local.embedded.valkey import ValkeyServer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EmbeddedError", "PostgresServer", "Servers", "ValkeyServer", "discard", "make_folder", "servers"]

#: Seconds the guard may take to stop both servers; then it is killed, and they end with it.
STOP_SECONDS: Final = 60


@dataclass(frozen=True)
class Servers:
    """Both servers, running. The URLs contain passwords, so `repr` leaves them out."""

    database_url: str = field(repr=False)
    broker_url: str = field(repr=False)
    pids: tuple[int, ...]  # guard, PostgreSQL, Valkey
    logs: Path
    _guard: subprocess.Popen[str] = field(repr=False, compare=False)

    def check(self) -> None:
        """Raise EmbeddedError when a server has ended. Costs one system call."""
        if self._guard.poll() is not None:
            raise _failure(self._guard, self.logs)


@contextlib.contextmanager
def servers(data: Path | None = None, *, durable: bool | None = None) -> Iterator[Servers]:
    """Run PostgreSQL with an empty database and Valkey, both on loopback, until the block is left.

    Without `data` their data is thrown away afterwards and, unless `durable`, never synced to disk. With `data` it is
    kept in that folder, and what they have acknowledged survives any crash. Each start chooses new ports. Raises
    EmbeddedError when a server does not start or another process uses `data`, UntrustedFileError when other
    users can write there, OSError when the operating system refuses something.
    """
    postgres_folder()  # checked first: a missing program must not leave a folder of empty logs behind
    valkey_program()
    if data is None:
        folder = Path(tempfile.mkdtemp(prefix="tokentrail-"))
        folder.chmod(FOLDER_MODE)
    else:
        folder = data.absolute()
    guard = _start_guard(folder, throw_away=data is None, durable=durable)
    try:
        running = _await_ready(guard, folder)
    except BaseException:
        _stop_guard(guard)
        raise
    failed = False
    try:
        yield running
    except EmbeddedError:
        failed = True  # its message names a log
        raise
    finally:
        _stop_guard(guard)
        if data is None:
            discard(folder, except_logs=failed)  # for a guard that was killed; otherwise it has done this


def _start_guard(folder: Path, *, throw_away: bool, durable: bool | None) -> subprocess.Popen[str]:
    """Start the guard. It must outlive this process, to stop the servers, so it is no `Child`."""
    make_folder(folder)
    logs = folder / LOGS
    logs.mkdir(mode=0o700, exist_ok=True)
    command = [sys.executable, "-m", "worker.local.embedded.guard", str(folder), str(os.getpid())]
    if throw_away:
        command.append("--throw-away")
    if durable if durable is not None else not throw_away:
        command.append("--durable")
    with open_own(logs / "guard.log", "w") as log:
        return subprocess.Popen(  # noqa: S603 - our own module
            command,
            stdin=subprocess.PIPE,  # never written to: the guard stops when it closes
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,  # where `worker` can be imported, installed or not
            # PGOPTIONS, PGSERVICE and the like are meant for other servers.
            env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
            start_new_session=True,  # Ctrl-C in the terminal reaches only us, and we stop the servers last
        )


def _await_ready(guard: subprocess.Popen[str], folder: Path) -> Servers:
    line = _pipe(guard.stdout).readline()
    report: dict[str, Any] = json.loads(line) if line else {}
    if "database_url" not in report:
        raise _failure(guard, folder / LOGS, report)
    return Servers(report["database_url"], report["broker_url"], tuple(report["pids"]), folder / LOGS, guard)


def _failure(guard: subprocess.Popen[str], logs: Path, report: dict[str, Any] | None = None) -> Exception:
    """The error that the guard reports, in `report` or else in its next line; an error about the guard if none."""
    if not report and not _pipe(guard.stdout).closed and (line := _pipe(guard.stdout).readline()):
        report = json.loads(line)
    if not report:
        return EmbeddedError(
            "The guard of the embedded servers has ended, and the servers with it: start again; its log is"
            f" {logs / 'guard.log'}."
        )
    if report.get("errno"):
        return OSError(report["errno"], os.strerror(report["errno"]), report["path"])
    return EmbeddedError(report["error"])


def _stop_guard(guard: subprocess.Popen[str]) -> None:
    _pipe(guard.stdin).close()
    try:
        guard.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.wait()
    _pipe(guard.stdout).close()


def _pipe(stream: IO[str] | None) -> IO[str]:
    return cast("IO[str]", stream)  # _start_guard asks for both
