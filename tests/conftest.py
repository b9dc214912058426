"""What every test can ask for: real servers, a database of its own, a broker of its own, programs.

The servers are embedded ones, started once and thrown away. With DATABASE_URL or BROKER_URL in the
environment those are used instead: databases are made and dropped there, and the broker's sixteen logical
databases are flushed. So that is one that held nothing: a shell in which a reader worked on a live system
has its addresses in the environment too.
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

from tests.kit import producer as another
from tests.kit.cli import Tokentrail
from tests.kit.stage import Stage, Watcher
from worker import config
from worker.local import embedded
from worker.migration import migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: What the machine has rather than what the product shall do: these may reach the tests from outside.
OF_THE_MACHINE = {"TOKENTRAIL_PG_BIN", "TOKENTRAIL_VALKEY_SERVER"}


# Under nohup every process that a test starts would ignore it too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

#: The modules that take longest: begun last, one of them would keep a single process busy while the others are idle.
LONGEST = (
    "test_kombu_suite",
    "test_docs",
    "test_up",
    "test_embedded",
    "test_bench",
    "test_migrations",
)

#: Set once the broker that we were given was seen to be empty: what is in it from then on is ours.
EMPTIED = pytest.StashKey[str]()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse a broker that holds something: the tests would throw it away."""
    url = os.environ.get("BROKER_URL")
    if url is None or hasattr(session.config, "workerinput"):  # one process of pytest-xdist asks for all
        return
    try:
        with redis.Redis.from_url(url) as broker:
            held = ", ".join(broker.info("keyspace"))
    except redis.RedisError as error:
        pytest.exit(f"The Redis that BROKER_URL names cannot be asked what it holds: {error}.", returncode=2)
    if held:
        pytest.exit(
            f"The tests flush the Redis that BROKER_URL names, and it holds something ({held}): unset BROKER_URL and"
            " DATABASE_URL to run them on servers of their own, or name one that is empty.",
            returncode=2,
        )
    session.config.stash[EMPTIED] = url


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave a given broker as empty as it was."""
    if url := session.config.stash.get(EMPTIED, None):
        with redis.Redis.from_url(url) as broker:
            broker.flushall()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pytest-xdist keep together the tests that share a fixture, and begin the longest modules first."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))
    for item in items:
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str | None:
    """The module or package whose servers or workers a test shares; every other test may run in any process."""
    if "producer" in item.fixturenames:
        return "producer"
    for fixtures in item._fixtureinfo.name2fixturedefs.values():
        if fixtures[-1].scope == "module":
            return str(item.path)
        if fixtures[-1].scope == "package":
            return str(fixtures[-1].baseid)
    return None


class Addresses(NamedTuple):
    """The servers of this run of the tests; tests ask for `database_url` and `broker_url`."""

    database_url: str
    broker_url: str


@pytest.fixture(scope="session", autouse=True)
def given(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The addresses that the tests were given, after taking every setting out of the environment.

    Else a shell's settings, or a `tokentrail up` that runs in this folder, would decide what is tested.
    """
    outside = {name: os.environ[name] for name in ("DATABASE_URL", "BROKER_URL") if name in os.environ}
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as environment:
        for name in set(os.environ) - OF_THE_MACHINE:
            # Under `make test` the tests that run make must not be taken for a part of it.
            if name in outside or name.startswith(("TOKENTRAIL_", "MAKE")) or name in {"MFLAGS", "ARGS"}:
                environment.delenv(name)
        environment.setenv("TOKENTRAIL_HOME", str(home))
        environment.setattr(config, "HOME", home)
        yield outside


@pytest.fixture(autouse=True)
def settings_read_afresh() -> Iterator[None]:
    """Settings are read once per process: here that is once per test."""
    config.load_settings.cache_clear()
    yield
    config.load_settings.cache_clear()


@pytest.fixture(autouse=True)
def logging_left_as_it_was() -> Iterator[None]:
    """A command that is run inside a test sends logs to what is standard error then, and closed soon after."""
    root = logging.getLogger()
    level = root.level
    yield
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
    root.setLevel(level)


@pytest.fixture(scope="session")
def servers(given, tmp_path_factory) -> Iterator[Addresses]:
    with contextlib.ExitStack() as stack:
        if given.keys() == {"DATABASE_URL"}:  # as for `make mutants`: a PostgreSQL takes longer to start than a Valkey
            valkey = embedded.ValkeyServer(tmp_path_factory.mktemp("valkey"), durable=False)
            valkey.start()
            stack.callback(valkey.stop)
            given = {"BROKER_URL": valkey.url} | given
        elif len(given) < len(Addresses._fields):
            pair = stack.enter_context(embedded.servers())
            given = {"DATABASE_URL": pair.database_url, "BROKER_URL": pair.broker_url} | given
        yield Addresses(given["DATABASE_URL"], given["BROKER_URL"])


@pytest.fixture(scope="session")
def template(servers) -> Iterator[str]:
    """The name of a migrated database that nobody writes to: copying it is faster than migrating."""
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
    # Processes of pytest-xdist that were given one broker each flush their own databases of it.
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return itertools.cycle(range(16)[number::processes])


@pytest.fixture
def broker_url(servers, _logical_databases) -> str:
    """A logical database of the broker, empty; not the last test's, where a late answer may yet go."""
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
    """Where a test keeps servers of its own: a name with all that is difficult in names.

    Not in `tmp_path`, whose parent is closed to others: PostgreSQL would evade it when we are root.
    """
    with tempfile.TemporaryDirectory(prefix="tokentrail-test-") as parent:
        Path(parent).chmod(0o755)
        folder = Path(parent) / "data of 'Zoë'"
        yield folder
        embedded.discard(folder)


@pytest.fixture(scope="session")
def requires_program() -> Callable[..., str]:
    """`requires_program("chromium")`: where it is. Without it the test is skipped, in CI it fails."""

    def find(name: str, path: str | None = None) -> str:
        # Beside our Python too: what the lock file installs is not on everyone's PATH.
        everywhere = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        found = shutil.which(name, path=path if path is not None else everywhere)
        if found is None:
            reason = f"needs the program {name}: `make system-packages` installs it on Debian"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        return found

    return find


@pytest.fixture(scope="session")
def producer(tmp_path_factory, requires_program) -> another.Producer:
    """Another project, which has installed the client's wheel."""
    requires_program("make")
    return another.made(tmp_path_factory.mktemp("producer"))


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
