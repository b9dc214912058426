"""What the embedded servers have in common: a folder with lock, log and password, a port, start and end."""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import socket
import time
from abc import ABC, abstractmethod
from typing import IO, TYPE_CHECKING, Any, ClassVar, Final

from worker.errors import TokentrailError
from worker.files import make_own_folder, open_own, read_own
from worker.processes import Child, exit_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: Root runs PostgreSQL as another account, which must be able to pass through the folder.
FOLDER_MODE: Final = 0o711 if os.geteuid() == 0 else 0o700
LOGS: Final = "logs"

#: Seconds until a server must answer: at its start Valkey reads an append-only file of any size.
START_SECONDS = 60.0
#: Seconds in which a start that failed for a reason that goes away by itself is tried again.
RETRY_SECONDS: Final = 10.0
#: These go away: the port was taken after it was chosen, or a killed PostgreSQL has not quite ended.
TRANSIENT_ERRORS: Final = ("Address already in use", "pre-existing shared memory", 'postmaster.pid" already exists')

#: Variables of our environment that the servers get: paths of programs and libraries, and the time zone.
_PASSED_ON: Final = ("PATH", "LD_LIBRARY_PATH", "TZ")

_OTHER_SERVERS: Final = "set DATABASE_URL and BROKER_URL to other servers"


class EmbeddedError(TokentrailError):
    """An embedded server cannot run; the message says why, what to do, and where its log is."""


def cannot_run(program: str | Path, reason: str | None, setting: str) -> EmbeddedError:
    """The error for a program that cannot be executed; `setting` is the variable that names another one."""
    return EmbeddedError(f"Cannot run {program} ({reason}): name another program with {setting}, or {_OTHER_SERVERS}.")


class ServerProcess(ABC):
    """A server on loopback. Its data, password and log are in `folder`, which only one process may use at a time.

    The port is chosen at the first start and kept, so that a restarted server has the same address. The server ends
    with the process that started it (on Linux, if its main thread did).
    """

    title: ClassVar[str]
    name: ClassVar[str]
    setting: ClassVar[str]  # the variable that names another program

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        *,
        durable: bool = True,
        options: Mapping[str, str] | None = None,
        owner: int | None = None,
    ) -> None:
        """`options` are settings of the server; `owner` is the process named to others that want the folder."""
        self.folder = folder.absolute()
        self.durable = durable
        self.options = dict(options or {})
        self.log = self.folder / LOGS / f"{self.name}.log"
        self.owner = owner or os.getpid()
        self.port = port or free_port()
        self.child: Child | None = None
        self._port_is_fixed = port is not None
        self._lock: IO[str] | None = None

    @property
    def pid(self) -> int:
        """The server's process id, also after its end."""
        assert self.child is not None, f"{self.title} was never started"
        return self.child.pid

    @property
    def running(self) -> bool:
        return self.child is not None and self.child.running

    def start(self) -> None:
        """Return when the server answers. Raises EmbeddedError when it does not."""
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Start the server without waiting for it, so that two can start side by side."""
        if self.running:
            raise EmbeddedError(f"{self.title} is already running, as process {self.pid}.")
        make_folder(self.folder)
        self.log.parent.mkdir(mode=0o700, exist_ok=True)
        self._take_lock()
        try:
            self._launch()
        except BaseException:
            self._release_lock()
            raise

    def wait_until_ready(self) -> None:
        """Return when the server answers. Raises EmbeddedError when it ends first, or takes START_SECONDS."""
        began = time.monotonic()
        while not self._answers():
            waited = time.monotonic() - began
            if not self.running:
                self._retry_or_raise(waited)
            elif waited > START_SECONDS:
                self.kill()
                raise self.failure(f"did not answer within {START_SECONDS:.0f} s")
            time.sleep(0.02)
        self._port_is_fixed = True

    def failure(self, fact: str, advice: str = f"fix that, or {_OTHER_SERVERS}") -> EmbeddedError:
        """The error for this server: the fact, the end of its log, and what to do."""
        lines = self.child.last_lines(3) if self.child else []
        reason = " / ".join(lines)[-500:] or "its log is empty"
        return EmbeddedError(f"{self.title} {fact} ({reason}): {advice}; its log is {self.log}.")

    def unexpected_end(self) -> EmbeddedError:
        """The error for a server that was ready once and has ended."""
        return self.failure(self._exit_text(), "start again")

    def kill(self) -> None:
        """SIGKILL, as by the kernel when memory runs out: what was not synced may be lost."""
        self._end(signal.SIGKILL, grace=60)

    @abstractmethod
    def _launch(self) -> None: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _spawn(self, command: Sequence[str | Path], **options: Any) -> Child:
        """Start a program that writes to the log, holds the lock while it lives, and stops when this process ends."""
        assert self._lock is not None
        child = Child(
            self.title,
            command,
            env=environment(),
            cwd=self._working_folder(),
            log=self.log,
            death_signal=signal.SIGINT,
            pass_fds=[self._lock.fileno()],
        )
        try:
            child.start(**options)
        except OSError as error:
            raise cannot_run(command[0], error.strerror, self.setting) from None
        self.child = child
        return child

    def _working_folder(self) -> Path | str:
        return "/"

    def _end(self, number: signal.Signals, grace: float) -> None:
        if self.child is not None:
            self.child.stop(number, grace)
        self._release_lock()

    def _retry_or_raise(self, waited: float) -> None:
        assert self.child is not None
        log = "\n".join(self.child.last_lines())
        if waited > RETRY_SECONDS or not any(error in log for error in TRANSIENT_ERRORS):
            self._release_lock()
            raise self.failure(f"{self._exit_text()} before it answered")
        if not self._port_is_fixed:
            self.port = free_port()
        time.sleep(0.1)
        self.launch()

    def _exit_text(self) -> str:
        assert self.child is not None
        assert self.child.process is not None
        return exit_text(self.child.process.returncode)

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        lock = open_own(self.folder / f"{self.name}.lock", "a+")
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                owner, starter = (int(pid) for pid in (lock.read().split() or ("0", "0")))
                # The server of a process that was killed a moment ago still holds the lock, and is about to end.
                ending = starter == os.getpid() or not (_is_alive(starter) and _is_alive(owner))
                if not ending or time.monotonic() > deadline:
                    lock.close()
                    raise EmbeddedError(
                        f"{self.folder} is in use by process {owner}: stop that process, or choose another folder."
                    ) from None
                time.sleep(0.05)
        lock.truncate(0)
        lock.seek(0)
        lock.write(f"{self.owner} {os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()  # the server's processes hold it until they have ended
            self._lock = None


def make_folder(folder: Path) -> None:
    """Make a server's folder. Raises UntrustedFileError for a folder that exists and that others can change."""
    make_own_folder(folder, FOLDER_MODE)


def free_port() -> int:
    """A port on loopback that is free now; another process may take it a moment later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def password(folder: Path) -> str:
    """The password of the servers in `folder`, made at the first call and readable only by its owner."""
    path = folder / "password"
    if not path.exists():
        draft = folder / f"password.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            with open_own(draft, "x") as file:
                file.write(secrets.token_hex(16))
            os.link(draft, path)  # atomic, and fails if there is one: two servers may start at once
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return read_own(path)


def environment() -> dict[str, str]:
    """The little of our environment that servers get.

    A server may run as `nobody`, whose other processes could read our passwords there; and variables that are meant
    for other servers (PG…) would change what it does.
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
