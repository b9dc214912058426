"""The table of log lines in docs/operating.md lists each warning and error, and nothing else.

Tracebacks show no variables: one may hold a password.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEVELS = {"warning": "warning", "error": "error", "exception": "error", "critical": "critical"}


def in_code():
    """Each event with its level; text that varies is …"""
    for top in ("worker", "schema"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(ast.Attribute(ast.Name("log" | "logger"), level), [text, *_]) if level in LEVELS:
                        assert isinstance(text, ast.Constant), f"{path}:{node.lineno} logs a variable text"
                        yield re.sub(r"%[sdr]", "…", text.value), LEVELS[level]


def in_the_table():
    levels = "|".join(sorted({*LEVELS.values()}))
    text = (ROOT / "docs" / "operating.md").read_text()
    return re.findall(rf"^\| `([^`]+)` \| ({levels}) \| \S", text, re.MULTILINE)


def test_each_warning_and_error_is_words():
    events = [event for event, _ in in_code()]
    assert len(events) > 20
    assert [event for event in events if len(event.split()) < 4 or "_" in event] == []


def test_the_table_lists_each_warning_and_error_and_nothing_else():
    assert sorted(in_the_table()) == sorted({*in_code()})


FAILING = """
import logging, os, sys
from worker import log
from worker.config import load_settings

def fail():
    database_url = os.environ["DATABASE_URL"]
    raise RuntimeError("a bug")
"""

#: Each ends in an exception that nobody expects, with the password in a variable.
PROGRAMS = {
    "the command line": (
        "from worker.cli import main, settings\nsettings.load_settings = fail\nsys.argv[1:] = ['settings']\nmain()"
    ),
    "a worker": (
        "log.set_up(load_settings())\ntry:\n    fail()\nexcept RuntimeError:\n"
        "    logging.getLogger('celery.worker').exception('Unrecoverable error')"
    ),
    "the API": (
        "import threading, urllib.error, urllib.request, uvicorn\n"
        "from worker.listening import listen\n"
        "from worker.read.api import create_app\n"
        "log.set_up(load_settings())\n"
        "app = create_app(load_settings())\n"
        "app.get('/fail')(fail)\n"
        "server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan='on'))\n"
        "line = listen('127.0.0.1', 0)\n"
        "thread = threading.Thread(target=server.run, kwargs={'sockets': [line]})\n"
        "thread.start()\n"
        "opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))\n"
        "try:\n    opener.open(f'http://127.0.0.1:{line.getsockname()[1]}/fail', timeout=10)\n"
        "except urllib.error.HTTPError as error:\n    print(error.code, error.read())\n"
        "server.should_exit = True\nthread.join()"
    ),
}


@pytest.mark.parametrize("form", ["console", "json"])
@pytest.mark.parametrize("what", PROGRAMS)
def test_traceback_shows_no_variables(what, form):
    environment = {
        **os.environ,
        "DATABASE_URL": "postgresql://u:hush@127.0.0.1:1/d",
        "BROKER_URL": "redis://:hush@127.0.0.1:1/0",
        "TOKENTRAIL_LOG_FORMAT": form,
    }
    program = FAILING + PROGRAMS[what]
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" in process.stderr
    assert "a bug" in process.stderr
    assert "hush" not in process.stdout + process.stderr
