"""Child processes: start, read their output, stop, restart. For `up`, `worker --processes` and the embedded servers.

Start children from the main thread: on Linux the kernel ends them when the thread that forked them ends. Children of
other threads run without that protection.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any, Final

from worker.files import open_own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None
_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)

#: Seconds before the n-th restart in a row; a child that ran for HEALTHY_SECONDS starts again at the first.
BACKOFF_SECONDS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
HEALTHY_SECONDS: Final = 60.0
#: Of a log, what `last_lines` reads.
_MAX_TAIL_BYTES: Final = 8192


class Child:
    """A program that is started, and may be restarted, under one name. It ends when this process does."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        on_line: Callable[[str, str], None] | None = None,
        log: Path | None = None,
        death_signal: signal.Signals = signal.SIGKILL,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Pass its output to `on_line(name, line)` or append it to `log`; without both it inherits ours.

        `death_signal` is what the child gets when this process ends, even by SIGKILL (Linux only).
        """
        self.name = name
        self.failures = 0  # restarts in a row
        self.restart_at: float | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._command, self._env, self._cwd, self._on_line, self._log = list(command), env, cwd, on_line, log
        self._death_signal, self._pass_fds = death_signal, pass_fds
        self._log_start = 0  # where in the log the output of the present process starts
        self._incomplete_line = b""
        self._started = 0.0
        self._start_error: OSError | None = None

    @property
    def pid(self) -> int:
        """Its process id, also after its end."""
        assert self.process is not None, f"{self.name} was never started"
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def ending(self) -> str:
        """How it ended: "w-1 (pid 123) was killed by SIGKILL", with the last lines of its log if it has one."""
        if self._start_error is not None:
            return f"{self.name} could not be started ({self._start_error.strerror or self._start_error})"
        assert self.process is not None, f"{self.name} was never started"
        lines = "".join(f"\n    {line}" for line in self.last_lines())
        return f"{self.name} (pid {self.pid}) {exit_text(self.process.returncode)}{lines}"

    def last_lines(self, count: int = 6) -> list[str]:
        """The last lines that the present process has written to its log."""
        if self._log is None or not self._log.exists():
            return []
        with open_own(self._log, "rb") as log:
            log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - _MAX_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()][-count:]

    def start(self, **options: Any) -> None:
        """Start it in its own process group: Ctrl-C in the terminal reaches only us, and we stop it in turn.

        `options` are those of Popen. Raises OSError.
        """
        self.restart_at = None
        self._incomplete_line = b""
        self._started = time.monotonic()
        with self._open_log() as log:
            output = subprocess.PIPE if self._on_line else log
            self.process = subprocess.Popen(  # noqa: S603 - our own programs
                self._command,
                **{"stdin": subprocess.DEVNULL, **options},
                env=dict(self._env) if self._env is not None else None,
                cwd=self._cwd,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                process_group=0,
                pass_fds=self._pass_fds,
                preexec_fn=_before_exec(self._death_signal),  # noqa: PLW1509 - a few system calls, prepared before the fork
            )
        if self.process.stdout:
            os.set_blocking(self.process.stdout.fileno(), False)

    @contextlib.contextmanager
    def _open_log(self) -> Iterator[IO[bytes] | None]:
        if self._log is None:
            yield None
            return
        with open_own(self._log, "ab") as log:
            self._log_start = log.tell()
            yield log

    def restart_later(self) -> float:
        """Plan the next start; returns in how many seconds."""
        if time.monotonic() - self._started > HEALTHY_SECONDS:
            self.failures = 0
        delay = BACKOFF_SECONDS[min(self.failures, len(BACKOFF_SECONDS) - 1)]
        self.failures += 1
        self.restart_at = time.monotonic() + delay
        return delay

    def try_restart(self) -> bool:
        """Start it again; False when the operating system has no process, memory or file for it now."""
        try:
            self.start()
        except OSError as error:
            self._start_error = error
            return False
        self._start_error = None
        return True

    def signal(self, number: int) -> None:
        """Send a signal to the process; SIGKILL to its whole group. No error when it has ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(self.pid, number)
                else:
                    os.kill(self.pid, number)

    def stop(self, number: int, grace: float) -> None:
        """Send a signal and wait for the end; after `grace` seconds SIGKILL."""
        self.signal(number)
        if self.process is not None:
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                self.process.wait()

    def read(self) -> bool:
        """Pass on what it has printed since; False when there is nothing more now."""
        if self._on_line is None or self.output is None:
            return False
        try:
            data = os.read(self.output.fileno(), 65536)
        except BlockingIOError:
            return False
        *lines, self._incomplete_line = (self._incomplete_line + data).split(b"\n")
        if not data:
            lines = [self._incomplete_line]
            self.output.close()
        for line in lines:
            if text := line.decode(errors="replace").rstrip():
                self._on_line(self.name, text)
        return bool(data)

    def drain(self) -> None:
        """Read what an ended child left. Its own children may keep the pipe open, so do not wait for its end."""
        while self.read():
            pass
        if self.output is not None:
            self.output.close()

    @property
    def output(self) -> IO[bytes] | None:
        """The pipe that it prints to, while that is open."""
        pipe = self.process.stdout if self.process else None
        return None if pipe is None or pipe.closed else pipe


