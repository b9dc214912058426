"""UsageError for a command that was called wrongly, and the message after Ctrl-C."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class UsageError(typer.TyperException):
    """The command cannot run as it was called; nothing was changed. The message is one sentence; exit code 2."""

    exit_code = 2


@contextlib.contextmanager
def interruptible(message: Callable[[], str]) -> Iterator[None]:
    """When Ctrl-C ends the block, print how far the command came; exit code 130.

    For commands that change something: one that only reads ends silently.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"tokentrail: Interrupted: {message()}", err=True)
        raise
