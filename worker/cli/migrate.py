"""`tokentrail migrate`: upgrade and downgrade the schema of the database, and say which revision it is at."""

from __future__ import annotations

import logging
from typing import Annotated

import psycopg
import typer
from alembic import command

from worker import migration
from worker.cli.adoption import differences
from worker.cli.usage import UsageError, interruptible
from worker.config import load_settings
from worker.migration import alembic_config, schema_errors
from worker.output import console, migrating
from worker.schema_version import (
    LEGACY_REVISION,
    SchemaError,
    check_schema,
    current_revision,
    known_revision,
    knows,
)

app = typer.Typer(help="Bring the database's schema up to date.")


@app.callback(invoke_without_command=True)
def deploy(
    context: typer.Context,
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements for review, and change nothing.")] = False,
    since: Annotated[str | None, typer.Option("--from", help="With --sql: the revision to start at.")] = None,
) -> None:
    """Bring the schema up to date. Safe under load, beside another migration, and again after it was killed."""
    if context.invoked_subcommand is not None:
        return
    if since is not None and not sql:
        raise UsageError("--from is for --sql: a migration starts where the database is.")
    if since is not None and since != "base" and not knows(since):
        raise UsageError(f"There is no revision {since}: `tokentrail migrate status` says which the database is at.")
    if sql:
        with schema_errors():
            command.upgrade(alembic_config(), f"{since or 'base'}:head", sql=True)
        return
    url = load_settings().database()
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # it warns of the statement that Ctrl-C ends
    resume = "run `tokentrail migrate` again to go on; workers run on meanwhile."
    with interruptible(lambda: resume), migrating(console(stderr=True)):
        deployed = migration.deploy(url)
    if deployed.warning:
        typer.echo(deployed.warning)
    elif deployed.applied:
        typer.echo(f"Migrated the schema from {deployed.before or 'nothing'} to {deployed.applied[-1]}.")
    else:
        typer.echo(f"The schema is at {known_revision()} already: nothing to do.")


@app.command()
def status() -> None:
    """Say which revision the schema is at; exit 1 if this code cannot work with it."""
    with schema_errors(), _connected() as connection:
        typer.echo(
            check_schema(connection) or f"The schema is at {current_revision(connection)}, as this code needs it."
        )


@app.command()
def new(name: Annotated[str, typer.Argument(help="What it does, like add_token_audit_trail.")]) -> None:
    """Draft the next revision from the differences between models and database. Read the rules in it."""
    with schema_errors():
        with _connected() as connection:
            if newer := check_schema(connection):
                raise SchemaError(newer)
        revision = f"{int(known_revision()) + 1:04}"
        config = alembic_config(load_settings().database())
        script = command.revision(config, name.replace("_", " "), autogenerate=True, rev_id=revision)
        assert script is not None
        assert not isinstance(script, list)
        typer.echo(
            f"Wrote {script.path}. Alembic does not see CHECK constraints and triggers, and knows nothing of locks: "
            "write those by hand, with the functions of migrations/steps.py."
        )


@app.command()
def stamp() -> None:
    """Note that the database has the legacy schema, made by other software, after comparing its tables with it.

    The database is then at revision 0001, and `tokentrail migrate` goes on from there. No table is changed.
    """
    url = load_settings().database()
    with schema_errors():
        if (current := _known(url)) is not None:
            raise SchemaError(f"The schema is at {current} already: there is nothing to stamp.")
        with _connected() as connection:
            clauses = differences(connection)
        if clauses is None:
            raise SchemaError(
                "The database has no tables of the legacy schema: a new one needs no stamp, only `tokentrail migrate`."
            )
        if clauses:
            raise SchemaError(f"These tables are not the legacy schema, nothing was stamped: {'; '.join(clauses)}.")
        migration.stamp(url, LEGACY_REVISION)
    typer.echo(f"The tables are the legacy schema: stamped as {LEGACY_REVISION}. Now run `tokentrail migrate`.")


@app.command()
def downgrade(
    drop_history: Annotated[
        bool, typer.Option("--drop-history", help="Also if the audit trail holds rows, which are lost then.")
    ] = False,
) -> None:
    """Take the schema back to the legacy schema. Stop all workers first.

    Refuses if the audit trail holds a row, because that is the history.
    """
    url = load_settings().database()
    with schema_errors():
        current = _known(url)
        if current is None:
            raise SchemaError("The database has no schema yet: there is nothing to downgrade.")
        if not migration.downgrade(url, LEGACY_REVISION, drop_history=drop_history):
            typer.echo(f"The schema is at {LEGACY_REVISION} already: nothing to do.")
            return
    history = "The audit trail was dropped." if drop_history else "The audit trail was empty."
    typer.echo(f"Took the schema back from {current} to {LEGACY_REVISION}. {history}")


def _known(url: str) -> str | None:
    """The revision of the schema, None before the first. Raises SchemaError for a revision that this code lacks."""
    with psycopg.connect(url, connect_timeout=5) as connection:
        current = current_revision(connection)
        if current is not None and not knows(current) and check_schema(connection):
            raise SchemaError(
                f"The schema is at {current}, newer than this code ({known_revision()}): use the newer code."
            )
        return current


def _connected() -> psycopg.Connection:
    return psycopg.connect(load_settings().database(), connect_timeout=5)
