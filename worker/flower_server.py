"""`python -m worker.flower_server`: Flower, protected from the web pages of other sites.

Any page that an operator visits can send requests to loopback, with the password that the browser remembers. Three
things of Flower are changed here, and nothing else: it answers only to its own host names, only its own pages change
anything, and no other page reads its answers or shows it in a frame.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from flower import command, urls
from flower.app import Flower
from tornado.httpserver import HTTPServer
from tornado.options import options
from tornado.web import ErrorHandler, OutputTransform

from worker.app import app
from worker.config import load_settings
from worker.hosts import Hosts, refusal
from worker.listening import INHERITED, listen

if TYPE_CHECKING:
    from tornado.httputil import HTTPHeaders, HTTPServerRequest

#: Methods that change nothing; the browser hides the answers from pages of other sites.
_READING: Final = {"GET", "HEAD"}
_CROSS_SITE: Final = "Flower accepts this from its own pages and from programs, not from pages of other sites."


class ProtectedFlower(Flower):  # type: ignore[misc]  # Flower has no types
    """Flower's application behind our checks."""

    def __init__(self, hosts: Hosts, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._hosts = hosts
        self.add_transform(_ResponseHeaders)

    def start_http_server(self) -> int | None:
        """Listen as Flower does, or on the socket that `tokentrail up` passes on; returns the port."""
        if INHERITED not in os.environ:
            port: int | None = super().start_http_server()
            return port
        listener = listen(options.address, options.port)
        listener.setblocking(False)
        HTTPServer(self, ssl_options=self.ssl_options, xheaders=options.xheaders).add_socket(listener)
        return int(listener.getsockname()[1])

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """The handler of a request: tornado calls this first."""
        if not self._hosts.accept(request.host):
            return self._refuse(request, HTTPStatus.MISDIRECTED_REQUEST, refusal(request.host))
        if _may_change_something(request) and _is_cross_site(request):
            return self._refuse(request, HTTPStatus.FORBIDDEN, _CROSS_SITE)
        return super().find_handler(request, **kwargs)

    def _refuse(self, request: HTTPServerRequest, status: HTTPStatus, sentence: str) -> Any:
        return self.get_handler_delegate(request, _Refusal, {"status_code": int(status), "sentence": sentence})


class _Refusal(ErrorHandler):
    def initialize(self, status_code: int, sentence: str) -> None:  # type: ignore[override]
        super().initialize(status_code)
        self._sentence = sentence

    def write_error(self, status_code: int, **_: Any) -> None:  # noqa: ARG002 - as tornado calls it
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{self._sentence}\n")


class _ResponseHeaders(OutputTransform):
    """Keep pages of other sites from reading answers, which Flower permits if its API needs no password, and from
    showing Flower in a frame, where an operator might click without knowing (clickjacking).
    """

    def transform_first_chunk(
        self,
        status_code: int,
        headers: HTTPHeaders,
        chunk: bytes,
        finishing: bool,  # noqa: ARG002 - as tornado calls it
    ) -> tuple[int, HTTPHeaders, bytes]:
        for name in [name for name in headers if name.lower().startswith("access-control-")]:
            del headers[name]
        headers["X-Frame-Options"] = "DENY"
        return status_code, headers, chunk


def _may_change_something(request: HTTPServerRequest) -> bool:
    """A websocket starts with a GET, and browsers send that without asking for permission."""
    return request.method not in _READING or "Upgrade" in request.headers


def _is_cross_site(request: HTTPServerRequest) -> bool:
    """Whether a browser sends this for a page of another site. Programs send neither of these headers."""
    if site := request.headers.get("Sec-Fetch-Site"):
        return site not in {"same-origin", "none"}
    origin = request.headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc.lower() != request.host.lower()


def main() -> None:
    """What `celery -A worker.app flower` does, with ProtectedFlower as the application."""
    command.apply_env_options()
    command.apply_options("flower", sys.argv[1:])
    command.extract_settings()
    command.setup_logging()
    hosts = Hosts([*load_settings().host_names(), *filter(None, [options.address])])
    server = ProtectedFlower(hosts, capp=app, options=options, **urls.settings)
    atexit.register(server.stop)
    signal.signal(signal.SIGTERM, command.sigterm_handler)
    command.print_banner(app, "ssl_options" in urls.settings, server.start_http_server())
    with contextlib.suppress(SystemExit):  # by SIGTERM
        server.start()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
