"""What all responses have in common: headers, HEAD, and a sentence where a traceback would be."""

from __future__ import annotations

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import problem

log = structlog.get_logger(__name__)


class OuterMiddleware:
    """The outermost layer of the application: no exception passes it.

    HEAD is answered like GET, and the server omits the body. No cache may keep a response, for a history grows.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["Cache-Control"] = "no-store"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(inner, receive, send_with_headers)
        except Exception:
            log.exception("request failed, this is a bug", path=scope["path"])
            if started:
                raise  # too late for a sentence: the server closes the connection
            response = problem(Request(scope), 500, "Internal error; it has been logged.")
            await response(scope, receive, send_with_headers)
