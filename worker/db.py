"""PostgreSQL: connections as the worker needs them, and the schema's version."""

from __future__ import annotations

from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from worker.config import Settings

ROOT = Path(__file__).resolve().parent.parent


def alembic_config(url: str | None = None) -> Config:
    """Alembic's configuration from pyproject.toml, for `url` or for the settings' database."""
    config = Config(toml_file=ROOT / "pyproject.toml")
    if url is not None:
        config.attributes["url"] = url
    return config


def migrate(url: str, revision: str = "head") -> None:
    """Bring the schema up to `revision`. Waits while another migration runs; safe under load and to run again."""
    command.upgrade(alembic_config(url), revision)


def known_revision() -> str:
    """The schema this code was written for."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    assert head is not None
    return head


def connect(url: str, settings: Settings, *, name: str = "tokentrail worker") -> psycopg.Connection:
    """A connection for the ledger's batches.

    It gives up on locks, statements and silent peers in bounded time, so that a frozen holder of locks cannot
    hold them for hours, and the server ends *our* session when it is we who freeze while holding them.
    """
    connection = psycopg.connect(
        url,
        autocommit=True,
        application_name=name,
        connect_timeout=5,
        tcp_user_timeout=15_000,  # ms; a peer that has gone silent counts as dead after this
        keepalives_idle=5,
        keepalives_interval=5,
        keepalives_count=3,
    )
    # SET after connecting, not `options`: poolers refuse start-up parameters they do not know.
    connection.execute(
        f"""
        SET timezone = 'UTC';
        SET lock_timeout = '{settings.lock_timeout * 1000:.0f}ms';
        SET statement_timeout = '{settings.statement_timeout * 1000:.0f}ms';
        SET idle_in_transaction_session_timeout = '{settings.idle_in_transaction_timeout * 1000:.0f}ms';
        SET client_connection_check_interval = '2s';
        SET tcp_user_timeout = '15s';
        -- Every statement of the ledger looks rows up by key. Without statistics, or with a plan made while a
        -- table was empty, the planner may prefer to read it whole; then it must not.
        SET enable_seqscan = off;
        SET enable_hashjoin = off;
        SET enable_mergejoin = off
        """.encode()
    )
    return connection
