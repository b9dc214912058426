"""The Celery application: `celery -A worker.app worker`, and what Flower and `celery inspect` load."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from typing import Any, Final, NoReturn
from urllib.parse import parse_qsl

from celery import Celery
from celery.exceptions import CPendingDeprecationWarning
from celery.signals import celeryd_init, setup_logging

from schema.messages import ACCRUE, APPLY_MANY, BURN
from worker import log, transport
from worker.config import ConfigError, load_settings

#: Messages that a worker may have in flight, if two batches are not more.
MIN_PREFETCH: Final = 1000


def _split(url: str) -> tuple[str, dict[str, str]]:
    """A broker's URL as kombu takes it: the query of a sentinel:// URL becomes options of the transport."""
    if not url.startswith("sentinel://"):
        return url, {}
    hosts, _, query = url.partition("?")
    return hosts, dict(parse_qsl(query))


try:
    settings = load_settings()
    BROKER_URL, BROKER_OPTIONS = _split(settings.broker())
except ConfigError as error:
    # Celery, which imports this module, shows the traceback of any other exception.
    sys.stderr.write(f"tokentrail: {error}\n")
    raise SystemExit(2) from None
# Celery's command line copies BROKER_URL here unchanged, and prefers it to the settings below.
os.environ.pop("CELERY_BROKER_URL", None)

app = Celery("tokentrail")
app.config_from_object("celeryconfig")
app.conf.update(
    broker_url=BROKER_URL,
    task_default_queue=settings.queue,
    # Two batches: one that PostgreSQL commits, and one that is read meanwhile. (Celery multiplies by concurrency, 1.)
    worker_prefetch_multiplier=max(2 * settings.batch_size, MIN_PREFETCH),
    broker_transport_options={
        # Seconds after which other workers restore a message; its worker refreshes it three times as often.
        "visibility_timeout": settings.visibility_timeout,
        # Seconds between two checks for messages to restore; kombu's default is 100.
        "unacked_restore_interval": min(5, settings.visibility_timeout / 2),
        "unacked_restore_throttle": 1,
        # kombu's transport only: seconds that a worker killed during that check keeps others from it; 300 by default.
        "unacked_mutex_expire": 30,
        # Notice a connection that has gone silent.
        "health_check_interval": 10,
        "socket_timeout": 15,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "retry_on_timeout": False,
        **BROKER_OPTIONS,
    },
)


@celeryd_init.connect
def _register_transport(**_: Any) -> None:
    """In workers only: Flower reads queue lengths through kombu's transport, from the same keys."""
    if settings.transport == "atomic":
        transport.register()


@celeryd_init.connect
def _collect_garbage_rarely(**_: Any) -> None:
    """Python's collector visits all messages in flight again and again and frees next to nothing, since reference
    counts free them. At its default pace, every 700 new objects, it takes a third of a worker's throughput.
    """
    gc.set_threshold(50_000, 20, 100)


@setup_logging.connect
def _configure_logging(**_: Any) -> None:
    """Give Celery's log lines tokentrail's format."""
    log.set_up(settings)


# Celery warns at every lost connection that it misses a setting which celeryconfig.py sets.
warnings.filterwarnings("ignore", category=CPendingDeprecationWarning, module="celery.worker.consumer")


def _refuse(*_: Any, **__: Any) -> NoReturn:
    """Stands for every task. Flower, `celery inspect` and Celery's requests need the names; no worker runs a body."""
    raise NotImplementedError("Events are decided in batches; see worker.queue.batcher.Batcher.")


for name in (ACCRUE, BURN, APPLY_MANY):
    app.task(name=name)(_refuse)
