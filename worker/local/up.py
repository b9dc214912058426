"""`tokentrail up`: servers, worker, API and Flower, started, logged and stopped together.

Until API and Flower have answered once, a child that ends stops everything, with exit code 1; afterwards it is
restarted, with a growing delay. A server that ends stops everything. However this process ends, its children end too.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from worker.config import HOME, ROOT, load_settings
from worker.errors import TokentrailError
from worker.files import UntrustedFileError, open_own, read_own
from worker.listening import INHERITED, ListenError, listen
from worker.local.embedded import EmbeddedError, make_folder, servers
from worker.migration import deploy
from worker.output import console, migrating
from worker.processes import Child, Family
from worker.readiness import check_broker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from worker.config import Settings
    from worker.local.embedded import Servers

#: Seconds until API and Flower must have answered.
_START_SECONDS: Final = 60.0
#: Seconds each child has to end by itself, in the order in which they are stopped. The worker finishes its batch.
_GRACE_SECONDS: Final = {"demo": 2.0, "worker": 30.0, "api": 10.0, "flower": 5.0}
#: The same for a worker whose servers are gone: it would wait for them.
_GRACE_SECONDS_WITHOUT_SERVERS: Final = 2.0
#: Ports tried for API and Flower, from the configured one on.
_MAX_PORTS: Final = 200
#: Flower warns of each worker that is slow to answer its inspections.
_ERRORS_ONLY: Final = ("--", "--logging=error")
_COLOURS: Final = {"up": "bold", "worker": "green", "api": "cyan", "flower": "magenta", "demo": ""}


class UpError(TokentrailError):
    """`up` cannot start or go on; the message says why."""


def up(*, with_demo: bool) -> None:
    """Run everything until SIGINT, SIGTERM or SIGHUP; then stop worker, API, Flower and servers, in this order.

    Raises UpError, EmbeddedError, ConfigError, NotReady or UntrustedFileError; nothing is left running then.
    """
    make_folder(HOME)
    family = Family()
    with _only_one(), family.signals(), contextlib.ExitStack() as stack:
        stack.callback(_remove_addresses)
        _remove_addresses()  # of an `up` that was killed: the settings would take its servers for running ones
        load_settings.cache_clear()
        settings = load_settings()
        if settings.broker_url:
            check_broker(settings.broker())  # the worker prints its warnings
        screen = _Screen(family)
        _System(settings, family, screen).run(stack, with_demo=with_demo)
    screen.say("stopped; nothing is left running")


class Service:
    """API or Flower: the arguments of its command, and the listening socket that is passed on to it."""

    def __init__(self, name: str, host: str, port: int, health_path: str, options: Sequence[str] = ()) -> None:
        self.name, self._host, self._port = name, host, port
        self._health_path, self._options = health_path, options
        self._socket: socket.socket | None = None

    @property
    def url(self) -> str:
        # What listens on all addresses is reached by loopback.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)  # noqa: S104 - only compared
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    @property
    def arguments(self) -> list[str]:
        return [self.name, "--host", self._host, "--port", str(self._port), *self._options]

    def listen(self) -> None:
        """Listen on the first port, from the configured one on, that no other program listens on."""
        ports = range(self._port, min(self._port + _MAX_PORTS, 65_536))
        for self._port in ports:
            try:
                self._socket = listen(self._host, self._port)
            except ListenError as error:
                if not error.taken:
                    raise
            else:
                return
        raise UpError(
            f"No port from {ports[0]} to {ports[-1]} is free on {self._host}: stop a program that listens there, or set"
            f" TOKENTRAIL_{self.name.upper()}_PORT."
        )

    @property
    def descriptor(self) -> int:
        assert self._socket is not None, f"{self.name} does not listen"
        return self._socket.fileno()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def problem(self) -> str | None:
        """Why the health check fails; None when it answers 200."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=1)
        try:
            connection.request("GET", self._health_path)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            return f"{self.url}: {getattr(error, 'strerror', None) or error or type(error).__name__}"
        finally:
            connection.close()
        if response.status == http.HTTPStatus.OK:
            return None
        return f"{self.url}{self._health_path}: {response.status} {response.reason}"


