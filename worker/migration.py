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
    from collections.abc import Callable, Iterator


class Deployed(NamedTuple):
    """What became of the schema."""

    before: str | None
    applied: list[str]  # revisions, oldest first
    left: str | None  # a sentence when it is newer than this code, which then leaves it alone


def alembic_config(url: str | None = None) -> Config:
    """Alembic's configuration from pyproject.toml, for `url` or for the settings' database."""
    config = Config(toml_file=ROOT / "pyproject.toml")
    if url is not None:
        config.attributes["url"] = url
    return config


def migrate(url: str, revision: str = "head", tell: Callable[[str], None] | None = None) -> list[str]:
    """Bring the schema up to `revision`; the revisions applied, oldest first.

    Waits while another migration runs; safe under load, and to run again after it was killed. `tell` is called with
    each statement that is about to run.
    """
    config = alembic_config(url)
    config.attributes["tell"] = tell
    command.upgrade(config, revision)
    return list(config.attributes.get("moved", []))


def deploy(url: str, tell: Callable[[str], None] | None = None) -> Deployed:
    """Bring the schema up to date, unless it is newer than this code. Raises SchemaError, in one sentence."""
    with told():
        with psycopg.connect(url, connect_timeout=5) as connection:
            before = current_revision(connection)
            if before is not None and not knows(before):
                return Deployed(before, [], f"Left as it is: {check_schema(connection)}")
        return Deployed(before, migrate(url, tell=tell), None)


def stamp(url: str, revision: str) -> None:
    """Note that the schema is at `revision`, without a look at it."""
    command.stamp(alembic_config(url), revision)


def downgrade(url: str, revision: str, *, drop_history: bool) -> list[str]:
    """Take the schema back to `revision`; the revisions taken back, newest first.

    Raises CommandError, with nothing changed, when that would drop history and nobody has said that it may.
    """
    config = alembic_config(url)
    config.cmd_opts = Namespace(x=["drop-history"] if drop_history else [])
    command.downgrade(config, revision)
    return list(config.attributes.get("moved", []))


@contextmanager
def told() -> Iterator[None]:
    """Let what Alembic and a stranger's tables say end as one sentence too."""
    try:
        yield
    except SchemaError:
        raise
    except CommandError as error:
        raise SchemaError(str(error)) from error
    except ProgrammingError as error:
        if isinstance(error.orig, psycopg.errors.DuplicateTable):
            raise SchemaError(
                f"{error.orig.diag.message_primary}, and no migration of ours made it: if these tables are the schema "
                "before the trail, say so with `tokentrail migrate stamp`, and migrate again."
            ) from error
        raise
