"""`tokentrail api`: the read endpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from worker.config import settings
from worker.readiness import NotReady


def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on (TOKENTRAIL_API_HOST).")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Port to listen on (TOKENTRAIL_API_PORT).")
    ] = None,
) -> None:
    """Serve the transaction history over HTTP until SIGINT or SIGTERM."""
    # Imported here: no other command shall wait for a web framework.
    from worker import log  # noqa: PLC0415
    from worker.listening import CannotListen  # noqa: PLC0415
    from worker.read.api import serve  # noqa: PLC0415

    found = settings()
    log.set_up(found)
    try:
        serve(found, host or found.api_host, port or found.api_port)
    except CannotListen as error:
        raise NotReady(str(error)) from error
