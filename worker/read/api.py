"""The read endpoint: an account's history over HTTP, its rejections and receipts, and whether this process is ready."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial
from importlib.metadata import version
from typing import Annotated, Final

import structlog
import uvicorn
from fastapi import Depends, FastAPI, Query, Response
from psycopg import AsyncConnection, OperationalError
from psycopg.errors import UndefinedTable

from schema.responses import (
    MAX_KEYS,
    MAX_WAIT,
    Answer,
    Directory,
    Health,
    HistoryQuery,
    Receipts,
    ReceiptsQuery,
    Rejections,
    TransactionHistory,
)
from worker import db, schema_version
from worker.config import Settings
from worker.hosts import Hosts
from worker.listening import listen

from . import problems
from .database import Database, DatabaseAway
from .edge import Edge
from .history import read_history
from .receipts import await_receipts
from .rejections import read_rejections

log = structlog.get_logger(__name__)

#: Seconds the database may take to show that it is there: probes are asked often and are impatient.
READY_WITHIN: Final = 2.0

#: Bytes of a request's address and headers: a query for all the receipts one may ask for at a time, and each character
#: of their keys four bytes, percent-encoded, and as much as uvicorn allows by itself for all else.
LONGEST_HEAD: Final = MAX_KEYS * (200 * 12 + len("idempotencyKey=&")) + 16 * 1024

#: Seconds that answers under way may take to finish when the process is told to stop: longer than a receipt's wait.
GRACE: Final = MAX_WAIT + 5


def create_app(settings: Settings, host: str | None = None) -> FastAPI:
    """The application, which may be asked by the name `host` that it listens on.

    Raises ConfigError when no database is set; a database that is away is no reason to fail.
    """
    url = settings.database()
    database = Database(url)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with database.opened():
            yield

    app = FastAPI(
        title="tokentrail",
        version=version("tokentrail"),
        description="The audit trail of every token movement, newest first.",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from a content network: /openapi.json is for your own viewer
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    problems.install(app)
    app.add_middleware(Edge, hosts=Hosts([host or settings.api_host, *settings.host_names()]))

    @app.get(
        problems.HISTORY,
        response_model=TransactionHistory,
        responses=problems.documented(422, 503),
        dependencies=[Depends(problems.check_query_string)],
        operation_id="transactionHistory",
    )
    async def transaction_history(query: Annotated[HistoryQuery, Query()]) -> Response:
        """One page of the account's records, newest first; an unknown user has an empty history."""
        ask = partial(read_history, user_id=query.user_id, page=query.page, limit=query.limit)
        return _json(await database.read(ask))

    @app.get(
        problems.REJECTIONS,
        response_model=Rejections,
        responses=problems.documented(422, 503),
        dependencies=[Depends(problems.check_query_string)],
        operation_id="rejections",
    )
    async def rejections(query: Annotated[HistoryQuery, Query()]) -> Response:
        """One page of what the account was refused for good, newest first."""
        ask = partial(read_rejections, user_id=query.user_id, page=query.page, limit=query.limit)
        return _json(await database.read(ask))

    @app.get(
        problems.RECEIPTS,
        response_model=Receipts,
        responses=problems.documented(422, 503),
        dependencies=[Depends(problems.check_query_string)],
        operation_id="receipts",
    )
    async def receipts(query: Annotated[ReceiptsQuery, Query()]) -> Response:
        """What became of a user's events, by their keys: applied, rejected, dead-lettered, or not known yet."""
        return _json(await await_receipts(database, query.user_id, query.idempotency_keys, query.wait))

    @app.get("/", response_model=Directory, operation_id="directory")
    async def directory() -> Response:
        """What there is to ask for: whoever opens the bare address in a browser looks for that."""
        described = {path: methods["get"]["description"] for path, methods in app.openapi()["paths"].items()}
        return _json(Directory(addresses=described | {"/openapi.json": "All of this for programs, with parameters."}))

    @app.get("/healthz", response_model=Health, operation_id="healthz")
    async def healthz() -> Response:
        """This process is alive; it asks no one else."""
        return _json(Health(status="ok"))

    known = schema_version.known_revision()
    warned: set[str | None] = set()

    @app.get("/readyz", response_model=Health, responses=problems.documented(503), operation_id="readyz")
    async def readyz() -> Response:
        """The database answers, is new enough, and is migrated to what this code knows."""
        revision = await database.read(_revision, READY_WITHIN)
        if revision != known:
            newer = await asyncio.to_thread(_check_schema, settings)  # raises the sentence, unless the schema is newer
            if newer and revision not in warned:  # once, and not whenever somebody asks
                warned.add(revision)
                log.warning("the schema is newer than this code, answering from it", reason=newer)
        return _json(Health(status="ready"))

    return app


def serve(settings: Settings, host: str, port: int) -> None:
    """Answer on this address until SIGINT or SIGTERM; answers under way are finished first.

    Raises CannotListen when the address is not to be had, ConfigError when no database is set.
    """
    app = create_app(settings, host)
    # The pool speaks of every attempt to connect; we speak of every outage, once.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    with listen(host, port) as line:
        shown = f"[{host}]" if ":" in host else host
        log.info("the API listens", url=f"http://{shown}:{line.getsockname()[1]}")
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=GRACE,
            http="h11",  # which is told here how long a request may be
            h11_max_incomplete_event_size=LONGEST_HEAD,
        )
        with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn once it has shut down
            uvicorn.Server(config).run(sockets=[line])


def _json(answer: Answer) -> Response:
    return Response(answer.json_text().encode(), media_type="application/json")


async def _revision(connection: AsyncConnection) -> str | None:
    schema_version.refuse_old_server(connection)
    try:
        row = await (await connection.execute("SELECT version_num FROM alembic_version")).fetchone()
    except UndefinedTable:
        return None
    return None if row is None else str(row[0])


def _check_schema(settings: Settings) -> str | None:
    """A sentence to warn with when the schema is newer.

    Raises SchemaError unless this code can work with the database, DatabaseAway if it went away meanwhile.
    """
    impatient = settings.model_copy(update={"statement_timeout": READY_WITHIN, "lock_timeout": READY_WITHIN})
    try:
        with db.connect(settings.database(), impatient, name="tokentrail api") as connection:
            return schema_version.check_schema(connection)
    except OperationalError as error:
        raise DatabaseAway("The database went away while it was looked at: try again in a few seconds.") from error
