"""Alembic: how the database's schema is brought to another revision."""

from __future__ import annotations

from argparse import Namespace
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import psycopg
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.exc import ProgrammingError

from worker.config import ROOT
from worker.schema_version import SchemaError, check_schema, current_revision, knows

if TYPE_CHECKING:
    from collections.abc import Iterator


class Deployed(NamedTuple):
    """What `deploy` did."""

    before: str | None  # revision
    applied: list[str]  # revisions, oldest first
    warning: str | None  # if the schema is newer than this code, and was left as it is


def alembic_config(url: str | None = None) -> Config:
    """Alembic's configuration from pyproject.toml, for `url` or for the settings' database."""
    config = Config(toml_file=ROOT / "pyproject.toml")
    if url is not None:
        config.attributes["url"] = url
    return config


def migrate(url: str, revision: str = "head") -> list[str]:
    """Bring the schema up to `revision`; returns the revisions applied, oldest first.

    Waits while another migration runs. Safe under load, and to run again after it was killed.
    """
    config = alembic_config(url)
    command.upgrade(config, revision)
    return list(config.attributes.get("applied", []))


def deploy(url: str) -> Deployed:
    """Bring the schema up to date, unless it is newer than this code. Raises SchemaError."""
    with schema_errors():
        with psycopg.connect(url, connect_timeout=5) as connection:
            before = current_revision(connection)
            if before is not None and not knows(before):
                return Deployed(before, [], f"Left as it is: {check_schema(connection)}")
        return Deployed(before, migrate(url), None)


def stamp(url: str, revision: str) -> None:
    """Note that the schema is at `revision`, without checking it."""
    command.stamp(alembic_config(url), revision)


def downgrade(url: str, revision: str, *, drop_history: bool) -> list[str]:
    """Take the schema back to `revision`; returns the revisions undone, newest first.

    Raises CommandError, with nothing changed, if that would drop history and `drop_history` is false.
    """
    config = alembic_config(url)
    config.cmd_opts = Namespace(x=["drop-history"] if drop_history else [])
    command.downgrade(config, revision)
    return list(config.attributes.get("applied", []))


@contextmanager
def schema_errors() -> Iterator[None]:
    """Raise Alembic's errors, and the error of tables that exist already, as SchemaError with one sentence."""
    try:
        yield
    except CommandError as error:
        raise SchemaError(str(error)) from error
    except ProgrammingError as error:
        if isinstance(error.orig, psycopg.errors.DuplicateTable):
            raise SchemaError(
                f"{error.orig.diag.message_primary}, and no migration of tokentrail made it: if these tables are the "
                "legacy schema, note that with `tokentrail migrate stamp`, and migrate again."
            ) from error
        raise
