"""The HTTP API: an account's history, its rejections and receipts, and the server that answers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any, Final

import structlog
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from pydantic import BaseModel

from schema.responses import (
    MAX_KEYS,
    MAX_WAIT,
    Answer,
    Directory,
    HistoryQuery,
    Receipts,
    ReceiptsQuery,
    Rejections,
    TransactionHistory,
)
from worker.config import Settings
from worker.hosts import Hosts
from worker.listening import listen

from . import health, problems
from .database import Database
from .middleware import OuterMiddleware
from .pages import RECORDS, REJECTIONS, read_page
from .receipts import wait_for_receipts

log = structlog.get_logger(__name__)

#: Path → its query parameters.
QUERIES: Final[dict[str, type[BaseModel]]] = {
    "/api/account/transaction-history": HistoryQuery,
    "/api/account/rejections": HistoryQuery,
    "/api/account/receipts": ReceiptsQuery,
}
HISTORY_PATH, REJECTIONS_PATH, RECEIPTS_PATH = QUERIES

#: Bytes of a request's URL and headers: a query for MAX_KEYS receipts, each character of a key up to four bytes and
#: each byte three characters (%20), and uvicorn's own limit for everything else.
MAX_HEAD_BYTES: Final = MAX_KEYS * (200 * 12 + len("idempotencyKey=&")) + 16 * 1024

#: Seconds that requests in progress may take when the process is to stop: longer than a receipt's wait.
GRACE_SECONDS: Final = MAX_WAIT + 5

router = APIRouter()
_ACCOUNT: Final[dict[str, Any]] = {
    "responses": problems.documented(422, 503),
    "dependencies": [Depends(problems.check_query_string)],
}


@router.get(HISTORY_PATH, response_model=TransactionHistory, operation_id="transactionHistory", **_ACCOUNT)
async def transaction_history(request: Request, query: Annotated[HistoryQuery, Query()]) -> Response:
    """One page of an account's records, newest first; an unknown user has an empty history."""
    read = partial(read_page, pages=RECORDS, user_id=query.user_id, page=query.page, limit=query.limit)
    return _json(await _database(request).read(read))


@router.get(REJECTIONS_PATH, response_model=Rejections, operation_id="rejections", **_ACCOUNT)
async def rejections(request: Request, query: Annotated[HistoryQuery, Query()]) -> Response:
    """Rejected events of an account, newest first, one page."""
    read = partial(read_page, pages=REJECTIONS, user_id=query.user_id, page=query.page, limit=query.limit)
    return _json(await _database(request).read(read))


@router.get(RECEIPTS_PATH, response_model=Receipts, operation_id="receipts", **_ACCOUNT)
async def receipts(request: Request, query: Annotated[ReceiptsQuery, Query()]) -> Response:
    """What became of a user's events, by their keys: applied, rejected, dead-lettered, or not known yet."""
    return _json(await wait_for_receipts(_database(request), query.user_id, query.idempotency_keys, query.wait))


@router.get("/", response_model=Directory, operation_id="directory")
async def directory(request: Request) -> Response:
    """This list of endpoints."""
    paths = request.app.openapi()["paths"]
    described = {path: methods["get"]["description"] for path, methods in paths.items()}
    return _json(Directory(addresses=described | {"/openapi.json": "The OpenAPI description of all of them."}))


def create_app(settings: Settings, host: str | None = None) -> FastAPI:
    """The application, which also answers to the name `host` that it listens on.

    Raises ConfigError when no database is set; an unreachable one is no reason to fail.
    """
    app = FastAPI(
        title="tokentrail",
        version=version("tokentrail"),
        description="The audit trail of every token movement, newest first.",
        lifespan=_lifespan,
        docs_url=None,  # FastAPI's page loads scripts from a content network; use your own viewer for /openapi.json
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.state.database = Database(settings.database())
    app.include_router(router)
    app.include_router(health.router(app.state.database, settings))
    problems.install(app, QUERIES)
    app.add_middleware(OuterMiddleware, hosts=Hosts([host or settings.api_host, *settings.host_names()]))
    return app


def serve(settings: Settings, host: str, port: int) -> None:
    """Answer on this address until SIGINT or SIGTERM; requests in progress are answered first.

    Raises ListenError when the address cannot be used, ConfigError when no database is set.
    """
    app = create_app(settings, host)
    # The pool logs every attempt to connect; we log every outage, once.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    with listen(host, port) as listener:
        url_host = f"[{host}]" if ":" in host else host
        log.info("the API listens", url=f"http://{url_host}:{listener.getsockname()[1]}")
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=GRACE_SECONDS,
            http="h11",  # the one implementation with a limit for the head of a request
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn once it has shut down
            uvicorn.Server(config).run(sockets=[listener])


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with _database_of(app).opened():
        yield


def _database(request: Request) -> Database:
    return _database_of(request.app)


def _database_of(app: FastAPI) -> Database:
    database: Database = app.state.database
    return database


def _json(answer: Answer) -> Response:
    return Response(answer.json_text().encode(), media_type="application/json")
