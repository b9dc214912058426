"""`tokentrail flower`: the operators' window on every event."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Final

import typer

from worker.cli.usage import Misused
from worker.config import HOME, ROOT, settings
from worker.listening import CannotListen, listen
from worker.readiness import NotReady

#: Of its list of tasks: each with what became of it.
_COLUMNS: Final = "name,state,kwargs,result,received,runtime,worker,uuid"
_PORTS: Final = range(1, 65_536)


def flower(
    more: Annotated[
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

    All that Flower reads itself, FLOWER_BASIC_AUTH for one, is heeded.
    """
    found = settings()
    found.broker()
    host = host or os.environ.get("FLOWER_ADDRESS") or "127.0.0.1"
    port = port or _port_of_flower() or found.flower_port
    _read(more or [])
    if not _on_a_file(more or []):
        try:
            listen(host, port).close()
        except CannotListen as error:
            raise NotReady(str(error)) from error
    command = [sys.executable, "-m", "worker.window", *(more or ()), f"--address={host}", f"--port={port}"]
    # As a worker's: Celery finds its settings in ROOT.
    environment = {"FLOWER_TASKS_COLUMNS": _COLUMNS, **os.environ, "TOKENTRAIL_HOME": str(HOME.absolute())}
    os.chdir(ROOT)
    os.execve(command[0], command, environment)  # noqa: S606 - our own interpreter


def _read(more: list[str]) -> None:
    """Raise Misused unless Flower can read these options and its variables: it would end in a traceback."""
    # Imported here: no other command shall wait for a web server.
    from flower import command  # noqa: PLC0415
    from tornado import options  # noqa: PLC0415

    for option in more:
        if not option.startswith("--") or not command.is_flower_option(option):
            raise Misused(f"{option} is no option of Flower: see `tokentrail flower -- --help`.")
        if option.partition("=")[0] in {"--address", "--port"}:
            raise Misused(f"{option} behind the --: say --host and --port before it.")
    try:
        command.apply_env_options()
    except Exception as error:
        raise Misused(f"Flower cannot use one of its FLOWER_ variables ({error}): mend or unset it.") from error
    try:
        options.parse_command_line(["flower", *more])
    except Exception as error:
        raise Misused(f"Flower cannot use its options ({error}): see `tokentrail flower -- --help`.") from error


def _port_of_flower() -> int | None:
    if not (given := os.environ.get("FLOWER_PORT")):
        return None
    if not given.isdecimal() or int(given) not in _PORTS:
        raise Misused(f"FLOWER_PORT is not usable: must be {_PORTS[0]} to {_PORTS[-1]} (it is {given!r}).")
    return int(given)


def _on_a_file(more: list[str]) -> bool:
    """Whether Flower is to listen on a socket in the file system, and on no port."""
    named = any(option.replace("-", "_").startswith("__unix_socket=") for option in more)
    return named or bool(os.environ.get("FLOWER_UNIX_SOCKET"))
