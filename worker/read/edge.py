"""What every answer has in common: by which name it was asked for, headers, HEAD, a sentence instead of a traceback."""

from __future__ import annotations

from http import HTTPStatus

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.hosts import Hosts, refusal

from .problems import problem

log = structlog.get_logger(__name__)


class Edge:
    """The application's outermost layer: no exception passes it, and no request by a name that is not ours.

    HEAD is answered like GET, and the server leaves the body out. A history is nobody's to cache: it grows.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers["Cache-Control"] = "no-store"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        # HTTP/1.0 has none; of HTTP/1.1, which no browser is below, the server has refused what has not exactly one.
        host = Headers(scope=scope).get("host")
        if host is not None and not self._hosts.accept(host):
            misdirected = problem(Request(scope), HTTPStatus.MISDIRECTED_REQUEST, refusal(host))
            await misdirected(scope, receive, send_with_headers)
            return

        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(inner, receive, send_with_headers)
        except Exception:
            log.exception("a request failed by a fault of ours", path=scope["path"])
            if begun:
                raise  # too late for a sentence: the server cuts the connection
            failed = problem(Request(scope), 500, "Something is wrong on our side; it has been logged.")
            await failed(scope, receive, send_with_headers)
