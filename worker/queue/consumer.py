"""The one door through which every message comes, so that none is dropped.

Celery's own consumer drops messages for unknown tasks, bodies that it cannot decode, and what has no task at all, and
leaves a line in the log. Here all of them reach `Batcher.receive`, and end as an outcome or a dead letter.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from celery.worker import consumer

_Blueprint: Any = consumer.Consumer.Blueprint


class Consumer(consumer.Consumer):
    """Celery's consumer with one handler for every message."""

    batcher: Any  # set by worker.queue.batcher.Batching

    class Blueprint(_Blueprint):
        """Celery's steps, with a mailbox of our own."""

        default_steps: ClassVar = [
            "worker.queue.control:Control" if step == "celery.worker.consumer.control:Control" else step
            for step in _Blueprint.default_steps
        ]

    def stop(self) -> None:
        """End, with nothing left in hand. Between two connections Celery stops no step, and the ledger's thread would
        go on waiting for a database that is away, and the process with it.
        """
        super().stop()
        self.batcher.drain()

    def create_task_handler(self, promise: Any = None) -> Callable[[Any], None]:  # noqa: ARG002
        """What the event loop calls for each message."""
        handler: Callable[[Any], None] = self.batcher.receive
        return handler

    def on_decode_error(self, message: Any, exc: Exception) -> None:  # noqa: ARG002
        """A message whose body kombu could not unpack is taken in like any other."""
        self.batcher.receive(message)
