"""Fixtures of all tests: real servers, a database and a broker of the test's own, a worker, programs.

The servers are embedded, started once and thrown away. With DATABASE_URL or BROKER_URL in the environment those are
used instead: the tests create and drop databases there, and flush the broker's sixteen logical databases. They refuse a
broker that is not empty, because a shell in which an operator worked has the URLs of a live system in its environment.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import psycopg
import pytest
import redis

from tests.kit.cli import Tokentrail
from tests.kit.producer import Producer
from tests.kit.stage import Stage, Watcher
from worker import config
from worker.local import embedded
from worker.migration import migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Settings that name programs of this machine: the tests keep these, and no other settings.
KEPT_SETTINGS = {"TOKENTRAIL_PG_BIN", "TOKENTRAIL_VALKEY_SERVER"}


# Under nohup SIGHUP is ignored, by every process that a test starts too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

#: The modules to begin with, the slowest first: begun last, one would keep a process busy while the others are idle.
RUN_FIRST = (
    "chaos/",
    "transport/test_kombu_suite",
    "docs/test_docs",
    "local/test_up",
    "local/test_embedded",
    "docs/test_bench",
    "migrations/test_migrations",
    "fuzz/",
)

#: The URL of an external broker that was empty: the tests may flush it.
FLUSHABLE = pytest.StashKey[str]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse an external broker that is not empty: the tests would flush it."""
    url = os.environ.get("BROKER_URL")
    if url is None or hasattr(session.config, "workerinput"):  # pytest-xdist's controller checks for all
        return
    try:
        with redis.Redis.from_url(url) as broker:
            contents = ", ".join(broker.info("keyspace"))
    except redis.RedisError as error:
        pytest.exit(f"Cannot check that the Redis of BROKER_URL is empty: {error}.", returncode=2)
    if contents:
        pytest.exit(
            f"The tests flush the Redis that BROKER_URL names, and it is not empty ({contents}): unset BROKER_URL and"
            " DATABASE_URL to run them on servers of their own, or name one that is empty.",
            returncode=2,
        )
    session.config.stash[FLUSHABLE] = url


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave an external broker empty."""
    if url := session.config.stash.get(FLUSHABLE, None):
        with redis.Redis.from_url(url) as broker:
            broker.flushall()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest modules: one that begins last keeps one process busy while the others are idle."""
    items.sort(key=_order)


def _order(item: pytest.Item) -> int:
    path = item.nodeid.removeprefix("tests/")
    return next((number for number, start in enumerate(RUN_FIRST) if path.startswith(start)), len(RUN_FIRST))


class Urls(NamedTuple):
    """The servers of this process; tests use `database_url` and `broker_url`."""

    database_url: str
    broker_url: str


@pytest.fixture(scope="session", autouse=True)
def external_urls(tmp_path_factory) -> Iterator[dict[str, str]]:
    """DATABASE_URL and BROKER_URL of the environment, from which all settings are removed.

    Otherwise a shell's settings, or a `tokentrail up` that runs in this folder, would decide what is tested.
    """
    urls = {name: os.environ[name] for name in ("DATABASE_URL", "BROKER_URL") if name in os.environ}
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as environment:
        for name in set(os.environ) - KEPT_SETTINGS:
            # Under `make test`, a make that a test runs must not take itself for a part of that.
            if name in urls or name.startswith(("TOKENTRAIL_", "MAKE")) or name in {"MFLAGS", "ARGS"}:
                environment.delenv(name)
        environment.setenv("TOKENTRAIL_HOME", str(home))
        environment.setattr(config, "HOME", home)
        yield urls


@pytest.fixture(autouse=True)
def settings_cache_cleared() -> Iterator[None]:
    """A process reads the settings once; here each test does."""
    config.load_settings.cache_clear()
    yield
    config.load_settings.cache_clear()


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """A command that runs in this process logs to the standard error of that moment, which is closed after the test."""
    root = logging.getLogger()
    level = root.level
    yield
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
    root.setLevel(level)


