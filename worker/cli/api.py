"""`tokentrail api`: the HTTP API."""

from __future__ import annotations

from typing import Annotated

import typer

from worker import log
from worker.config import load_settings
from worker.read.api import serve


def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on (TOKENTRAIL_API_HOST).")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Port to listen on (TOKENTRAIL_API_PORT).")
    ] = None,
) -> None:
    """Serve the transaction history over HTTP until SIGINT or SIGTERM."""
    settings = load_settings()
    log.set_up(settings)
    serve(settings, host or settings.api_host, port or settings.api_port)
