"""Every error that a user can meet, as one sentence and an exit code."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Final

import psycopg
import typer
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from schema.publisher import PublishError
from schema.urls import said
from worker.config import HOME, ConfigError
from worker.files import Untrusted
from worker.local.demo import DemoError
from worker.local.embedded import EmbeddedError
from worker.local.up import AlreadyRunning, Failed
from worker.readiness import NotReady, no_database
from worker.schema_version import SchemaError

FAILED = 1
USAGE = 2

#: What is wrong with the machine's files, and not with us.
_OF_THE_FILES: Final = {
    errno.ENOSPC: "free some space there, or choose another place",
    errno.EDQUOT: "free some space there, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.ENOTDIR: "choose a place that is a folder",
    errno.EEXIST: "choose a place that is a folder",
    errno.ENOENT: "choose a place that is there",
}

#: What the machine, or our share of it, has no more of.
_OF_THE_MACHINE: Final = {
    errno.EMFILE: "open files: raise the limit (ulimit -n)",
    errno.ENFILE: "open files: stop something else that runs here",
    errno.EAGAIN: "processes: raise the limit (ulimit -u), or stop something else that runs here",
    errno.ENOMEM: "memory: stop something else that runs here, or give it more",
}

#: Beginnings of SQLSTATEs, and what helps.
_OF_POSTGRESQL: Final = {
    "53100": "free some space on its disk",
    "53": "it has too little memory or too few connections, so give it more or try again later",
    "40": "others were in its way, so try again",
    "42P01": "the schema is not as `tokentrail migrate` left it, so bring back what is missing",
    "42703": "the schema is not as `tokentrail migrate` left it, so bring back what is missing",
    "25006": "it is a read-only standby, so name the primary in DATABASE_URL",
    "42501": "give the user of DATABASE_URL that right",
    "55P03": "something else holds the lock, so try again",
    "57014": "it took too long, so raise TOKENTRAIL_STATEMENT_TIMEOUT",
    "57": "it was interrupted, so try again",
}

_OTHERWISE: Final = "its log has the statement and more, so mend what that names, and try again"

#: Their messages are sentences already.
_TOLD = (PublishError, EmbeddedError, DemoError, SchemaError, AlreadyRunning, Failed, NotReady, Untrusted)


def explain(error: Exception) -> tuple[str | None, int]:
    """The sentence for `error`, None when it is a bug and wants its traceback, and the exit code."""
    if isinstance(error, ConfigError):
        return str(error), USAGE
    if isinstance(error, typer.TyperException):  # the command line was wrong
        return error.format_message(), error.exit_code
    return _failure(error), FAILED


def _failure(error: Exception) -> str | None:
    if isinstance(error, _TOLD):
        return str(error)
    if isinstance(error, psycopg.Error | DBAPIError):
        return _of_postgresql((isinstance(error, DBAPIError) and error.orig) or error)
    if isinstance(error, RedisError):
        return f"Redis said no ({said(error)}): check that BROKER_URL names the right one."
    if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
        return ""
    return _of_the_machine(error) if isinstance(error, OSError) else None


def _of_the_machine(error: OSError) -> str | None:
    if scarce := _OF_THE_MACHINE.get(error.errno or 0):
        return f"The machine gives us no more {scarce}."
    advice = _OF_THE_FILES.get(error.errno or 0)
    if error.filename is None:
        return advice and f"Cannot write ({error.strerror}): {advice}."
    path = Path(os.fsdecode(error.filename)).absolute()
    places = {"TOKENTRAIL_HOME": HOME.absolute(), "TMPDIR": Path(tempfile.tempdir or os.devnull)}
    named = next((f", {name} names it" for name, place in places.items() if place in [path, *path.parents]), "")
    return f"Cannot use {path} ({error.strerror}): {advice or 'choose another place'}{named}."


def _of_postgresql(error: BaseException) -> str:
    if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:  # no server has answered
        return no_database(error)
    state = (error.sqlstate if isinstance(error, psycopg.Error) else None) or ""
    advice = next((advice for start, advice in _OF_POSTGRESQL.items() if state.startswith(start)), _OTHERWISE)
    return f"PostgreSQL said no ({said(error)}): {advice}."
