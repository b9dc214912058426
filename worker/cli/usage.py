"""How a command refuses what it was given, and what it says when it is told to stop."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Misused(typer.TyperException):
    """The command cannot be carried out as it was given; nothing was done. One sentence; exit code 2."""

    exit_code = 2


@contextlib.contextmanager
def interruptible(sentence: Callable[[], str]) -> Iterator[None]:
    """Say where things stand when Ctrl-C ends the block, and with it the command. Exit code 130.

    For what changes something: a command that only reads ends without a word.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"tokentrail: Interrupted: {sentence()}", err=True)
        raise
