"""The command `tokentrail`: one module a command, named as the command, and imported when that command is run.

up.py, demo.py, migrate.py, worker.py, api.py, flower.py, publish.py, history.py, receipt.py, supply.py,
dead_letters.py, settings.py
             the commands
examples.py  the examples and exit codes that --help shows
failures.py  the sentence and exit code for an error
usage.py     UsageError, and the message after Ctrl-C
ledger.py    how commands reach the ledger's database
adoption.py  how `migrate stamp` compares the tables of other software
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import platform
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

from worker.cli.examples import show_examples
from worker.cli.failures import explain
from worker.schema_version import known_revision

if TYPE_CHECKING:
    from typer._click import Command, Context

#: Command or group → the first sentence of its help, so that `tokentrail --help` imports none of them.
#: `dead-letters` is the function `dead_letters` of worker/cli/dead_letters.py, or the group `app` there.
COMMANDS: Final = {
    "up": "Run PostgreSQL, Valkey, a worker, the API and Flower here, until Ctrl-C.",
    "demo": "Publish a believable token economy, wait until every event is decided, and show the books.",
    "migrate": "Bring the database's schema up to date.",
    "worker": "Apply events until SIGTERM or SIGINT; the batch in progress is finished first.",
    "api": "Serve the transaction history over HTTP until SIGINT or SIGTERM.",
    "flower": "Serve Flower, in which operators see each event and each worker, until SIGINT or SIGTERM.",
    "publish": "Publish events. Whatever is reported as published has been acknowledged by Redis.",
    "history": "Show a user's records or rejections, newest first.",
    "receipt": "Show what became of an event: applied, rejected, dead-lettered or unknown.",
    "supply": "Show how many tokens were issued and burned, and how many circulate.",
    "dead-letters": "List dead letters, replay or discard them, and purge their bodies.",
    "settings": "Show every setting, its value with secrets masked, and where the value comes from.",
}


class LazyGroup(TyperGroup):
    """Lists COMMANDS without importing them; resolves the one that is run to the real command."""

    def resolve_command(self, ctx: Context, args: list[str]) -> tuple[str | None, Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, None if name is None or command is None else load(name), rest


def load(name: str) -> Command:
    """Import the module of a command or group, and build the command."""
    module_name = name.replace("-", "_")
    module = importlib.import_module(f"worker.cli.{module_name}")
    program = typer.Typer()
    program.callback()(lambda: None)  # else typer takes an only command for the whole program
    if hasattr(module, "app"):
        program.add_typer(module.app, name=name)
    else:
        program.command(name)(getattr(module, module_name))
    show_examples(program)
    return cast("TyperGroup", get_command(program)).commands[name]


app = typer.Typer(
    name="tokentrail",
    cls=LazyGroup,
    help="Applies token accruals and burns from Redis to PostgreSQL, with an audit trail that can be proved.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,  # should it be enabled one day: a variable may hold a password
)
for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(lambda: None)
show_examples(app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tokentrail {version('tokentrail')}, schema {known_revision()}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _program(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options of `tokentrail` itself."""


def main() -> NoReturn:
    """Run the command line and exit. An error that a user can meet is one sentence on standard error, no traceback.

    Ctrl-C is exit code 130, by typer.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None when it is closed
            stream.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack a character of an event
    try:
        code = app(prog_name="tokentrail", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error is still reported
    except Exception as error:
        sentence, code = explain(error)
        if sentence is None:
            raise
        if sentence:  # empty when only help was printed
            print(f"tokentrail: {sentence}", file=sys.stderr)  # noqa: T201 - the answer to a person
        _discard_output()
    sys.exit(code or 0)


def _discard_output() -> None:
    """Drop what standard output did not take: Python would try again at exit, and exit with 120."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # it has no file, or is closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
