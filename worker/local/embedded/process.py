"""What every embedded server has: a folder, a lock, a log, a port that stays, a parent to die with."""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from typing import IO, TYPE_CHECKING, ClassVar, Final

from worker.files import open_ours, own_folder, read_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from worker.local.embedded.unprivileged import Account

#: PostgreSQL under root is another account, which must be able to pass through the folder.
FOLDER_MODE = 0o711 if os.geteuid() == 0 else 0o700
LOGS = "logs"

#: Seconds a server may take to answer: a big append-only file is read at its start.
START_SECONDS = 60.0
#: Seconds in which troubles of a start that pass by themselves are met with another try.
PATIENCE = 10.0
#: They pass: a chosen port was taken between choosing and binding; a killed PostgreSQL has not quite ended.
PASSING_TROUBLES = ("Address already in use", "pre-existing shared memory", 'postmaster.pid" already exists')

#: What a server says of why it does not run, and what helps.
_ADVICE: Final = {
    "No space left on device": "free some space where {folder} is",
    "Disk quota exceeded": "free some space where {folder} is",
    "Cannot allocate memory": "stop something else that runs here, or give the machine more memory",
    "loading shared libraries": "install that library, or name another program with {variable}",
}
_MEND: Final = "mend what it says, or set DATABASE_URL and BROKER_URL to servers of your own"
_ANOTHER: Final = "name another program with {variable}, or set DATABASE_URL and BROKER_URL to servers of your own"
#: Free bytes below which a server that says nothing has no space to say it in: a new cluster takes as much.
_SCARCE: Final = 64 << 20
#: Bytes of its log that are looked at: what it said hours ago is not why it ends now.
_LAST: Final = 8192

#: Of our environment: where programs and libraries are, and the time zone.
_PASSED_ON: Final = ("PATH", "LD_LIBRARY_PATH", "TZ")

PR_SET_PDEATHSIG = 1
#: The signals that a server is ended with.
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


class EmbeddedError(Exception):
    """An embedded server cannot run; the message says why, what to do, and where its log is."""


def does_not_run(program: str | Path, why: str | None, variable: str) -> EmbeddedError:
    """Of a program that does not even begin, or does not get as far as its version; `variable` names another."""
    return EmbeddedError(f"{program} does not run ({why}): {_ANOTHER.format(variable=variable)}.")


