"""Child processes that live and die together: start, read, restart, stop. For `up`, `demo` and `worker --processes`.

One thread does it all, so that forking is safe and the kernel's parent-death signal, which follows the thread
that forked, means what it says.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from worker.files import open_ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None

#: Seconds before the n-th restart in a row; a child that ran for HEALTHY_SECONDS begins again at the first.
BACKOFF: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
HEALTHY_SECONDS: Final = 60.0
TAIL_LINES: Final = 6


class Child:
    """One program, started again and again under one name."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        on_line: Callable[[str, str], None] | None = None,
        log: Path | None = None,
    ) -> None:
        """Its output goes to `on_line(name, line)`, or is appended to `log`; with neither it goes where ours goes."""
        self.name = name
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.failures = 0  # restarts in a row
        self.restart_at: float | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._command, self._env, self._cwd, self._on_line, self._log = list(command), env, cwd, on_line, log
        self._partial = b""
        self._started = 0.0
        self._unstarted: OSError | None = None  # why the last start did not come to a process

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.name} was never started"
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def last_words(self) -> str:
        """How it ended, and the last lines that it printed."""
        if self._unstarted is not None:
            return f"could not be started ({self._unstarted.strerror or self._unstarted})"
        code = self.process.returncode if self.process else None
        ended = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
        tail = self.tail or (self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if self._log else ())
        lines = "".join(f"\n    {line}" for line in tail)
        return f"{ended}, its last lines being:{lines}" if lines else f"{ended} without a word"

    def start(self) -> None:
        """Start it in a process group of its own: Ctrl-C in the terminal is for us, who stop it in its turn."""
        self.restart_at = None
        self.tail.clear()
        self._partial = b""
        self._started = time.monotonic()
        with open_ours(self._log, "ab") if self._log else contextlib.nullcontext() as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own programs
                self._command,
                env=dict(self._env) if self._env is not None else None,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._on_line else log,
                stderr=subprocess.STDOUT if self._on_line else log,
                process_group=0,
                preexec_fn=partial(_die_with, os.getpid()),  # noqa: PLW1509 - no threads; nothing else sees a SIGKILL
            )
        if self.process.stdout:
            os.set_blocking(self.process.stdout.fileno(), False)

    def start_again(self) -> bool:
        """Start it once more; False when the machine has no process, memory or file for it just now."""
        try:
            self.start()
        except OSError as error:
            self._unstarted = error
            return False
        self._unstarted = None
        return True

    def restart_later(self) -> float:
        """Plan the next start; returns in how many seconds."""
        if time.monotonic() - self._started > HEALTHY_SECONDS:
            self.failures = 0
        delay = BACKOFF[min(self.failures, len(BACKOFF) - 1)]
        self.failures += 1
        self.restart_at = time.monotonic() + delay
        return delay

    def signal(self, number: int) -> None:
        """Send a signal to the process; SIGKILL to its whole group. No error when it has ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(self.pid, number)
                else:
                    os.kill(self.pid, number)

    def read(self) -> bool:
        """Hand on what it has printed since; False at the end of its output."""
        if self.process is None or self.process.stdout is None or self._on_line is None:
            return False
        try:
            data = os.read(self.process.stdout.fileno(), 65536)
        except BlockingIOError:
            return True
        *lines, self._partial = (self._partial + data).split(b"\n")
        if not data and self._partial:
            lines, self._partial = [self._partial], b""
        for raw in lines:
            line = raw.decode(errors="replace").rstrip()
            if line:
                self.tail.append(line)
                self._on_line(self.name, line)
        return bool(data)


class Family:
    """The children, and the signals that end them all."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self.stopping = 0  # how often we were asked to stop

    @property
    def hurried(self) -> bool:
        """We were asked to stop more than once: kill instead of waiting."""
        return self.stopping > 1

    def add(self, child: Child) -> Child:
        self.children.append(child)
        child.start()
        return child

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Count SIGINT, SIGTERM and SIGHUP in `stopping` instead of dying of them, until the block is left."""

        def stop(*_: object) -> None:
            self.stopping += 1

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup shall still work
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def step(self, seconds: float = 0.1) -> list[Child]:
        """Read output for at most `seconds`, start whom it is time to; returns the children found dead just now."""
        self._read(seconds)
        now = time.monotonic()
        found = []
        for child in self.children:
            if child.restart_at is not None:
                if now >= child.restart_at and not self.stopping and not child.start_again():
                    found.append(child)  # our own end would be that of its healthy siblings
            elif child.process is not None and not child.running and not self.stopping:
                self._drain(child)
                found.append(child)
        return found

    def stop(self, children: Iterable[Child], grace: float | None, *, say: Callable[[str], None] | None = None) -> None:
        """Ask these to end and wait, `grace` seconds at most (None: for ever); then, or when asked again, kill them."""
        group = list(children)
        for child in group:
            child.restart_at = None
            child.signal(signal.SIGTERM)
        end = time.monotonic() + (grace if grace is not None else float("inf"))
        while any(child.running for child in group) and time.monotonic() < end and not self.hurried:
            self._read(0.05)
        for child in group:
            if child.running:
                if say:
                    why = "it was asked twice to stop" if self.hurried else "it has not ended by itself"
                    say(f"{child.name} is killed: {why}.")
                child.signal(signal.SIGKILL)
            if child.process is not None:
                child.process.wait()
                self._drain(child)

    def _read(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            for child in self.children:
                if child.process and child.process.stdout and not child.process.stdout.closed:
                    selector.register(child.process.stdout, selectors.EVENT_READ, child)
            if not selector.get_map():
                time.sleep(seconds)
                return
            for key, _ in selector.select(seconds):
                if not key.data.read():
                    key.data.process.stdout.close()

    def _drain(self, child: Child) -> None:
        """Read what a dead child has left. Its own children may hold the pipe open, so never wait for its end."""
        assert child.process is not None
        pipe = child.process.stdout
        if pipe is not None and not pipe.closed:
            while _readable(pipe.fileno()) and child.read():
                pass
            pipe.close()


def _readable(descriptor: int) -> bool:
    """Whether reading would return at once."""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(0))


def _die_with(parent: int) -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
