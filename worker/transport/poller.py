"""kombu's poller, which asks its channels for messages once per turn of Celery's event loop, or of `drain_events`.

Ours sends pending operations before each fetch, heartbeats in between, and polls the lists of idle channels.
"""

# mypy: disallow-subclassing-any=False
# ruff: noqa: SLF001 - kombu's stubs leave out most of what a transport needs

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from importlib import import_module
from queue import Empty
from typing import Any

from redis import exceptions

stock: Any = import_module("kombu.transport.redis")

logger = logging.getLogger(__name__)


class Poller(stock.MultiChannelPoller):
    """kombu's poller for channels that fetch."""

    _timers: tuple[Any, ...] = ()

    def on_poll_init(self, poller: Any) -> None:
        """Restore messages when an event loop begins; a refusal is logged and tried again later.

        Raised from here, before Celery has a reference to the connection, a refusal would leave its sockets open at
        each retry. A Redis that accepts clients and refuses writes (after a failover, say) would run out of connections
        within minutes.
        """
        self._or_later(partial(super().on_poll_init, poller))

    def on_poll_start(self) -> None:
        """Send pending operations, then fetch. Called before each wait. Raises if the connection is lost."""
        for channel in list(self._channels):
            try:
                channel.flush_pending()
            except exceptions.ResponseError as error:
                channel.fetcher.refused(error)  # the operations are kept, and sent at the next turn
        super().on_poll_start()

    def on_readable(self, fileno: int) -> Any:
        """Read the reply to a fetch even if prefetch is used up: its messages are in flight and need heartbeats."""
        channel, kind = self._fd_to_chan.get(fileno, (None, None))
        if channel is not None and kind == "BRPOP" and channel._in_poll:
            return channel.handlers[kind]()
        return super().on_readable(fileno)

    def _update_brpop_polling(self) -> None:
        """Do nothing: kombu would stop reading a reply while prefetch is used up."""

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        """One turn without an event loop, short enough to poll all lists, and to notice a channel that resumes."""
        self.heartbeat_if_due()
        shortest = min((channel.poll_interval for channel in self._channels), default=1.0)
        try:
            return super().get(callback, shortest if timeout is None else min(timeout, shortest))
        except Empty:
            if not self.poll_lists():
                self.maybe_restore_messages()
                raise

    def poll_lists(self) -> bool:
        """Poll the lists of idle channels; whether there were messages. Raises if a connection is lost."""
        polled = [channel.poll_lists() for channel in list(self._channels)]  # of all channels, not up to the first
        return any(polled)

    def maybe_restore_messages(self) -> None:
        """Restore messages if it is time; a refusal is logged and tried again later."""
        self._or_later(super().maybe_restore_messages)

    def heartbeat_if_due(self) -> None:
        """Send the heartbeats of all channels if it is time; a refusal is logged and tried again later."""
        for channel in list(self._channels):
            if channel._qos is not None:
                self._or_later(channel.qos.heartbeat_if_due)

    def set_timers(self, loop: Any, *, heartbeat_interval: float, poll_interval: float) -> None:
        """Let an event loop send heartbeats and poll lists at these intervals in seconds, in place of earlier ones."""
        for timer in self._timers:
            timer.cancel()
        self._timers = (
            loop.call_repeatedly(heartbeat_interval, self.heartbeat_if_due),
            loop.call_repeatedly(poll_interval, self.poll_lists),
        )

    def _or_later(self, call: Callable[[], object]) -> None:
        try:
            call()
        except exceptions.ResponseError as error:
            logger.warning("Redis refuses heartbeats or restores; retrying: %s", error)
        except (exceptions.RedisError, OSError) as error:
            # The event loop notices by itself, and reconnects.
            logger.debug("No connection for heartbeats or restores: %r", error)
