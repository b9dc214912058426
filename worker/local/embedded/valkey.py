"""One Valkey of our own: its settings, its end. Redis 7.0 and later take the same."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from typing import TYPE_CHECKING, ClassVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.local.embedded import binaries
from worker.local.embedded.process import ServerProcess, password

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = {
    "bind": "127.0.0.1",
    "save": '""',
    "maxmemory-policy": "noeviction",  # a full queue must refuse, not forget
}
#: A message that was acknowledged to its publisher is on disk.
DURABLE = {"appendonly": "yes", "appendfsync": "always"}
WITHOUT_SYNCING = {"appendonly": "no"}


class ValkeyServer(ServerProcess):
    """A Valkey on loopback, with a password for everyone."""

    title: ClassVar[str] = "Valkey"
    name: ClassVar[str] = "valkey"
    variable: ClassVar[str] = "TOKENTRAIL_VALKEY_SERVER"

    @property
    def url(self) -> str:
        return f"redis://:{password(self.folder)}@127.0.0.1:{self.port}/0"

    def stop(self, seconds: float = 10) -> None:
        """End in good order: what is to be kept is on disk."""
        self._end(signal.SIGTERM, seconds)

    def _working_folder(self) -> Path:
        return self.folder / "valkey"

    def _launch(self) -> subprocess.Popen[bytes]:
        program = binaries.valkey_program()
        self._working_folder().mkdir(mode=0o700, exist_ok=True)
        settings = SETTINGS | (DURABLE if self.durable else WITHOUT_SYNCING) | self.options
        settings |= {"port": str(self.port), "requirepass": password(self.folder)}
        process = self._spawn([program, "-"], stdin=subprocess.PIPE)
        # Settings on standard input: a password among the arguments would show in every list of processes.
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as configuration:  # its end is seen later
            configuration.write("".join(f"{name} {value}\n" for name, value in settings.items()).encode())
        return process

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):  # not yet, or reading its append-only file
            return False