@pytest.fixture(scope="session")
def servers(external_urls, tmp_path_factory) -> Iterator[Urls]:
    urls = external_urls
    with contextlib.ExitStack() as stack:
        if urls.keys() == {"DATABASE_URL"}:  # `make mutants`: only PostgreSQL takes long to start
            valkey = embedded.ValkeyServer(tmp_path_factory.mktemp("valkey"), durable=False)
            valkey.start()
            stack.callback(valkey.stop)
            urls = {"BROKER_URL": valkey.url} | urls
        elif len(urls) < len(Urls._fields):
            pair = stack.enter_context(embedded.servers())
            urls = {"DATABASE_URL": pair.database_url, "BROKER_URL": pair.broker_url} | urls
        yield Urls(urls["DATABASE_URL"], urls["BROKER_URL"])


@pytest.fixture(scope="session")
def template(servers) -> Iterator[str]:
    """The name of a migrated, empty database: copying it is faster than migrating."""
    with _database(servers.database_url) as url:
        migrate(url)
        yield urlsplit(url).path.removeprefix("/")


@pytest.fixture
def database_url(servers, template) -> Iterator[str]:
    """A database of the test's own, migrated and empty."""
    with _database(servers.database_url, template) as url:
        yield url


@pytest.fixture
def empty_database_url(servers) -> Iterator[str]:
    """A database of the test's own, not migrated."""
    with _database(servers.database_url) as url:
        yield url


@pytest.fixture(scope="session")
def _logical_databases() -> Iterator[int]:
    # Processes of pytest-xdist that share an external broker flush different databases.
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return itertools.cycle(range(16)[number::processes])


@pytest.fixture
def broker_url(servers, _logical_databases) -> str:
    """An empty logical database of the broker; not the previous test's, to which a late reply may still go."""
    url = urlsplit(servers.broker_url)._replace(path=f"/{next(_logical_databases)}").geturl()
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def tokentrail(monkeypatch, capfd) -> Tokentrail:
    """`tokentrail("history", "ann", DATABASE_URL=url)`: exit code, standard output, standard error."""
    return Tokentrail(monkeypatch, capfd)


@pytest.fixture
def own_servers(database_url, broker_url, monkeypatch) -> str:
    """DATABASE_URL and BROKER_URL name a database and a broker of the test's own; returns the database's URL."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("BROKER_URL", broker_url)
    return str(database_url)


@pytest.fixture
def stage(database_url, broker_url, tmp_path) -> Iterator[Stage]:
    """`stage.start()` starts a worker, `stage.publisher` sends it events."""
    with Stage(database_url, broker_url, tmp_path) as stage:
        yield stage


@pytest.fixture
def watcher(broker_url) -> Iterator[Watcher]:
    """The task events that Flower would receive."""
    with Watcher(broker_url) as watcher:
        yield watcher


@pytest.fixture
def server_folder() -> Iterator[Path]:
    """A folder for servers of the test's own, with spaces, quotes and an umlaut in its name.

    Not in `tmp_path`, whose parent is closed to other users: PostgreSQL, which does not run as root, could not use it.
    """
    with tempfile.TemporaryDirectory(prefix="tokentrail-test-") as parent:
        Path(parent).chmod(0o755)
        folder = Path(parent) / "data of 'Zoë'"
        yield folder
        embedded.discard(folder)


@pytest.fixture(scope="session")
def requires_program() -> Callable[..., str]:
    """`requires_program("chromium")` returns its path. Without the program the test is skipped, or fails in CI."""

    def find(name: str, path: str | None = None) -> str:
        # The programs of the virtual environment need not be on PATH.
        folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        program = shutil.which(name, path=path if path is not None else folders)
        if program is None:
            reason = f"needs the program {name}: `make system-packages` installs it on Debian"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        return program

    return find


@pytest.fixture(scope="session")
def producer(tmp_path_factory, requires_program) -> Producer:
    """Another project, which has installed the client's wheel."""
    requires_program("make")
    return Producer.create(tmp_path_factory.mktemp("producer"))


@contextlib.contextmanager
def _database(server_url: str, template: str = "template1") -> Iterator[str]:
    name = f"tokentrail_{secrets.token_hex(6)}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield urlsplit(server_url)._replace(path=f"/{name}").geturl()
    finally:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
