"""All hooks into Celery's worker, so that every message reaches the batcher.

Celery's consumer hands each message to the strategy of its task, which puts a request into a pool. On the way it drops
what it cannot handle (an unknown task, a body it cannot decode, no task at all) with a line in the log. So tokentrail
replaces three parts, and starts from one setting, `worker_consumer` in celeryconfig.py, which names `Consumer`:

* `Consumer.create_task_handler` and `on_decode_error` give each message to `Batcher.receive`; strategies and pool are
  never used, and the tasks that worker/app.py registers exist for their names only.
* `Consumer.Blueprint` lists the steps that Celery starts with each connection: `Control` replaces Celery's step of that
  name, to survive broadcasts that are no commands; `Batching` is added behind the step that consumes the queues.
* `Consumer.stop` drains the batcher even when Celery stops between two connections, where it stops no step.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar, Final

import structlog
from celery import bootsteps
from celery.worker import consumer as celery_consumer
from celery.worker import state
from kombu.message import Message

from schema.text import ascii_line
from worker.config import load_settings
from worker.queue.batcher import Batcher
from worker.queue.broker import AtomicBroker, StockBroker
from worker.queue.intake import Intake
from worker.queue.parking import POLL_SECONDS

celery_control: Any = import_module("celery.worker.consumer.control")
celery_pidbox: Any = import_module("celery.worker.pidbox")
_Blueprint: Any = celery_consumer.Consumer.Blueprint

log = structlog.get_logger(__name__)

#: Logical clocks of commands beyond this are nonsense; Celery's own clock would stay ahead of all others for ever.
MAX_CLOCK: Final = 1 << 53


class Consumer(celery_consumer.Consumer):
    """Celery's consumer with one handler for every message."""

    batcher: Batcher  # set by Batching

    class Blueprint(_Blueprint):
        """Celery's steps, with `Control` replaced and `Batching` added."""

        default_steps: ClassVar = [
            *(step for step in _Blueprint.default_steps if step != "celery.worker.consumer.control:Control"),
            "worker.queue.consumer:Control",
            "worker.queue.consumer:Batching",
        ]

    def create_task_handler(self, promise: Any = None) -> Callable[[Message], None]:  # noqa: ARG002
        """What the event loop calls with each message."""
        return self.batcher.receive

    def on_decode_error(self, message: Message, exc: Exception) -> None:  # noqa: ARG002
        """What kombu calls with a message whose body it cannot unpack."""
        self.batcher.receive(message)

    def stop(self) -> None:
        """Stop with nothing in flight, also while there is no connection."""
        super().stop()
        self.batcher.drain()


class Batching(bootsteps.StartStopStep):
    """Starts the batcher with each connection, and drains it when the worker stops."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        settings = load_settings()
        self._intake = Intake(settings, consumer.hostname)
        broker = AtomicBroker() if settings.transport == "atomic" else StockBroker()
        self._batcher = consumer.batcher = Batcher(settings, self._intake, broker)
        self._ticks: Any = None

    def start(self, consumer: Any) -> None:
        self._intake.attach(consumer.app, consumer.connection_errors, consumer.event_dispatcher)
        self._batcher.attach(consumer.task_consumer.channel)
        consumer.hub.add_reader(self._batcher.wakeup, self._batcher.advance)
        if self._ticks is not None:
            self._ticks.cancel()
        self._ticks = consumer.hub.call_repeatedly(POLL_SECONDS, self._batcher.on_tick)

    def stop(self, consumer: Any) -> None:  # noqa: ARG002
        if state.should_stop is not None or state.should_terminate is not None:
            self._batcher.drain()

    def terminate(self, consumer: Any) -> None:
        self.stop(consumer)


class Mailbox(celery_pidbox.Pidbox):
    """Celery's mailbox for remote control commands (`celery inspect`, Flower's buttons). Anybody who can write to Redis
    can publish to it: a message that is no command is dropped with a line in the log, where Celery would reconnect.
    """

    def start(self, c: Any) -> None:
        super().start(c)
        self.consumer.on_decode_error = self._drop

    def on_message(self, body: Any, message: Any) -> None:
        """Execute a command. Raises connection errors, and SystemExit, which is how a command stops the worker."""
        clock = message.headers.get("clock")
        if clock is not None and not (type(clock) is int and 0 <= clock <= MAX_CLOCK):
            del message.headers["clock"]
        self._forward_clock()
        try:
            self.node.handle_message(body, message)
        except KeyError as error:  # kombu counts it among Redis' connection errors; it is a reply_to without exchange
            self._drop(message, error)
        except self.c.connection_errors:
            raise
        except Exception as error:  # noqa: BLE001 - commands of any shape arrive here
            self._drop(message, error)

    def _drop(self, message: Any, error: Exception) -> None:  # noqa: ARG002
        reason = f"{type(error).__name__}: {ascii_line(str(error), 200)}"
        log.warning("remote control command dropped", reason=reason)


class Control(celery_control.Control):
    """Celery's step that listens for remote control commands, with our mailbox."""

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self.box = Mailbox(consumer)
        self.start, self.stop, self.shutdown = self.box.start, self.box.stop, self.box.shutdown
        for name in ("kombu.pidbox", "kombu.transport.redis"):
            logging.getLogger(name).addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    """Show the reason instead of a traceback in kombu's lines about commands and broadcasts that fail."""
    if record.exc_info and (record.name == "kombu.pidbox" or "Cannot process event" in str(record.msg)):
        error = record.exc_info[1]
        record.msg = f"{ascii_line(record.getMessage(), 300)}: {type(error).__name__}: {ascii_line(str(error), 200)}"
        record.args, record.exc_info = (), None
    return True
