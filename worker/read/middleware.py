"""What all responses have in common: the host names they answer to, headers, HEAD, a sentence for a traceback."""

from __future__ import annotations

from http import HTTPStatus

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.hosts import Hosts, refusal

from .problems import problem

log = structlog.get_logger(__name__)


class OuterMiddleware:
    """The outermost layer of the application: no exception passes it, and no request to another host name.

    HEAD is answered like GET, and the server omits the body. No cache may keep a response, for a history grows.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

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

        # HTTP/1.0 has no Host header; the server refuses HTTP/1.1, which all browsers use, without exactly one.
        host = Headers(scope=scope).get("host")
        if host is not None and not self._hosts.accept(host):
            misdirected = problem(Request(scope), HTTPStatus.MISDIRECTED_REQUEST, refusal(host))
            await misdirected(scope, receive, send_with_headers)
            return

        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(inner, receive, send_with_headers)
        except Exception:
            log.exception("request failed, this is a bug", path=scope["path"])
            if started:
                raise  # too late for a sentence: the server closes the connection
            response = problem(Request(scope), 500, "Internal error; it has been logged.")
            await response(scope, receive, send_with_headers)
