"""How commands reach the ledger's database."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, TypeVar

from worker.config import load_settings
from worker.read.connection import read_once

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    import psycopg

T = TypeVar("T")

_APPLICATION_NAME: Final = "tokentrail cli"


def read(reader: Callable[[psycopg.AsyncConnection], Awaitable[T]]) -> T:
    """Return what a function of worker/read/ returns for the settings' database."""
    settings = load_settings()
    return read_once(
        settings.database(),
        reader,
        application_name=_APPLICATION_NAME,
        statement_timeout=settings.statement_timeout,
    )


@contextlib.contextmanager
def connection() -> Iterator[psycopg.Connection]:
    """A connection that may write, to a database with a schema that this code knows."""
    from worker.db import connect  # noqa: PLC0415 - commands that only read do not need it
    from worker.schema_version import check_schema  # noqa: PLC0415

    settings = load_settings()
    with connect(settings.database(), settings, name=_APPLICATION_NAME) as connected:
        check_schema(connected)
        yield connected
