"""What operators tell a worker while it runs (`celery inspect`, Flower's buttons), and what is no such thing.

Between `consumer.py` and Celery's mailbox. Whoever can write to Redis can PUBLISH anything to the mailbox too.
What is no message is dropped by `transport.py`; what is one, but no command, is dropped here, with a line in the log.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any, Final

import structlog

from schema.text import ascii_line

control: Any = import_module("celery.worker.consumer.control")
pidbox: Any = import_module("celery.worker.pidbox")

log = structlog.get_logger(__name__)

#: A logical clock beyond this is nobody's; ours would run ahead of it for ever.
_LATEST: Final = 1 << 53


class Mailbox(pidbox.Pidbox):
    """Celery's mailbox, which answers what it cannot carry out with a line instead of a new connection."""

    def start(self, c: Any) -> None:
        """Listen."""
        super().start(c)
        self.consumer.on_decode_error = self._dropped

    def on_message(self, body: Any, message: Any) -> None:
        """Carry a command out. Raises what the connection to Redis raises, and SystemExit, which is how one stops."""
        clock = message.headers.get("clock")
        if clock is not None and not (type(clock) is int and 0 <= clock <= _LATEST):
            del message.headers["clock"]
        self._forward_clock()
        try:
            self.node.handle_message(body, message)
        except KeyError as error:  # which kombu counts among Redis' connection errors: a reply_to without its exchange
            self._dropped(message, error)
        except self.c.connection_errors:
            raise
        except Exception as error:  # noqa: BLE001 - commands of any shape arrive here
            self._dropped(message, error)

    def _dropped(self, message: Any, error: Exception) -> None:  # noqa: ARG002
        reason = f"{type(error).__name__}: {ascii_line(str(error), 200)}"
        log.warning("remote control command dropped", reason=reason)


class Control(control.Control):
    """The part of Celery's consumer that listens to operators, with our mailbox."""

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self.box = Mailbox(consumer)
        self.start, self.stop, self.shutdown = self.box.start, self.box.stop, self.box.shutdown


def _in_one_line(record: logging.LogRecord) -> bool:
    """A line of kombu's about a command or broadcast that fails, with the reason instead of a traceback."""
    if record.exc_info and (record.name == "kombu.pidbox" or "Cannot process event" in str(record.msg)):
        error = record.exc_info[1]
        record.msg = f"{ascii_line(record.getMessage(), 300)}: {type(error).__name__}: {ascii_line(str(error), 200)}"
        record.args, record.exc_info = (), None
    return True


for name in ("kombu.pidbox", "kombu.transport.redis"):
    logging.getLogger(name).addFilter(_in_one_line)
