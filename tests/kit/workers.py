"""Real Celery workers, started with the arguments of `tokentrail worker`, to be killed, frozen and stopped.

Each is a process that is forked from one which has imported Celery and kombu already: it starts in a tenth of the time
that a new interpreter takes. That `tokentrail worker` itself starts is tested in tests/local and tests/migrations.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kit import worker_process
from tests.kit.wait import PATIENCE, eventually
from worker.cli.worker import CELERY

if TYPE_CHECKING:
    from collections.abc import Mapping

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload([*worker_process.PRELOADED, worker_process.__name__])


class Worker:
    """One worker process, which is starting when the constructor returns."""

    def __init__(
        self,
        name: str,
        folder: Path,
        environment: Mapping[str, str],
        *arguments: str,
        poison: str = "",
        quit_at: str = "",
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.log.touch()
        command = [*CELERY, "--loglevel", "INFO", "--hostname", f"{name}@test", *arguments]
        self.process = _forkserver.Process(
            target=worker_process.run, args=(command, {**os.environ, **environment}, str(self.log), poison, quit_at)
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def ready(self) -> Worker:
        """Return when it consumes."""
        eventually(lambda: self.logged(" ready.") or not self.alive, f"{self.name} is ready")
        assert self.alive, f"{self.name} ended instead of starting:\n{self.log_end()}"
        return self

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def logged(self, text: str) -> int:
        """How often its log has the text."""
        return self.log.read_text(errors="replace").count(text)

    def log_end(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]

    def kill(self) -> None:
        """SIGKILL, frozen or not; does nothing when it has ended."""
        self.process.kill()
        self.process.join(PATIENCE)
        assert not self.alive, f"{self.name} outlives SIGKILL"

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: self._state() == "T")

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def send_signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        os.kill(self.pid, number)

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = PATIENCE) -> int:
        """Ask it to end; its exit status. Fails when it does not end in time."""
        self.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit status. Fails when it does not end in time, and says where it is."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.send_signal(signal.SIGUSR1)  # Celery's workers then log what each of their threads is doing
            time.sleep(1)
            raise AssertionError(f"{self.name} does not end:\n{self.log_end()}")
        return self.process.exitcode

    def files(self) -> int:
        """How many files and sockets it has open (Linux)."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def memory(self) -> int:
        """Bytes of memory it uses (Linux)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
