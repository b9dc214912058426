"""`tokentrail migrate`: the schema of the database, deployed, looked at, and taken further."""

from __future__ import annotations

import logging
from typing import Annotated

import psycopg
import typer
from alembic import command

from worker.cli.adoption import differences
from worker.cli.usage import Misused, interruptible
from worker.config import settings
from worker.output import console, migrating
from worker.schema_version import (
    LEGACY_REVISION,
    SchemaError,
    alembic_config,
    check_schema,
    current_revision,
    known_revision,
    knows,
    told,
)
from worker.schema_version import deploy as bring_up_to_date
from worker.schema_version import downgrade as take_back
from worker.schema_version import stamp as note

app = typer.Typer(help="Bring the database's schema up to date.")


@app.callback(invoke_without_command=True)
def deploy(
    context: typer.Context,
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements for review, and change nothing.")] = False,
    since: Annotated[str | None, typer.Option("--from", help="With --sql: the revision to start at.")] = None,
) -> None:
    """Bring the schema up to date: safe under load, with others at it, and again after it was killed."""
    if context.invoked_subcommand is not None:
        return
    if since is not None and not sql:
        raise Misused("--from is for --sql: a migration starts where the database is.")
    if since is not None and since != "base" and not knows(since):
        raise Misused(f"There is no revision {since}: `tokentrail migrate status` says which the database is at.")
    if sql:
        with told():
            command.upgrade(alembic_config(), f"{since or 'base'}:head", sql=True)
        return
    url = settings().database()
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # it warns of the very statement that Ctrl-C ends
    goes_on = "`tokentrail migrate` goes on from where this one came to, and workers run on meanwhile."
    with interruptible(lambda: goes_on), migrating(url, console(stderr=True)) as tell:
        done = bring_up_to_date(url, tell)
    if done.left:
        typer.echo(done.left)
    elif done.applied:
        typer.echo(f"Migrated the schema from {done.before or 'nothing'} to {done.applied[-1]}.")
    else:
        typer.echo(f"The schema is at {known_revision()} already: nothing to do.")


@app.command()
def status() -> None:
    """Say which revision the schema is at; exit 1 if this code cannot work with it."""
    with told(), _connected() as connection:
        typer.echo(
            check_schema(connection) or f"The schema is at {current_revision(connection)}, as this code needs it."
        )


@app.command()
def new(name: Annotated[str, typer.Argument(help="What it does, like add_token_audit_trail.")]) -> None:
    """Write the next revision, from how the models differ from the database. It is a draft: read its rules."""
    with told():
        with _connected() as connection:
            if newer := check_schema(connection):
                raise SchemaError(newer)
        revision = f"{int(known_revision()) + 1:04}"
        config = alembic_config(settings().database())
        script = command.revision(config, name.replace("_", " "), autogenerate=True, rev_id=revision)
        assert script is not None
        assert not isinstance(script, list)
        typer.echo(
            f"Wrote {script.path}. Alembic does not see CHECK constraints and triggers, and knows nothing of locks: "
            "write those by hand, in the words of migrations/steps.py."
        )


@app.command()
def stamp() -> None:
    """Note that other software has made the tables of before the trail, once they are seen to be those.

    The database is then at revision 0001, and `tokentrail migrate` goes on from there. No table is changed.
    """
    url = settings().database()
    with told():
        if (current := _known(url)) is not None:
            raise SchemaError(f"The schema is at {current} already: there is nothing to note.")
        found = differences(url)
        if found is None:
            raise SchemaError(
                "The database has no tables of before the trail: a new one needs no stamp, only `tokentrail migrate`."
            )
        if found:
            raise SchemaError(
                "These are not the tables of migrations/versions/0001_before_the_trail.py, so that nothing was noted:"
                f" {'; '.join(found)}."
            )
        note(url, LEGACY_REVISION)
    typer.echo(f"The tables are those of before the trail: noted as {LEGACY_REVISION}. Now run `tokentrail migrate`.")


@app.command()
def downgrade(
    drop_history: Annotated[
        bool, typer.Option("--drop-history", help="Also if the trail holds rows, which are then gone for good.")
    ] = False,
) -> None:
    """Give the software of before the trail its tables back. Stop all workers first.

    Refuses once the trail holds a row, because that is the history.
    """
    url = settings().database()
    with told():
        current = _known(url)
        if current is None:
            raise SchemaError("The database has no schema yet: there is nothing to take back.")
        if not take_back(url, LEGACY_REVISION, drop_history=drop_history):
            typer.echo(f"The schema is at {LEGACY_REVISION} already: nothing to do.")
            return
    held = "What the trail held is gone for good." if drop_history else "The trail held nothing."
    typer.echo(f"Took the schema back from {current} to {LEGACY_REVISION}. {held}")


def _known(url: str) -> str | None:
    """The revision that the schema is at, None before the first. Raises SchemaError for one that this code lacks."""
    with psycopg.connect(url, connect_timeout=5) as connection:
        current = current_revision(connection)
        if current is not None and not knows(current) and check_schema(connection):
            raise SchemaError(
                f"The schema is at {current}, newer than this code ({known_revision()}): use the newer code."
            )
        return current


def _connected() -> psycopg.Connection:
    return psycopg.connect(settings().database(), connect_timeout=5)
