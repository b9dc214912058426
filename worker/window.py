"""`python -m worker.window`: Flower, the operators' window, closed to what other sites have a browser ask of it.

Any page that an operator visits can send requests to what listens on loopback, with the password that the browser
remembers for it. So three things of Flower's are changed here, and nothing else: by which names it may be asked,
that nothing but its own pages changes anything, and that no other page reads or frames it.
"""

from __future__ import annotations

import atexit
import contextlib
import signal
import sys
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from flower import command, urls
from flower.app import Flower
from tornado.options import options
from tornado.web import ErrorHandler, OutputTransform

from worker.app import app
from worker.config import settings
from worker.hosts import Hosts, refusal

if TYPE_CHECKING:
    from tornado.httputil import HTTPHeaders, HTTPServerRequest

#: What they ask for changes nothing, and without permission another site's page does not see the answer.
_READING: Final = {"GET", "HEAD"}
_FOREIGN: Final = "Flower takes this from its own pages and from programs, not from pages of other sites."


class Window(Flower):  # type: ignore[misc]  # Flower has no types
    """Flower's application behind our checks."""

    def __init__(self, hosts: Hosts, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._hosts = hosts
        self.add_transform(_Closed)

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        """Tornado asks for it before anything of a request is looked at."""
        if not self._hosts.accept(request.host):
            return self._refuse(request, HTTPStatus.MISDIRECTED_REQUEST, refusal(request.host))
        if _changes_something(request) and _is_foreign(request):
            return self._refuse(request, HTTPStatus.FORBIDDEN, _FOREIGN)
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


class _Closed(OutputTransform):
    """No page of another site reads an answer, which Flower allows them all where its API asks for no password,
    or shows our pages in its own, for someone to click in unawares.
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


def _changes_something(request: HTTPServerRequest) -> bool:
    """Or may: a websocket begins with a GET, and no browser asks for permission first."""
    return request.method not in _READING or "Upgrade" in request.headers


def _is_foreign(request: HTTPServerRequest) -> bool:
    """Whether a browser sends it for a page that is not ours. Programs say neither of the two headers."""
    if site := request.headers.get("Sec-Fetch-Site"):
        return site not in {"same-origin", "none"}
    origin = request.headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc.lower() != request.host.lower()


def main() -> None:
    """What `celery -A worker.app flower` does, with a Window instead of a Flower."""
    command.apply_env_options()
    command.apply_options("flower", sys.argv[1:])
    command.extract_settings()
    command.setup_logging()
    hosts = Hosts([*settings().host_names(), *filter(None, [options.address])])
    window = Window(hosts, capp=app, options=options, **urls.settings)
    atexit.register(window.stop)
    signal.signal(signal.SIGTERM, command.sigterm_handler)
    command.print_banner(app, "ssl_options" in urls.settings, window.start_http_server())
    with contextlib.suppress(SystemExit):  # by SIGTERM
        window.start()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
