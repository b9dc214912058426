"""The command `tokentrail`. What its exit codes mean is in examples.py, for every --help to say.

examples.py   what every --help shows of its command in use
failures.py   every error that a user can meet, as one sentence
running.py    up, demo
migrate.py    migrate
adoption.py   what `migrate stamp` looks at in a database of other software
worker.py     worker
api.py        api
flower.py     flower
publish.py    publish
reading.py    history, receipt, supply
dead_letters.py  dead-letters
settings.py settings
usage.py      how a command refuses what it was given
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from worker.cli import api, dead_letters, flower, migrate, publish, reading, running, settings, worker
from worker.cli.examples import show_examples
from worker.cli.failures import explain
from worker.schema_version import known_revision

app = typer.Typer(
    name="tokentrail",
    help="Applies token accruals and burns from Redis to PostgreSQL, with an audit trail that can be proved.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,  # should it be enabled one day: a variable may hold a password
)
app.command()(running.up)
app.command()(running.demo)
app.add_typer(migrate.app, name="migrate")
app.command()(worker.worker)
app.command()(api.api)
app.command()(flower.flower)
app.command()(publish.publish)
app.command()(reading.history)
app.command()(reading.receipt)
app.command()(reading.supply)
app.add_typer(dead_letters.app, name="dead-letters")
app.command("settings")(settings.show)
show_examples(app)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tokentrail {version('tokentrail')}, schema {known_revision()}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _program(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """What stands before a command."""


def main() -> NoReturn:
    """Run the command line and exit. Errors a user can meet are one sentence on standard error, never a traceback.

    Ctrl-C is exit code 130, by typer.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None when it is closed
            stream.reconfigure(errors="backslashreplace")  # a producer's text may be more than a terminal can say
    try:
        code = app(prog_name="tokentrail", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where what goes wrong is still told
    except Exception as error:
        sentence, code = explain(error)
        if sentence is None:
            raise
        if sentence:  # empty when all there was to say is the help
            print(f"tokentrail: {sentence}", file=sys.stderr)  # noqa: T201 - the answer to a person
        _give_up_output()
    sys.exit(code or 0)


def _give_up_output() -> None:
    """Throw away what standard output does not take: Python would try again at exit, and exit with 120."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # it has no file, or is closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
