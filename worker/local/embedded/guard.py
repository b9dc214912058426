"""The process between a program and its embedded servers: whichever of them is killed, nothing is left running.

    program ──(a pipe, never written to)──► guard ──(parent-death signal)──► PostgreSQL, Valkey

The program ends: the pipe closes or, if a child of the program keeps it open, the guard's parent process changes.
The guard ends: on Linux the kernel sends the servers a signal. A server ends: the guard stops the other and reports it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from pathlib import Path
from typing import NoReturn

from worker.config import ConfigError
from worker.files import UntrustedFileError
from worker.local.embedded.postgres import PostgresServer
from worker.local.embedded.process import EmbeddedError
from worker.local.embedded.unprivileged import discard
from worker.local.embedded.valkey import ValkeyServer


def guard(folder: Path, program: int, *, durable: bool, throw_away: bool) -> None:
    """Run both servers in `folder` until the process `program`, our parent, ends or closes the pipe.

    Prints one line of JSON when they are ready and one when something fails.
    """
    postgres = PostgresServer(folder, durable=durable, owner=program)
    valkey = ValkeyServer(folder, durable=durable, owner=program)
    failed = True  # until proven otherwise: unexpected exceptions count as failures
    try:
        for server in (postgres, valkey):
            server.launch()
        for server in (postgres, valkey):
            server.wait_until_ready()
        pids = [os.getpid(), postgres.pid, valkey.pid]
        _report({"database_url": postgres.url, "broker_url": valkey.url, "pids": pids})
        _watch(program, [postgres, valkey])
        failed = False
    except (ConfigError, EmbeddedError, UntrustedFileError) as error:
        _report({"error": str(error)})
    except OSError as error:  # the program raises it again, and says what it says of any OSError
        _report({"error": str(error), "errno": error.errno, "path": error.filename or str(folder)})
    finally:
        valkey.stop()
        postgres.stop()
        if throw_away:
            discard(folder, except_logs=failed)  # error messages name the logs


def _watch(program: int, servers: list[PostgresServer | ValkeyServer]) -> None:
    while os.getppid() == program and not select.select([sys.stdin], [], [], 0.5)[0]:
        for server in servers:
            if not server.running:
                raise server.unexpected_end()


def _report(message: dict[str, object]) -> None:
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the program has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit(*_: object) -> NoReturn:
    raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m worker.local.embedded.guard", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("program", type=int)
    parser.add_argument("--durable", action="store_true")
    parser.add_argument("--throw-away", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _exit)  # so that `finally` stops the servers, also where there is no death signal
    guard(arguments.folder, arguments.program, durable=arguments.durable, throw_away=arguments.throw_away)


if __name__ == "__main__":
    main()
