"""Real Celery workers, started with the arguments of `tokentrail worker`, to be killed, frozen and stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kit.brokers import eventually
from worker.cli.worker import CELERY

from . import entry

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Seconds that a start or a stop may take on a machine that has much else to do.
LONGEST = 60

_nursery = multiprocessing.get_context("forkserver")
_nursery.set_forkserver_preload([*entry.IMPORTED_BEFORE, entry.__name__])


class Worker:
    """One worker process, which is starting when this returns."""

    def __init__(
        self, name: str, folder: Path, environment: Mapping[str, str], poison: str = "", quit_at: str = ""
    ) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.log.touch()
        arguments = [*CELERY, "--loglevel", "INFO", "--hostname", f"{name}@%h"]
        self.process = _nursery.Process(
            target=entry.run, args=(arguments, {**os.environ, **environment}, str(self.log), poison, quit_at)
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def ready(self) -> Worker:
        """Return when it consumes."""
        deadline = time.monotonic() + LONGEST
        while self.alive and not self.said(" ready."):
            assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.last_words()}"
            time.sleep(0.02)
        assert self.alive, f"{self.name} ended instead of starting:\n{self.last_words()}"
        return self

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def said(self, text: str) -> int:
        """How often its log has the text."""
        return self.log.read_text(errors="replace").count(text)

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]

    def kill(self) -> None:
        """SIGKILL, frozen or not; nothing happens when it has ended."""
        self.process.kill()
        self.process.join(LONGEST)
        assert not self.alive, f"{self.name} outlives SIGKILL"

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: self._state() == "T")

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self, sign: signal.Signals = signal.SIGTERM, seconds: float = LONGEST) -> int:
        """Ask it to end; its exit status. Fails when it does not end in time."""
        os.kill(self.pid, sign)
        self.process.join(seconds)
        if self.process.exitcode is None:
            os.kill(self.pid, signal.SIGUSR1)  # Celery's workers then log what each of their threads is doing
            time.sleep(1)
            raise AssertionError(f"{self.name} does not end:\n{self.last_words()}")
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
