"""The base of every error that ends a command with one sentence instead of a traceback."""

from __future__ import annotations

from typing import ClassVar


class TokentrailError(Exception):
    """The message is one sentence for the person at the terminal: what is wrong and what to do."""

    exit_code: ClassVar = 1
