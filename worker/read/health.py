"""/healthz, whether this process is alive, and /readyz, whether it can answer."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from fastapi import APIRouter, Response
from psycopg import AsyncConnection, OperationalError
from psycopg.errors import UndefinedTable

from schema.responses import Health
from worker import db, schema_version
from worker.config import Settings

from .database import Database, DatabaseUnavailable
from .problems import documented

log = structlog.get_logger(__name__)

READY_TIMEOUT: Final = 2.0  # seconds that PostgreSQL may take: probes are frequent and impatient


def router(database: Database, settings: Settings) -> APIRouter:
    """The two probes."""
    probes = APIRouter()
    known = schema_version.known_revision()
    logged: set[str | None] = set()  # newer revisions: one line each, not one per probe

    @probes.get("/healthz", response_model=Health, operation_id="healthz")
    async def healthz() -> Response:
        """This process is alive. It asks no other server."""
        return _json(Health(status="ok"))

    @probes.get("/readyz", response_model=Health, responses=documented(503), operation_id="readyz")
    async def readyz() -> Response:
        """The database answers, its version is supported, and its schema is one that this code knows."""
        revision = await database.read(_revision, READY_TIMEOUT)
        if revision != known:
            warning = await asyncio.to_thread(_check_schema, settings)  # raises unless the schema is newer
            if warning and revision not in logged:
                logged.add(revision)
                log.warning("the schema is newer than this code, answering from it", reason=warning)
        return _json(Health(status="ready"))

    return probes


def _json(health: Health) -> Response:
    return Response(health.json_text().encode(), media_type="application/json")


async def _revision(connection: AsyncConnection) -> str | None:
    schema_version.refuse_old_server(connection)
    try:
        row = await (await connection.execute("SELECT version_num FROM alembic_version")).fetchone()
    except UndefinedTable:
        return None
    return None if row is None else str(row[0])


def _check_schema(settings: Settings) -> str | None:
    """A warning when the schema is newer than this code.

    Raises SchemaError when this code cannot work with the schema, DatabaseUnavailable when the database is unreachable.
    """
    with_short_timeouts = settings.model_copy(
        update={"statement_timeout": READY_TIMEOUT, "lock_timeout": READY_TIMEOUT}
    )
    try:
        with db.connect(settings.database(), with_short_timeouts, name="tokentrail api") as connection:
            return schema_version.check_schema(connection)
    except OperationalError as error:
        raise DatabaseUnavailable("The database became unreachable: try again in a few seconds.") from error
