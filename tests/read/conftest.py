"""A database to read, and a real server on a loopback port, asked over HTTP."""

from __future__ import annotations

import contextlib
import threading
from functools import partial

import httpx2
import psycopg
import pytest
import uvicorn
from pydantic import SecretStr

from worker.config import Settings
from worker.ledger.deliveries import Delivery
from worker.ledger.settle import Ledger
from worker.listening import listen
from worker.read.api import create_app
from worker.read.connection import read_once


@contextlib.contextmanager
def running(url):
    """A client of a server that reads the database at `url`."""
    app = create_app(Settings(DATABASE_URL=SecretStr(url)))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def client(database_url):
    with running(database_url) as client:
        yield client


@pytest.fixture(scope="module")
def client_without_database():
    """For requests that are answered without the database."""
    with running("postgresql://127.0.0.1:1/nowhere") as client:
        yield client


@pytest.fixture
def connection(database_url):
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def ledger(database_url):
    ledger = Ledger(Settings(DATABASE_URL=database_url), stripe=1)
    yield ledger
    ledger.close()


@pytest.fixture
def settle(ledger):
    """`settle(*events)`: their outcomes."""
    return lambda *events: ledger.settle([Delivery.of(event) for event in events])


@pytest.fixture
def read(database_url):
    """`read(read_page, pages=RECORDS, …)`: what a function of worker/read/ reads."""
    return lambda reader, **arguments: read_once(
        database_url, partial(reader, **arguments), application_name="tokentrail test"
    )
