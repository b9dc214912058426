"""The Celery application: `celery -A worker.app worker`, and what Flower and `celery inspect` load."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from typing import Any
from urllib.parse import parse_qsl

from celery import Celery
from celery.exceptions import CPendingDeprecationWarning
from celery.signals import celeryd_init, setup_logging

from schema.messages import ACCRUE, APPLY_MANY, BURN
from worker import log
from worker.config import ConfigError, settings
from worker.ledger.deliveries import Origin
from worker.ledger.settle import Ledger
from worker.queue.batcher import Batching
from worker.queue.parsing import read_work
from worker.transport import channel as transport


def _address(url: str) -> tuple[str, dict[str, str]]:
    """A broker's URL as kombu takes it: what a sentinel:// URL says behind ? becomes options of its transport."""
    if not url.startswith("sentinel://"):
        return url, {}
    hosts, _, query = url.partition("?")
    return hosts, dict(parse_qsl(query))


try:
    BROKER_URL, BROKER_OPTIONS = _address(settings().broker())
except ConfigError as unusable:
    # Celery, which loads us, shows the traceback of whatever else is raised.
    sys.stderr.write(f"tokentrail: {unusable}\n")
    raise SystemExit(2) from None
# Celery's command line copies BROKER_URL here, as it is, and believes it more than the settings below.
os.environ.pop("CELERY_BROKER_URL", None)

app = Celery("tokentrail")
app.config_from_object("celeryconfig")
app.conf.update(
    broker_url=BROKER_URL,
    task_default_queue=settings().queue,
    broker_transport_options={
        # Redelivery after a worker's death; the living refresh their claim three times as often.
        "visibility_timeout": settings().visibility_timeout,
        # Look for the dead every 5 s, or twice in a shorter timeout; stock looks every 100 s.
        "unacked_restore_interval": min(5, settings().visibility_timeout / 2),
        "unacked_restore_throttle": 1,
        # Stock only: whoever is killed while it looks keeps the others from it for so long; 300 if not set.
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
app.steps["consumer"].add(Batching)


@celeryd_init.connect
def _use_our_transport(**_: Any) -> None:
    """In workers only: Flower reads queue lengths through the stock transport, on the same keys."""
    if settings().transport == "atomic":
        transport.register()


@celeryd_init.connect
def _collect_garbage_seldom(**_: Any) -> None:
    """Python's collector looks through all messages in hand again and again, and finds next to nothing: reference
    counts free them. At its usual pace, every 700 new objects, that takes a third of a worker's throughput.
    """
    gc.set_threshold(50_000, 20, 100)


@setup_logging.connect
def _log_our_way(**_: Any) -> None:
    """Celery's lines in the form of ours."""
    log.set_up(settings())


# It asks, at every lost connection, for a setting that celeryconfig.py gives a reason for.
warnings.filterwarnings("ignore", category=CPendingDeprecationWarning, module="celery.worker.consumer")


def _apply(task: str, kwargs: dict[str, Any]) -> str:
    """One call, decided at once and on its own. Workers do not come here: their Batcher decides many in one go."""
    work = read_work(task, (), kwargs, Origin(task=task), max_amount=settings().max_amount)
    ledger = Ledger(settings(), stripe=-1)
    try:
        outcomes = ledger.settle(work.deliveries, work.letters)
    finally:
        ledger.close()
    for place, outcome in zip(work.places, outcomes, strict=True):
        work.outcomes[place] = outcome
    return work.summary()[1]


@app.task(name=ACCRUE)
def accrue(**event: Any) -> str:
    """Fund the account of `user_id` with `amount` tokens."""
    return _apply(ACCRUE, event)


@app.task(name=BURN)
def burn(**event: Any) -> str:
    """Spend `amount` tokens of `user_id`, if the account holds them."""
    return _apply(BURN, event)


@app.task(name=APPLY_MANY)
def apply_many(events: list[dict[str, Any]]) -> str:
    """Apply 1 to 1,000 events in their order; each has its own outcome."""
    return _apply(APPLY_MANY, {"events": events})
