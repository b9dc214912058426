"""An embedded Valkey. Redis 7.0 and later take the same settings."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path
from typing import ClassVar, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.local.embedded import binaries
from worker.local.embedded.process import ServerProcess, password

SETTINGS: Final = {
    "bind": "127.0.0.1",
    "save": '""',
    "maxmemory-policy": "noeviction",  # a full server must refuse messages, not drop them
}
#: A message that was acknowledged to its producer is on disk.
DURABLE: Final = {"appendonly": "yes", "appendfsync": "always"}
NOT_DURABLE: Final = {"appendonly": "no"}


class ValkeyServer(ServerProcess):
    """A Valkey on loopback; clients need the password."""

    title: ClassVar[str] = "Valkey"
    name: ClassVar[str] = "valkey"
    setting: ClassVar[str] = "TOKENTRAIL_VALKEY_SERVER"

    @property
    def url(self) -> str:
        return f"redis://:{password(self.folder)}@127.0.0.1:{self.port}/0"

    def stop(self, grace: float = 10) -> None:
        """Shut down, after what has to be on disk is there."""
        self._end(signal.SIGTERM, grace)

    def _working_folder(self) -> Path:
        return self.folder / "valkey"

    def _launch(self) -> None:
        program = binaries.valkey_program()
        self._working_folder().mkdir(mode=0o700, exist_ok=True)
        settings = SETTINGS | (DURABLE if self.durable else NOT_DURABLE) | self.options
        settings |= {"port": str(self.port), "requirepass": password(self.folder)}
        process = self._spawn([program, "-"], stdin=subprocess.PIPE).process
        # On standard input: among the arguments every user of the machine could read the password.
        assert process is not None
        assert process.stdin is not None
        with (
            contextlib.suppress(BrokenPipeError),
            process.stdin as configuration,
        ):  # wait_until_ready sees that it ended
            configuration.write("".join(f"{name} {value}\n" for name, value in settings.items()).encode())

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):  # not started, or reading its append-only file
            return False
