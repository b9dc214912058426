"""Every error that a user can meet, as one sentence and an exit code."""

from __future__ import annotations

import psycopg
import typer
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from schema.publisher import PublishError
from worker.cli.readiness import no_database
from worker.cli.usage import NotReady
from worker.config import ConfigError
from worker.db import SchemaError
from worker.demo import DemoError
from worker.embedded import EmbeddedError
from worker.up import AlreadyRunning, Failed

FAILED = 1
USAGE = 2


#: Their messages are sentences already.
_TOLD = (PublishError, EmbeddedError, DemoError, SchemaError, AlreadyRunning, Failed, NotReady)


def explain(error: Exception) -> tuple[str | None, int]:
    """The sentence for `error`, None when it is a bug and wants its traceback, and the exit code."""
    if isinstance(error, ConfigError):
        return str(error), USAGE
    if isinstance(error, typer.TyperException):  # the command line was wrong
        return error.format_message(), error.exit_code
    if isinstance(error, _TOLD):
        return str(error), FAILED
    if isinstance(error, psycopg.Error | DBAPIError):
        return _of_postgresql(error.orig if isinstance(error, DBAPIError) else error), FAILED
    if isinstance(error, RedisError):
        return f"Redis said no: {_one_line(error)}.", FAILED
    return None, FAILED


def _of_postgresql(error: BaseException | None) -> str:
    if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:  # no server has answered
        return no_database(error)
    return f"PostgreSQL said no: {_one_line(error)}."


def _one_line(error: BaseException | None) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()).rstrip(".")
