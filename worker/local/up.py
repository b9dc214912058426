"""`tokentrail up`: servers, worker, API and Flower as one thing that starts, talks and stops together.

A child that ends before everything has answered once stops it all, with exit code 1; afterwards it is started
again, with a growing delay. A server that ends stops it all. Whatever ends `up`, SIGKILL too, ends its children.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rich.text import Text

from worker.config import HOME, ROOT, settings
from worker.files import Untrusted, open_ours, read_ours
from worker.listening import CannotListen, claim
from worker.local.embedded import EmbeddedError, make_folder, servers
from worker.output import console, migrating
from worker.processes import Child, Family
from worker.schema_version import deploy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.config import Settings
    from worker.local.embedded import Servers

#: Seconds until API and Flower must have answered.
_START_SECONDS: Final = 60.0
#: Seconds that children get to end by themselves: the worker finishes its batch, answers under way are given.
_GRACE: Final = {"demo": 2.0, "worker": 30.0, "api": 10.0, "flower": 5.0}
#: Of Flower: it warns of every worker that is slow to introduce itself.
_QUIET: Final = ("--", "--logging=error")
_COLOURS: Final = {"up": "bold", "worker": "green", "api": "cyan", "flower": "magenta"}


class AlreadyRunning(Exception):
    """Another `tokentrail up` has this folder; the message says which."""


class Failed(Exception):
    """A part did not start, or cannot go on; the message says which and shows its last lines."""


def up(*, with_demo: bool, look_at_broker: Callable[[str], object]) -> None:
    """Run everything until SIGINT, SIGTERM or SIGHUP; then stop it in order: worker, API, Flower, servers.

    Raises AlreadyRunning, Failed, EmbeddedError, ConfigError or Untrusted, or what `look_at_broker` raises of a Redis
    that is given; by then nothing is left running.
    """
    make_folder(HOME)
    family = Family()
    with _only_one(), family.signals(), contextlib.ExitStack() as stack:
        stack.callback(_forget_addresses)
        _forget_addresses()  # of one that was killed: the settings would take them for running servers
        settings.cache_clear()
        given = settings()
        if given.broker_url:
            look_at_broker(given.broker())  # what it warns of, the worker says too
        running = _Running(given, family)
        running.run(stack, with_demo=with_demo)
    running.say("stopped; nothing is left running.")


#: Where to find what listens on all addresses.
_LOOPBACK_OF: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - only compared


class _Address(NamedTuple):
    host: str
    port: int

    @property
    def url(self) -> str:
        host = _LOOPBACK_OF.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def trouble(self, path: str) -> str | None:
        """Why it does not answer well; None when it does."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=1)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            return f"{self.url}: {getattr(error, 'strerror', None) or error or type(error).__name__}"
        finally:
            connection.close()
        return None if answer.status == http.HTTPStatus.OK else f"{self.url}{path}: {answer.status} {answer.reason}"


