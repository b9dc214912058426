"""A command imports only what it needs, so that it answers at once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from worker.cli import COMMANDS, load
from worker.config import ROOT

#: Of no use to a command that neither serves nor migrates.
HEAVY = {"alembic", "celery", "fastapi", "flower", "kombu", "sqlalchemy", "starlette", "uvicorn"}

PROGRAM = """
import atexit, sys
atexit.register(lambda: print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr))
from worker.cli import main
main()
"""


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        (("--version",), {"psycopg", "redis", "rich", "structlog"}),
        (("--help",), {"psycopg", "redis", "structlog"}),
        (("settings",), {"psycopg", "redis", "structlog"}),
        (("history", "ann"), {"redis", "psycopg_pool", "structlog"}),
        (("receipt", "ann", "k"), {"redis", "psycopg_pool", "structlog"}),
        (
            ("publish", "--type", "accrual", "--user", "ann", "--amount", "1", "--source", "shop"),
            {"psycopg", "structlog"},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_command_imports_only_what_it_needs(database_url, broker_url, command, unneeded):
    servers = {
        "history": {"DATABASE_URL": database_url},
        "receipt": {"DATABASE_URL": database_url},
        "publish": {"BROKER_URL": broker_url},
    }
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command],
        cwd=ROOT,
        env=os.environ | servers.get(command[0], {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(process.stderr.split()) & (HEAVY | unneeded) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_in_the_list_of_commands_is_the_commands_own(name):
    command = load(name)
    assert " ".join(command.help.split("\n\n")[0].split()).startswith(COMMANDS[name])