class Family:
    """Children that are watched and stopped together."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self._stop_requests = 0

    @property
    def stopping(self) -> bool:
        """Whether this process was asked to stop."""
        return self._stop_requests > 0

    @property
    def killing(self) -> bool:
        """Whether this process was asked to stop more than once: children are killed without waiting."""
        return self._stop_requests > 1

    def request_stop(self, *_: object) -> None:
        self._stop_requests += 1

    def add(self, child: Child) -> Child:
        self.children.append(child)
        child.start()
        return child

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Inside the block SIGINT, SIGTERM and SIGHUP request a stop instead of ending this process."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup keeps us running
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self.request_stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def step(self, seconds: float = 0.1) -> list[Child]:
        """Read output for at most `seconds` and start children that are due; returns those that have just ended."""
        self._read(seconds)
        now = time.monotonic()
        ended = []
        for child in self.children:
            if self.stopping:
                break
            if child.restart_at is not None:
                if now >= child.restart_at and not child.try_restart():
                    ended.append(child)  # raising would end this process, and with it the healthy children
            elif child.process is not None and not child.running:
                child.drain()
                ended.append(child)
        return ended

    def stop(
        self, children: Iterable[Child], grace: float | None, *, report: Callable[[str], None] | None = None
    ) -> None:
        """Send SIGTERM and wait at most `grace` seconds (None: without limit), then SIGKILL.

        A second request to stop kills at once.
        """
        group = list(children)
        for child in group:
            child.restart_at = None
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + (float("inf") if grace is None else grace)
        while any(child.running for child in group) and time.monotonic() < deadline and not self.killing:
            self._read(0.05)
        for child in group:
            if child.running:
                if report:
                    reason = "asked to stop twice" if self.killing else f"still running after {grace:.0f} s"
                    report(f"killing {child.name} (pid {child.pid}): {reason}")
                child.signal(signal.SIGKILL)
            if child.process is not None:
                child.process.wait()
                child.drain()

    def _read(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            for child in self.children:
                if child.output is not None:
                    selector.register(child.output, selectors.EVENT_READ, child)
            if not selector.get_map():
                time.sleep(seconds)
                return
            for key, _ in selector.select(seconds):
                key.data.read()


def exit_text(code: int) -> str:
    """How a process with this return code ended."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _before_exec(death_signal: int) -> Callable[[], None]:
    """What the child does between fork and exec: accept the signals that stop it, and ask to end with its parent.

    A process under nohup or in a script's background ignores SIGINT, and its children would inherit that.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    parent = os.getpid()

    def prepare() -> None:
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if _LIBC is not None and on_main_thread:
            _LIBC.prctl(_PR_SET_PDEATHSIG, death_signal)
            if os.getppid() != parent:  # the parent ended before the kernel knew
                os._exit(1)

    return prepare