class _Screen:
    """Standard output: the lines of `up` and of its children, each with the name of its origin."""

    def __init__(self, family: Family) -> None:
        self.console = console()
        self._family = family
        self._held: list[Text] | None = None

    def say(self, sentence: str) -> None:
        self.child_line("up", sentence)

    def child_line(self, name: str, line: str) -> None:
        text = Text.assemble((f"{name:>7} | ", _COLOURS[name]), Text.from_ansi(line))
        if self._held is None:
            self.print(text)
        else:
            self._held.append(text)

    def print(self, text: Text) -> None:
        try:
            self.console.print(text, soft_wrap=True)
            self.console.file.flush()
        except (OSError, SystemExit):  # the reader of our output has ended (rich exits then): stop in order, silently
            self._family.request_stop()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def hold(self) -> None:
        """Keep lines until `release`, while the demo draws on the terminal."""
        if self.console.is_terminal:
            self._held = []

    def release(self) -> None:
        held, self._held = self._held, None
        for text in held or ():
            self.print(text)


class _System:
    """One run of `up`: servers, children, and the services that have an address."""

    def __init__(self, settings: Settings, family: Family, screen: _Screen) -> None:
        self._settings = settings
        self._family = family
        self._screen = screen
        self._servers: Servers | None = None  # embedded ones
        self._grace = _GRACE_SECONDS
        self._environment: dict[str, str] = {}
        self._addresses: dict[str, str] = {}
        self._api = Service("api", settings.api_host, settings.api_port, "/readyz")
        self._flower = Service("flower", "127.0.0.1", settings.flower_port, "/healthcheck", _ERRORS_ONLY)
        self._services = (self._api, self._flower)

    def run(self, stack: contextlib.ExitStack, *, with_demo: bool) -> None:
        self._start_servers(stack)
        if self._family.stopping:
            return
        self._migrate()
        try:
            self._start_children()
            self._wait_until_answering()
            if with_demo and not self._family.stopping:
                self._run_demo()
            if not self._family.stopping:
                self._announce()
            while not self._family.stopping:
                self._step(self._restart)
        except EmbeddedError:
            self._grace = dict.fromkeys(_GRACE_SECONDS, _GRACE_SECONDS_WITHOUT_SERVERS)
            raise
        finally:
            self._stop_children()

    def _start_servers(self, stack: contextlib.ExitStack) -> None:
        """Find out the URLs of PostgreSQL and the broker: those of the settings, else of servers started here."""
        database_url, broker_url = self._settings.database_url, self._settings.broker_url
        if not (database_url and broker_url):
            began = time.monotonic()
            self._servers = stack.enter_context(servers(HOME / "data"))
            stack.callback(lambda: self._screen.say("stopping PostgreSQL and Valkey …"))
            seconds = time.monotonic() - began
            self._screen.say(f"started PostgreSQL and Valkey ({seconds:.1f} s); data and logs: {HOME / 'data'}")
        for name, url in (("database_url", database_url), ("broker_url", broker_url)):
            self._addresses[name] = url.get_secret_value() if url else getattr(self._servers, name)

    def _migrate(self) -> None:
        database_url = self._addresses["database_url"]
        with migrating(self._screen.console):
            deployed = deploy(database_url)
        if deployed.warning:
            self._screen.say(deployed.warning)
        elif deployed.applied:
            self._screen.say(f"migrated the database to {deployed.applied[-1]}")

    def _start_children(self) -> None:
        self._environment = {
            **os.environ,
            "DATABASE_URL": self._addresses["database_url"],
            "BROKER_URL": self._addresses["broker_url"],
            "TOKENTRAIL_HOME": str(HOME.absolute()),
            "PYTHONUNBUFFERED": "1",
        }
        if self._settings.log_format == "auto":
            self._environment["TOKENTRAIL_LOG_FORMAT"] = "console"  # a person reads it, though through a pipe
        for service in self._services:
            service.listen()
        urls = {"api_url": self._api.url, "flower_url": self._flower.url}
        _write_addresses({**self._addresses, **urls, "pid": os.getpid()})
        self._add(["worker", "--name", "worker"])
        for service in self._services:
            self._add(service.arguments, pass_fds=[service.descriptor], env={INHERITED: str(service.descriptor)})

    def _add(self, arguments: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any) -> None:
        self._family.add(self._child(arguments, env, on_line=self._screen.child_line, **options))

    def _child(self, arguments: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> Child:
        command = [sys.executable, "-m", "worker.cli", *arguments]
        return Child(arguments[0], command, env=self._environment | dict(env or {}), cwd=ROOT, **options)

    def _wait_until_answering(self) -> None:
        """Return when API and Flower answer, or a stop was requested. Raises UpError when a child ends first."""
        deadline = time.monotonic() + _START_SECONDS
        waiting = list(self._services)
        while waiting and not self._family.stopping:
            self._step(self._ended_before_answering)
            problems = {service: problem for service in waiting if (problem := service.problem())}
            waiting = list(problems)
            if waiting and time.monotonic() > deadline:
                raise UpError(
                    f"{' and '.join(service.name for service in waiting)} did not answer within {_START_SECONDS:.0f} s"
                    f" ({'; '.join(problems.values())}): see the lines above, or try again when this machine is idle."
                )

    def _ended_before_answering(self, child: Child) -> None:
        raise UpError(f"{child.ending} before it answered: see its lines above.")

    def _restart(self, child: Child) -> None:
        if child.name != "demo":
            self._screen.say(f"{child.ending}; restarting in {child.restart_later():.0f} s")

    def _run_demo(self) -> None:
        self._screen.hold()
        demo = self._family.add(self._child(["demo"]))
        while demo.running and not self._family.stopping:
            self._step(self._restart)
        if self._family.stopping:
            return
        self._family.children.remove(demo)
        self._screen.release()
        if demo.process is not None and demo.process.returncode:
            self._screen.say("the demo failed; everything else keeps running")

    def _step(self, on_end: Callable[[Child], None]) -> None:
        for child in self._family.step(0.2):
            on_end(child)
        if self._servers is not None and not self._family.stopping:
            self._servers.check()

    def _announce(self) -> None:
        history = f"{self._api.url}/api/account/transaction-history?userId=acme-research&page=1&limit=10"
        self._screen.print(Text())
        self._screen.print(Text("tokentrail is running; Ctrl-C stops it.", style="bold"))
        for name, url in {"history": history, "API": self._api.url, "Flower": self._flower.url}.items():
            self._screen.print(Text.assemble(f"  {name:<8}", (url, "underline")))
        self._screen.print(Text())

    def _stop_children(self) -> None:
        self._screen.release()
        if self._family.stopping:
            self._screen.say("stopping …")
        for service in self._services:
            service.close()
        for name, grace in self._grace.items():
            children = [child for child in self._family.children if child.name == name]
            self._family.stop(children, grace, report=self._screen.say)


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Keep another `up` out of this folder. The lock ends with this process, however that ends."""
    with open_own(HOME / "up.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpError(_other_up()) from None
        yield


def _other_up() -> str:
    try:
        other: dict[str, Any] = json.loads(read_own(_addresses_file()))
    except (OSError, ValueError, UntrustedFileError):
        return f"Another `tokentrail up` is starting in {Path.cwd()}."
    return (
        f"`tokentrail up` already runs in this folder (process {other['pid']}), with its API at {other['api_url']} and"
        f" Flower at {other['flower_url']}: stop it first, or use another folder (TOKENTRAIL_HOME)."
    )


def _addresses_file() -> Path:
    return HOME / "servers.json"


def _write_addresses(addresses: dict[str, object]) -> None:
    """Write the URLs for other commands in this folder, readable only by this user: they contain passwords."""
    draft = HOME / f"servers.json.{os.getpid()}"
    try:
        draft.unlink(missing_ok=True)  # left by a killed process with the same pid
        with open_own(draft, "x") as file:
            file.write(json.dumps(addresses))
        draft.replace(_addresses_file())
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(draft)) from error  # a failed write does not name the file


def _remove_addresses() -> None:
    _addresses_file().unlink(missing_ok=True)
