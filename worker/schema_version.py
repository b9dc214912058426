"""The schema's version: which revision the database is at, and how Alembic takes it to another."""

from __future__ import annotations

from argparse import Namespace
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import ProgrammingError

from worker.config import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: The revision of the schema of before the trail, which the old software works with.
LEGACY_REVISION: Final = "0001"

#: What is said of a statement that somebody else's transaction keeps from running.
WAITING: Final = "waiting for a lock"

#: The oldest PostgreSQL we work with, as `server_version_num`.
OLDEST_SERVER: Final = 150_000


class SchemaError(CommandError):
    """The database is not one this code can work with; the message says why and what to do."""


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


class Underway(NamedTuple):
    """What a migrator's statement is at."""

    waits: bool  # for a lock
    phase: str | None  # of an index that it builds, in PostgreSQL's words
    done: int
    total: int  # 0 where PostgreSQL does not know


def underway(connection: psycopg.Connection) -> Underway | None:
    """The statement that a migrator of this database is at, if it is at one."""
    row = connection.execute("""
        SELECT wait_event_type IS NOT DISTINCT FROM 'Lock', phase,
            coalesce(CASE WHEN phase LIKE 'waiting%' THEN lockers_done
                WHEN phase LIKE '%scanning%' THEN blocks_done ELSE tuples_done END, 0),
            coalesce(CASE WHEN phase LIKE 'waiting%' THEN lockers_total
                WHEN phase LIKE '%scanning%' THEN blocks_total ELSE tuples_total END, 0)
        FROM pg_stat_activity a LEFT JOIN pg_stat_progress_create_index USING (pid)
        WHERE a.datname = current_database() AND application_name = 'tokentrail migrate' AND state = 'active'
        ORDER BY xact_start LIMIT 1
    """).fetchone()
    return None if row is None else Underway(*row)


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


def known_revision() -> str:
    """The schema this code was written for."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    assert head is not None
    return head


def knows(revision: str) -> bool:
    """Whether this code has that migration. Migrations are only ever added, so one it lacks is a newer one."""
    scripts = ScriptDirectory.from_config(alembic_config())
    return any(script.revision == revision for script in scripts.walk_revisions())


def current_revision(connection: psycopg.Connection) -> str | None:
    """The schema the database has; None before the first migration."""
    if connection.execute("SELECT to_regclass('alembic_version')").fetchone() == (None,):
        return None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def check_schema(connection: psycopg.Connection) -> str | None:
    """Raise SchemaError, in one sentence, unless this code can work with the database.

    A schema newer than the code is fine, because every migration leaves the workers of before running: the
    answer is then a sentence to warn with, else None.
    """
    refuse_old_server(connection)
    known, current = known_revision(), current_revision(connection)
    if current == known:
        return None
    if current is None:
        raise SchemaError("The database has no schema yet: run `tokentrail migrate`.")
    if knows(current):
        raise SchemaError(f"The schema is at {current} and this code needs {known}: run `tokentrail migrate`.")
    if connection.execute("SELECT to_regclass('transaction_record')").fetchone() == (None,):
        raise SchemaError(
            f"The database's alembic_version names {current}, which is not a migration of tokentrail: give tokentrail "
            "a database of its own, or a schema of its own with ?options=-csearch_path%3D… in DATABASE_URL."
        )
    return f"The schema is at {current}, newer than this code ({known}); deploy the newer code soon."


def refuse_old_server(connection: psycopg.BaseConnection[Any]) -> None:
    """Raise SchemaError when the server is older than we work with."""
    version = connection.info.server_version
    if version < OLDEST_SERVER:
        raise SchemaError(
            f"PostgreSQL {version // 10_000} is too old: tokentrail needs {OLDEST_SERVER // 10_000} or newer."
        )
