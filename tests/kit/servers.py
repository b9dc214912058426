"""Servers of a test's own, which it may break."""

from __future__ import annotations

import signal
import socket
import subprocess
from typing import TYPE_CHECKING, NamedTuple, Self

import redis

from tests.kit.wait import eventually
from worker.local.embedded import binaries

if TYPE_CHECKING:
    from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cut_connections(client: redis.Redis) -> None:
    """Cut all other connections to the logical database of `client`; other tests may use others of this server."""
    database = str(client.get_connection_kwargs()["db"])
    own = client.client_id()
    for each in client.client_list():
        if each["db"] == database and int(each["id"]) != own:
            client.client_kill_filter(_id=each["id"])


class Broker:
    """A Valkey, or whatever `program` names, on a port of its own, that a test may kill and start again."""

    def __init__(self, folder: Path, *options: str, program: str | None = None) -> None:
        self.port = free_port()
        self.folder = folder
        self._password = options[options.index("--requirepass") + 1] if "--requirepass" in options else ""
        self.command = [program or str(binaries.valkey_program()), *self._defaults(), *options]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def _defaults(self) -> list[str]:
        return ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    @property
    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(self._answers)

    def _answers(self) -> bool:
        try:
            with self.client as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False

    def kill(self) -> None:
        """As a power cut does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Sentinel(Broker):
    """One of the three that watch over a master."""

    def _defaults(self):
        configuration = self.folder / f"sentinel-{self.port}.conf"
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {self.folder.as_posix()}\n")
        return [str(configuration), "--sentinel"]


class Certificate(NamedTuple):
    """A self-signed certificate for 127.0.0.1 and its private key, as files."""

    certificate: Path
    key: Path

    @classmethod
    def create(cls, folder: Path, openssl: str) -> Certificate:
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(folder / "certificate.pem", folder / "key.pem")
        subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
        files = ["-keyout", str(made.key), "-out", str(made.certificate)]
        command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files]
        subprocess.run(command, check=True, capture_output=True)
        return made

    def server_options(self, port: int) -> list[str]:
        """The options with which a Redis listens for TLS on `port`; clients need no certificate."""
        options = {"port": port, "cert-file": self.certificate, "key-file": self.key, "ca-cert-file": self.certificate}
        options["auth-clients"] = "no"
        return [text for name, value in options.items() for text in (f"--tls-{name}", str(value))]
