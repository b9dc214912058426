"""What the ledger's tests start from: a connection as the worker has it, and ledgers that are watched."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import psycopg
import pytest

from worker.db import connect

from .support import Watched, empty, settings_for


@pytest.fixture(scope="session")
def shared_url(servers, template):
    """A database that the tests empty and use one after the other: making one takes longer than most of them."""
    name = f"{template}_shared"
    with psycopg.connect(servers.database_url, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield urlsplit(servers.database_url)._replace(path=f"/{name}").geturl()
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def url(shared_url):
    """The test's database, empty. A module whose tests change more than rows has `database_url` here."""
    with psycopg.connect(shared_url, autocommit=True) as connection:
        empty(connection)
    return shared_url


@pytest.fixture
def connection(url):
    """A connection as a worker has it."""
    with connect(url, settings_for(url)) as connection:
        yield connection


@pytest.fixture
def owner(url):
    """A plain connection of the owner: who holds locks, breaks things, and looks."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def background():
    """Runs a call in another thread; leaving the test waits for it."""
    with ThreadPoolExecutor(32) as pool:
        yield pool.submit


@pytest.fixture
def watched(url, background):
    """`watched(lock_timeout=0.1)`: a ledger whose reports are kept. Whatever it still waits for ends with the test."""
    ledgers = []

    def make(url=url, **settings):
        ledgers.append(Watched(url, background, **settings))
        return ledgers[-1]

    yield make
    for ledger in ledgers:
        ledger.stop.set()
        ledger.finish()
