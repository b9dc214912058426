"""`tokentrail migrate`: the schema of the database, deployed, looked at, and taken further."""

from __future__ import annotations

from typing import Annotated

import psycopg
import typer
from alembic import command

from worker.cli.usage import Misused
from worker.config import settings
from worker.db import alembic_config, check_schema, current_revision, known_revision, knows, told
from worker.db import deploy as bring_up_to_date

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
    done = bring_up_to_date(settings().database())
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
        revision = f"{int(known_revision()) + 1:04}"
        config = alembic_config(settings().database())
        script = command.revision(config, name.replace("_", " "), autogenerate=True, rev_id=revision)
        assert script is not None
        assert not isinstance(script, list)
        typer.echo(
            f"Wrote {script.path}. Alembic does not see CHECK constraints and triggers, and knows nothing of locks: "
            "write those by hand, in the words of migrations/steps.py."
        )


def _connected() -> psycopg.Connection:
    return psycopg.connect(settings().database(), connect_timeout=5)
