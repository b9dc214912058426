"""The servers that the chaos suite breaks, started once for all its tests; each test has its own database."""

from __future__ import annotations

import os
import random
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
import redis

from worker.local import embedded
from worker.migration import migrate

from .books import Books
from .ground import Ground

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Read before a fixture clears the environment of settings.
SEED = int(os.environ.get("TOKENTRAIL_CHAOS_SEED") or random.SystemRandom().randrange(10**6))

#: Crashes here end processes, not the machine, so data survives once it is written, synced or not. With
#: synchronous_commit it is written before the acknowledgement. Few connections, so that a test can take all of them.
OPTIONS = {"synchronous_commit": "on", "max_connections": "20", "restart_after_crash": "on"}

TEMPLATE = "chaos_template"


@pytest.fixture(scope="package")
def breakable(external_urls) -> Iterator[tuple[embedded.PostgresServer, embedded.ValkeyServer]]:
    """PostgreSQL and Valkey for this suite only, even if DATABASE_URL and BROKER_URL were set for the other tests."""
    with tempfile.TemporaryDirectory(prefix="tokentrail-chaos-") as parent:
        Path(parent).chmod(0o755)
        folder = Path(parent) / "data"
        postgres = embedded.PostgresServer(folder, durable=False, options=OPTIONS)
        valkey = embedded.ValkeyServer(folder)
        try:
            postgres.start()
            valkey.start()
            with _server(postgres) as connection:
                connection.execute(f"CREATE DATABASE {TEMPLATE}")
            migrate(postgres.url.rpartition("/")[0] + f"/{TEMPLATE}")
            yield postgres, valkey
        finally:
            postgres.stop("immediate")
            valkey.kill()
            embedded.discard(folder)


@pytest.fixture
def ground(breakable, request, tmp_path) -> Iterator[Ground]:
    """An empty database and an empty broker on running servers, and no worker."""
    postgres, valkey = breakable
    for server in breakable:
        if not server.running:
            server.start()
    with redis.Redis.from_url(valkey.url) as client:
        client.config_set("maxmemory", 0)
        client.flushall()
    with _server(postgres) as connection:
        connection.execute("DROP DATABASE IF EXISTS chaos WITH (FORCE)")
        connection.execute(f"CREATE DATABASE chaos TEMPLATE {TEMPLATE}")
    ground = Ground(postgres, valkey, "chaos", tmp_path)
    yield ground
    ground.close()
    with suppress(psycopg.OperationalError), _server(postgres) as connection:
        connection.execute("ALTER SYSTEM RESET ALL")
        connection.execute("SELECT pg_reload_conf()")


@pytest.fixture
def books() -> Books:
    """Books with the seed of this run."""
    print(f"seed {SEED}: TOKENTRAIL_CHAOS_SEED={SEED} publishes the same events")
    return Books(SEED)


def _server(postgres: embedded.PostgresServer) -> psycopg.Connection:
    return psycopg.connect(postgres.url.rpartition("/")[0] + "/postgres", autocommit=True)