class _Running:
    """One run of `up`: its children, and what it tells about them."""

    def __init__(self, given: Settings, family: Family) -> None:
        self._settings = given
        self._family = family
        self._console = console()
        self._held: list[Text] | None = None  # lines of the others while the demo draws on the terminal
        self._pair: Servers | None = None
        self._servers_gone = False
        self._environment: dict[str, str] = {}

    def run(self, stack: contextlib.ExitStack, *, with_demo: bool) -> None:
        database_url, broker_url = self._start_servers(stack)
        if self._family.stopping:
            return
        with migrating(database_url, self._console) as tell:
            done = deploy(database_url, tell)
        if done.left:
            self.say(done.left)
        elif done.applied:
            self.say(f"migrated the database to {done.applied[-1]}")
        given = self._settings
        api = _Address(given.api_host, _free_port(stack, "API", given.api_host, given.api_port))
        flower = _Address("127.0.0.1", _free_port(stack, "FLOWER", "127.0.0.1", given.flower_port))
        addresses = {
            "database_url": database_url,
            "broker_url": broker_url,
            "api_url": api.url,
            "flower_url": flower.url,
            "pid": os.getpid(),
        }
        _remember_addresses(addresses)
        try:
            self._start_children(addresses, api, flower)
            if self._wait_until_answering({"api": (api, "/readyz"), "flower": (flower, "/healthcheck")}):
                if with_demo:
                    self._run_demo()
                if not self._family.stopping:
                    self._announce(api.url, flower.url)
                self._watch()
        except EmbeddedError:
            self._servers_gone = True
            raise
        finally:
            self._stop_children()

    def _start_children(self, addresses: dict[str, Any], api: _Address, flower: _Address) -> None:
        self._environment = {
            **os.environ,
            "DATABASE_URL": addresses["database_url"],
            "BROKER_URL": addresses["broker_url"],
            "TOKENTRAIL_HOME": str(HOME.absolute()),
            "PYTHONUNBUFFERED": "1",
        }
        if self._settings.log_format == "auto":
            self._environment["TOKENTRAIL_LOG_FORMAT"] = "console"  # a person reads it, though through our pipe
        for name, command in {
            "worker": ("--name", "worker"),
            "api": ("--host", api.host, "--port", str(api.port)),
            "flower": ("--host", flower.host, "--port", str(flower.port), *_QUIET),
        }.items():
            self._family.add(self._child(name, *command, on_line=self._line))

    def _child(self, name: str, *command: str, on_line: Callable[[str, str], None] | None = None) -> Child:
        program = [sys.executable, "-m", "worker.cli", name, *command]
        return Child(name, program, env=self._environment, cwd=ROOT, on_line=on_line)

    def _stop_children(self) -> None:
        self._forward_held()
        if self._family.stopping:
            self.say("stopping …")
        for name, grace in _GRACE.items():
            # Without its servers a worker would wait for them rather than end.
            seconds = min(grace, 2.0) if self._servers_gone else grace
            self._family.stop([each for each in self._family.children if each.name == name], seconds, say=self.say)

    def say(self, sentence: str) -> None:
        self._print(Text.assemble(("     up | ", _COLOURS["up"]), sentence))

    def _start_servers(self, stack: contextlib.ExitStack) -> tuple[str, str]:
        """The addresses of PostgreSQL and the broker: those that are set, else embedded ones, started here."""
        database_url, broker_url = self._settings.database_url, self._settings.broker_url
        if database_url and broker_url:
            return database_url.get_secret_value(), broker_url.get_secret_value()
        began = time.monotonic()
        self._pair = stack.enter_context(servers(HOME / "data"))
        stack.callback(lambda: self.say("stopping PostgreSQL and Valkey …"))
        self.say(f"PostgreSQL and Valkey run ({time.monotonic() - began:.1f} s); data and logs are in {HOME / 'data'}")
        return (
            database_url.get_secret_value() if database_url else self._pair.database_url,
            broker_url.get_secret_value() if broker_url else self._pair.broker_url,
        )

    def _wait_until_answering(self, waiting: dict[str, tuple[_Address, str]]) -> bool:
        """Whether all answer; False when we are to stop. Raises Failed for a child that ends meanwhile."""
        end = time.monotonic() + _START_SECONDS
        while waiting and not self._family.stopping:
            self._step(self._stop_for_dead)
            troubles = {name: trouble for name, (to, path) in waiting.items() if (trouble := to.trouble(path))}
            waiting = {name: waiting[name] for name in troubles}
            if waiting and time.monotonic() > end:
                raise Failed(
                    f"{' and '.join(waiting)} did not answer within {_START_SECONDS:.0f} s"
                    f" ({'; '.join(troubles.values())}): mend what the lines above say of it, or start again when this"
                    " machine has less to do."
                )
        return not self._family.stopping

    def _run_demo(self) -> None:
        demo = self._child("demo")
        self._held = [] if self._console.is_terminal else None
        self._family.add(demo)
        while demo.running and not self._family.stopping:
            self._step(self._restart)
        if self._family.stopping:
            return
        self._family.children.remove(demo)
        self._forward_held()
        if demo.process is not None and demo.process.returncode:
            self.say("the demo has failed; everything else goes on.")

    def _watch(self) -> None:
        while not self._family.stopping:
            self._step(self._restart)

    def _step(self, on_death: Callable[[Child], None]) -> None:
        for child in self._family.step(0.2):
            on_death(child)
        if self._pair is not None and not self._family.stopping:
            self._pair.check()

    def _stop_for_dead(self, child: Child) -> None:
        raise Failed(f"{child.name} {child.last_words}")

    def _restart(self, child: Child) -> None:
        if child.name == "demo":
            return
        how = child.last_words
        self.say(f"{child.name} {how}\n{'':9}it is started again in {child.restart_later():.0f} s.")

    def _announce(self, api_url: str, flower_url: str) -> None:
        history = f"{api_url}/api/account/transaction-history?userId=acme-research&page=1&limit=10"
        lines = {"history": history, "API": api_url, "Flower": flower_url}
        self._print(Text())
        self._print(Text("tokentrail is running; Ctrl-C stops it.", style="bold"))
        for name, url in lines.items():
            self._print(Text.assemble(f"  {name:<8}", (url, "underline")))
        self._print(Text())

    def _line(self, name: str, line: str) -> None:
        text = Text.assemble((f"{name:>7} | ", _COLOURS[name]), Text.from_ansi(line))
        if self._held is None:
            self._print(text)
        else:
            self._held.append(text)

    def _forward_held(self) -> None:
        held, self._held = self._held, None
        for text in held or ():
            self._print(text)

    def _print(self, text: Text) -> None:
        try:
            self._console.print(text, soft_wrap=True)
            self._console.file.flush()
        except (OSError, SystemExit):  # whoever read us has gone (rich would exit then): stop in order, say no more
            self._family.stopping += 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _free_port(stack: contextlib.ExitStack, what: str, host: str, first: int) -> int:
    """The first port from `first` on that nobody has, ours until the stack unwinds; `what` is to listen there."""
    ports = range(first, min(first + 200, 65_536))
    for port in ports:
        try:
            stack.enter_context(claim(host, port))
        except CannotListen as error:
            if not error.taken:
                raise Failed(str(error)) from error
            continue
        return port
    raise Failed(
        f"No port from {first} to {ports[-1]} is free on {host}: stop what listens there, or name another with"
        f" TOKENTRAIL_{what}_PORT."
    )


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Hold this folder for us. The lock ends with our process, however that ends."""
    with open_ours(HOME / "up.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(_who_is_running()) from None
        yield


def _who_is_running() -> str:
    try:
        other: dict[str, Any] = json.loads(read_ours(_addresses()))
    except (OSError, ValueError, Untrusted):
        return f"Another `tokentrail up` is starting in {Path.cwd()}."
    return (
        f"`tokentrail up` runs here already (process {other['pid']}): its API is at {other['api_url']}, Flower at"
        f" {other['flower_url']}; stop it first, or use another folder (TOKENTRAIL_HOME)."
    )


def _addresses() -> Path:
    return HOME / "servers.json"


def _remember_addresses(what: dict[str, object]) -> None:
    """Tell the other commands in this folder, and nobody else: the URLs carry passwords."""
    draft = HOME / f"servers.json.{os.getpid()}"
    try:
        draft.unlink(missing_ok=True)  # of one that was killed, and had our number
        with open_ours(draft, "x") as file:
            file.write(json.dumps(what))
        draft.replace(_addresses())
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(draft)) from error  # a write that fails does not say where


def _forget_addresses() -> None:
    _addresses().unlink(missing_ok=True)
