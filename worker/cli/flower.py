"""`tokentrail flower`: Flower, which shows operators every message and worker."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Final

import typer

from worker.cli.usage import UsageError
from worker.config import HOME, ROOT, load_settings
from worker.listening import INHERITED, listen

#: The columns of Flower's list of tasks, with the outcome of each.
_COLUMNS: Final = "name,state,kwargs,result,received,runtime,worker,uuid"
_PORTS: Final = range(1, 65_536)


def flower(
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- OPTION", help="Flower's own options, such as --max-tasks=50000; files by full path."
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on (FLOWER_ADDRESS). Default: 127.0.0.1.", show_default=False)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=_PORTS[0], max=_PORTS[-1], help="Port to listen on (FLOWER_PORT, else TOKENTRAIL_FLOWER_PORT)."
        ),
    ] = None,
) -> None:
    """Serve Flower, in which operators see each event and each worker, until SIGINT or SIGTERM.

    Flower reads its own variables too, such as FLOWER_BASIC_AUTH.
    """
    settings = load_settings()
    settings.broker()  # raises without one
    options = options or []
    host = host or os.environ.get("FLOWER_ADDRESS") or "127.0.0.1"
    port = port or _flower_port() or settings.flower_port
    _check(options)
    if not (_uses_unix_socket(options) or INHERITED in os.environ):
        listen(host, port).close()  # Flower would end in a traceback
    command = [sys.executable, "-m", "worker.flower_server", *options, f"--address={host}", f"--port={port}"]
    # Celery finds its settings in ROOT, where a relative TOKENTRAIL_HOME would be another folder.
    environment = {"FLOWER_TASKS_COLUMNS": _COLUMNS, **os.environ, "TOKENTRAIL_HOME": str(HOME.absolute())}
    os.chdir(ROOT)
    os.execve(command[0], command, environment)  # noqa: S606 - our own interpreter


def _check(options: list[str]) -> None:
    """Raise UsageError for options and variables that would end Flower in a traceback."""
    from flower import command  # noqa: PLC0415 - no other command needs a web server
    from tornado import options as tornado  # noqa: PLC0415

    for option in options:
        if not option.startswith("--") or not command.is_flower_option(option):
            raise UsageError(f"{option} is no option of Flower: see `tokentrail flower -- --help`.")
        if option.partition("=")[0] in {"--address", "--port"}:
            raise UsageError(f"{option} after the --: use --host and --port before it.")
    try:
        command.apply_env_options()
    except Exception as error:
        raise UsageError(f"Flower cannot use one of its FLOWER_ variables ({error}): fix or unset it.") from error
    try:
        tornado.parse_command_line(["flower", *options])
    except Exception as error:
        raise UsageError(f"Flower cannot use its options ({error}): see `tokentrail flower -- --help`.") from error


def _flower_port() -> int | None:
    if not (value := os.environ.get("FLOWER_PORT")):
        return None
    if not value.isdecimal() or int(value) not in _PORTS:
        raise UsageError(f"FLOWER_PORT is not usable: must be {_PORTS[0]} to {_PORTS[-1]} (it is {value!r}).")
    return int(value)


def _uses_unix_socket(options: list[str]) -> bool:
    """Whether Flower listens on a socket in the file system instead of a port."""
    is_option = any(option.replace("-", "_").startswith("__unix_socket=") for option in options)
    return is_option or bool(os.environ.get("FLOWER_UNIX_SOCKET"))
