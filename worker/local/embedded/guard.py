"""The process between a program and its embedded servers: whoever is killed, nothing is left running.

    program ──(a pipe that nobody writes to)──► guard ──(PR_SET_PDEATHSIG)──► PostgreSQL, Valkey

The program dies: the pipe closes, or, should a child of the program hold it open, our parent changes.
The guard dies: the kernel tells the servers (Linux; elsewhere only the first half holds).
One of the servers dies: the other is stopped and the program is told when it asks.
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
from worker.files import Untrusted
from worker.local.embedded.postgres import PostgresServer
from worker.local.embedded.process import EmbeddedError
from worker.local.embedded.unprivileged import discard
from worker.local.embedded.valkey import ValkeyServer


def guard(folder: Path, program: int, *, durable: bool, throw_away: bool) -> None:
    """Run a pair in `folder` for as long as the process `program`, our parent, wants it.

    Tells on standard output, in one line of JSON each, how to reach the pair and what went wrong.
    """
    postgres = PostgresServer(folder, durable=durable, owner=program)
    valkey = ValkeyServer(folder, durable=durable, owner=program)
    failed = True  # as it also has when what follows ends in something that nobody expected
    try:
        for server in (postgres, valkey):
            server.launch()
        for server in (postgres, valkey):
            server.wait_until_ready()
        pids = [os.getpid(), postgres.pid, valkey.pid]
        _tell({"database_url": postgres.url, "broker_url": valkey.url, "pids": pids})
        _watch(program, [postgres, valkey])
        failed = False
    except (ConfigError, EmbeddedError, Untrusted) as error:
        _tell({"error": str(error)})
    except OSError as error:  # of the machine: what helps is said where the same is said of other commands
        _tell({"error": str(error), "errno": error.errno, "path": error.filename or str(folder)})
    finally:
        valkey.stop()
        postgres.stop()
        if throw_away:
            discard(folder, except_logs=failed)  # they are what is pointed to then


def _watch(program: int, servers: list[PostgresServer | ValkeyServer]) -> None:
    while os.getppid() == program and not select.select([sys.stdin], [], [], 0.5)[0]:
        for server in servers:
            if not server.running:
                raise server.ended_by_itself()


def _tell(what: dict[str, object]) -> None:
    try:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # nobody is left to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(*_: object) -> NoReturn:
    raise SystemExit(1)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m worker.local.embedded.guard", description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("program", type=int)
    arguments.add_argument("--durable", action="store_true")
    arguments.add_argument("--throw-away", action="store_true")
    given = arguments.parse_args()
    signal.signal(signal.SIGTERM, _leave)  # so that the servers are stopped, also where the kernel would not
    guard(given.folder, given.program, durable=given.durable, throw_away=given.throw_away)


if __name__ == "__main__":
    main()
