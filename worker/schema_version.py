"""Whether this code can work with the schema that the database has. Needs no Alembic, so that commands start fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from worker.config import ROOT
from worker.errors import TokentrailError

if TYPE_CHECKING:
    import psycopg

#: The revision of the legacy schema, from before the audit trail.
LEGACY_REVISION: Final = "0001"

#: The oldest supported PostgreSQL, as `server_version_num`.
MIN_SERVER_VERSION: Final = 150_000


class SchemaError(TokentrailError):
    """The database is not one this code can work with; the message says why and what to do."""


def known_revision() -> str:
    """The schema that this code was written for: its newest migration."""
    return _revisions()[-1]


def knows(revision: str) -> bool:
    """Whether this code has that migration. Migrations are only added, so a revision that it lacks is newer."""
    return revision in _revisions()


def _revisions() -> list[str]:
    """Every migration's revision, oldest first: migrations/versions/0002_add_….py is revision 0002."""
    return sorted(path.name.partition("_")[0] for path in (ROOT / "migrations/versions").glob("[0-9]*_*.py"))


def current_revision(connection: psycopg.Connection) -> str | None:
    """The schema the database has; None before the first migration."""
    if connection.execute("SELECT to_regclass('alembic_version')").fetchone() == (None,):
        return None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def check_schema(connection: psycopg.Connection) -> str | None:
    """Raise SchemaError, in one sentence, unless this code can work with the database.

    A schema newer than the code is fine, because old workers run on after every migration; then returns a warning,
    otherwise None.
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
    """Raise SchemaError if the server is older than MIN_SERVER_VERSION."""
    version = connection.info.server_version
    if version < MIN_SERVER_VERSION:
        raise SchemaError(
            f"PostgreSQL {version // 10_000} is too old: tokentrail needs {MIN_SERVER_VERSION // 10_000} or newer."
        )