class ServerProcess(ABC):
    """A server on loopback. Its data, password and log are in `folder`, which no other process may use.

    The port is chosen at the first start and stays, so that a restart has the same address. The server
    ends with the process that started it (on Linux, when that was its main thread).
    """

    title: ClassVar[str]
    name: ClassVar[str]
    variable: ClassVar[str]  # the setting that names another program

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        *,
        durable: bool = True,
        options: Mapping[str, str] | None = None,
        owner: int | None = None,
    ) -> None:
        """`options` are settings of the server itself; `owner` is the process to name to a second comer."""
        self.folder = folder.absolute()
        self.durable = durable
        self.options = dict(options or {})
        self.log = self.folder / LOGS / f"{self.name}.log"
        self.owner = owner or os.getpid()
        self.port = port or free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._port_is_fixed = port is not None
        self._lock: IO[str] | None = None
        self._log_began = 0  # where in the log the present start begins

    @property
    def pid(self) -> int:
        """The server's process id, also after its end; before its first start there is none."""
        assert self.process is not None, f"{self.title} was never started"
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Return when the server answers. Raises EmbeddedError when it does not."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Start the server and do not wait for it, so that two can start side by side."""
        if self.running:
            raise EmbeddedError(f"{self.title} runs already, as process {self.pid}.")
        make_folder(self.folder)
        self.log.parent.mkdir(mode=0o700, exist_ok=True)
        self._take_lock()
        try:
            self.process = self._launch()
        except BaseException:
            self._drop_lock()
            raise

    def wait_until_ready(self) -> None:
        """Return when the server answers. Raises EmbeddedError, with its last words, when it does not."""
        began = time.monotonic()
        while not self._answers():
            waited = time.monotonic() - began
            if waited > START_SECONDS:
                self.kill()
                raise EmbeddedError(
                    f"{self.title} did not answer within {START_SECONDS:.0f} seconds ({self._gist()}): start again when"
                    " this machine has less to do, or set DATABASE_URL and BROKER_URL to servers of your own; its log"
                    f" is {self.log}."
                )
            if not self.running:
                self._try_again_or_raise(waited)
            time.sleep(0.02)
        self._port_is_fixed = True

    def ended_by_itself(self) -> EmbeddedError:
        """How, and what helps."""
        assert self.process is not None
        code = self.process.returncode
        if code == -signal.SIGKILL:  # which leaves no word in its log
            return EmbeddedError(
                f"{self.title} was killed, by somebody or for want of memory: start again, and stop something else that"
                f" runs here should that not last; its log is {self.log}."
            )
        return self.failure(f"{self.title} has ended by itself with {_reason(code)}", ran=True)

    def failure(self, fact: str, *, ran: bool = False) -> EmbeddedError:
        """`fact`, with why, as the server says it, and what helps; one that `ran` may do so again."""
        said = self._said()
        trouble = next((trouble for trouble in _ADVICE if trouble in said), None)
        if trouble is None and not said.strip() and shutil.disk_usage(self.folder).free < _SCARCE:
            trouble = "No space left on device"
        advice = _ADVICE[trouble] if trouble else _MEND if said.strip() else _ANOTHER
        advice = advice.format(folder=self.folder, variable=self.variable)
        if ran:
            advice = f"{advice}, and start again" if trouble else f"start again, and if that fails {advice}"
        return EmbeddedError(f"{fact} ({self._gist(trouble)}): {advice}; its log is {self.log}.")

    def kill(self) -> None:
        """SIGKILL, as the kernel's OOM killer would; what was not synced may be lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self._drop_lock()

    @abstractmethod
    def _launch(self) -> subprocess.Popen[bytes]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _end(self, sign: signal.Signals, seconds: float) -> None:
        """Ask the server to end, and make it after `seconds`."""
        if self.process is not None:
            self.process.send_signal(sign)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        self._drop_lock()

    def _try_again_or_raise(self, waited: float) -> None:
        passing = any(trouble in self._said() for trouble in PASSING_TROUBLES)
        if not passing or waited > PATIENCE:
            self._drop_lock()
            assert self.process is not None
            raise self.failure(f"{self.title} ended with {_reason(self.process.returncode)} instead of starting")
        if not self._port_is_fixed:
            self.port = free_port()
        time.sleep(0.1)
        self.launch()

    def _spawn(
        self, command: Sequence[str | Path], account: Account | None = None, stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """A child that writes to our log, keeps our lock for as long as it lives, and dies with us."""
        assert self._lock is not None
        uid, gid, groups = account or (None, None, None)
        with open_ours(self.log, "ab") as log:
            self._log_began = log.tell()
            try:
                return subprocess.Popen(  # noqa: S603  the operator's choice, or the wheels'
                    command,
                    stdin=stdin,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[self._lock.fileno()],
                    preexec_fn=_beginning(),  # noqa: PLW1509  a few system calls, prepared before the fork
                    user=uid,
                    group=gid,
                    extra_groups=groups,
                    env=environment(),
                    cwd=self._working_folder(),
                )
            except OSError as error:
                raise does_not_run(command[0], error.strerror, self.variable) from None

    def _working_folder(self) -> Path | str:
        return "/"

    def _said(self) -> str:
        """What the present start has written to the log, the end of it."""
        with open_ours(self.log, "rb") as log:
            log.seek(max(self._log_began, log.seek(0, os.SEEK_END) - _LAST))
            said: bytes = log.read()
        return said.decode(errors="replace")

    def _gist(self, trouble: str | None = None) -> str:
        """The first line that names the trouble, else the last lines."""
        lines = [line.strip() for line in self._said().splitlines() if line.strip()]
        named = next((line for line in lines if trouble and trouble in line), None)
        return named or " / ".join(lines[-3:])[-500:] or trouble or "it said nothing"

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        lock = open_ours(self.folder / f"{self.name}.lock", "a+")
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                owner, starter = (int(pid) for pid in (lock.read().split() or ("0", "0")))
                # Whoever was killed a moment ago leaves a server that is about to end.
                ending = starter == os.getpid() or not (_is_alive(starter) and _is_alive(owner))
                if not ending or time.monotonic() > deadline:
                    lock.close()
                    raise EmbeddedError(
                        f"{self.folder} is in use by process {owner}: stop that, or choose another folder."
                    ) from None
                time.sleep(0.05)
        lock.truncate(0)
        lock.seek(0)
        lock.write(f"{self.owner} {os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def _drop_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()  # children that are still ending hold it until they have
            self._lock = None


def make_folder(folder: Path) -> None:
    """Make a server's folder. Raises Untrusted for one that is there and not ours alone."""
    own_folder(folder, FOLDER_MODE)


def free_port() -> int:
    """A port on loopback that is free now, and may be taken a moment later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def password(folder: Path) -> str:
    """The password of the servers in `folder`, made at the first call and readable by its owner only."""
    path = folder / "password"
    if not path.exists():
        draft = folder / f"password.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            with open_ours(draft, "x") as file:
                file.write(secrets.token_hex(16))
            os.link(draft, path)  # in one step and only if there is none: two servers may start at once
        except FileExistsError:
            pass
        finally:
            draft.unlink(missing_ok=True)
    return read_ours(path)


def _beginning() -> Callable[[], None]:
    """What a child does before it is the server: heed the signals that end it, and, on Linux, die with us.

    Under nohup or in the background of a script we ignore SIGINT, and a server inherits that until it has handlers
    of its own. At our death, whatever kills us, it gets SIGINT. The kernel watches the thread that forked, not the
    process, so a server started by any other thread than the main one would end too early: it goes without.
    """
    watched = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
    prctl = ctypes.CDLL(None, use_errno=True).prctl if watched else None
    us = os.getpid()

    def begin() -> None:
        for number in _ENDING:
            signal.signal(number, signal.SIG_DFL)
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGINT)
            if os.getppid() != us:  # we died before the kernel was told to watch
                os._exit(1)

    return begin


def environment() -> dict[str, str]:
    """What a server's program needs of ours, and nothing else: it may run as another account, whose every process
    could read our passwords there, and much that is meant for other servers would change how it behaves.
    """
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {"LC_ALL": "C"}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def _reason(code: int) -> str:
    return f"status {code}" if code >= 0 else signal.Signals(-code).name
