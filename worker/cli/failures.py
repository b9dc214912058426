"""The one sentence and the exit code for every error that a user can meet."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Final

import typer

from schema.text import one_line_error
from worker.config import HOME
from worker.errors import TokentrailError

FAILED: Final = 1  # exit code

#: Of OSErrors without a file: this machine has no more disk, open files, processes or memory for the command.
EXHAUSTED: Final = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}

#: Beginning of a SQLSTATE → what to do.
ADVICE_BY_SQLSTATE: Final = {
    "26000": "Is DATABASE_URL a pooler in transaction mode? tokentrail needs session mode",
    "53100": "Free some space on its disk",
    "25006": "It is a read-only standby: name the primary in DATABASE_URL",
    "42501": "Grant that right to the user of DATABASE_URL",
    "42P01": "The schema is not as `tokentrail migrate` left it: restore what is missing",
    "42703": "The schema is not as `tokentrail migrate` left it: restore what is missing",
    "57014": "The statement took too long: raise TOKENTRAIL_STATEMENT_TIMEOUT",
    "40": "Another transaction was in the way: try again",
    "53": "Give PostgreSQL more memory or connections, or try again later",
    "55P03": "Another transaction holds the lock: try again",
    "57": "Try again",
}
DEFAULT_ADVICE: Final = "See its log for the statement"


def explain(error: Exception) -> tuple[str | None, int]:
    """The sentence for `error`, None for a bug, which deserves its traceback, and the exit code."""
    if isinstance(error, TokentrailError):
        return str(error), error.exit_code
    if isinstance(error, typer.TyperException):  # the command line was wrong
        return error.format_message(), error.exit_code
    if isinstance(error, BrokenPipeError):  # the reader of the output, such as `head`, has ended
        return "", FAILED
    if isinstance(error, OSError):
        return _system_failure(error), FAILED
    return _server_failure(error), FAILED


def _system_failure(error: OSError) -> str | None:
    """The system's own sentence, the file, and the setting that names another place for it."""
    if error.filename is None:
        if error.errno not in EXHAUSTED:
            return None
        return f"{error.strerror}: free what this machine has too little of, or raise its limits."
    path = Path(os.fsdecode(error.filename)).absolute()
    places = {"TOKENTRAIL_HOME": HOME.absolute(), "TMPDIR": Path(tempfile.tempdir or os.devnull)}
    setting = next((f" with {name}" for name, place in places.items() if place in [path, *path.parents]), "")
    return f"Cannot use {path} ({error.strerror}): fix that, or choose another place{setting}."


def _server_failure(error: Exception) -> str | None:
    """Imports the clients of the servers only now: a command that needs none must not wait for them."""
    import psycopg  # noqa: PLC0415
    from redis.exceptions import RedisError  # noqa: PLC0415
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    from schema.publisher import PublishError  # noqa: PLC0415
    from worker.readiness import postgresql_unreachable  # noqa: PLC0415

    cause = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(cause, psycopg.OperationalError) and cause.sqlstate is None:
        return postgresql_unreachable(cause)
    if isinstance(cause, psycopg.Error):
        state = cause.sqlstate or ""
        advice = next((text for start, text in ADVICE_BY_SQLSTATE.items() if state.startswith(start)), DEFAULT_ADVICE)
        return f"PostgreSQL refused ({one_line_error(cause)}). {advice}."
    if isinstance(error, RedisError):
        return f"Redis refused ({one_line_error(error)}): check that BROKER_URL names the right one."
    return str(error) if isinstance(error, PublishError) else None
