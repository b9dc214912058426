"""How a command refuses what it was given."""

from __future__ import annotations

import typer


class Misused(typer.TyperException):
    """The command cannot be carried out as it was given; nothing was done. One sentence; exit code 2."""

    exit_code = 2


class NotReady(Exception):
    """What the command needs is away or taken; the message says what. Exit code 1."""
