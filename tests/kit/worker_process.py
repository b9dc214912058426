"""What a worker of the tests runs: `celery` with the arguments of `tokentrail worker`, in a forked process.

The process that it is forked from has imported all that a worker needs but worker.app, which reads the settings when it
is imported.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING

from celery.__main__ import main
from celery.events.dispatcher import EventDispatcher

from worker.config import ROOT
from worker.ledger.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

#: What the process that workers are forked from imports.
PRELOADED = (
    "pytest",
    "celery.bin.worker",
    "celery.concurrency.thread",
    "celery.worker.components",
    "celery.worker.consumer",
    "celery.worker.pidbox",
    "kombu.transport.redis",
    "psycopg",
    "worker.queue.batcher",
    "worker.queue.consumer",
    "worker.transport.channel",
)

PR_SET_PDEATHSIG = 1


def run(arguments: Sequence[str], environment: dict[str, str], log: str, poison: str, quit_at: str) -> None:
    """Be a Celery worker until a signal ends it.

    With `poison`, the process kills itself whenever the ledger is about to decide the event with that key, as if the
    event crashed the interpreter. With `quit_at`, it gets a SIGQUIT right after the first task event of that type.
    """
    if sys.platform == "linux":  # no worker outlives tests that are killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    if poison:
        _make_deadly(poison)
    if quit_at:
        _quit_at(quit_at)
    os.chdir(ROOT)
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
    sys.argv = list(arguments)
    sys.exit(main())


def _make_deadly(key: str) -> None:
    attempt = Session.attempt

    def deadly(session, deliveries, letters):
        if any(delivery.event.idempotency_key == key for delivery in deliveries):
            os.kill(os.getpid(), signal.SIGKILL)
        return attempt(session, deliveries, letters)

    Session.attempt = deadly


def _quit_at(kind: str) -> None:
    send = EventDispatcher.send

    def sending(dispatcher, type, *args, **fields):  # noqa: A002 - Celery's name
        send(dispatcher, type, *args, **fields)
        if type == kind:
            EventDispatcher.send = send
            signal.raise_signal(signal.SIGQUIT)

    EventDispatcher.send = sending
