"""When channels are asked: once per turn of Celery's loop, or of `drain_events` where there is no loop.

Below `transport.py`: kombu's poller, with acknowledgements before each fetch, and signs of life in between.
"""

# mypy: disallow-subclassing-any=False
# ruff: noqa: SLF001 - kombu's stubs leave out most of what a transport needs

from __future__ import annotations

import logging
from functools import partial
from queue import Empty
from typing import Any

from redis import exceptions

from worker.transport.scripts import stock

logger = logging.getLogger(__name__)

#: Seconds after which a channel is looked after even if nothing arrives.
LOOK_AFTER = 1.0


class Poller(stock.MultiChannelPoller):
    """kombu's poller for channels that fetch."""

    _timers: tuple[Any, ...] = ()

    def on_poll_init(self, poller: Any) -> None:
        """Begin with a loop; what Redis refuses to restore is tried again later.

        Raised from here, before Celery holds the connection, a refusal would leave its sockets open at every try: a
        Redis that lets clients in and refuses writes (a demoted one, say) would run out of connections within minutes.
        """
        self._unless_away(partial(super().on_poll_init, poller))

    def on_poll_start(self) -> None:
        """Before each wait: tell what is done, then ask for more. Raises when the connection is lost."""
        for channel in list(self._channels):
            try:
                channel.settle()
            except exceptions.ResponseError as error:
                channel._refused(error)  # the tags are kept, the next turn tries again
        super().on_poll_start()

    def on_readable(self, fileno: int) -> Any:
        """Read whatever was asked for, even without credit: it is recorded as ours, and ours to keep alive."""
        channel, kind = self._fd_to_chan.get(fileno, (None, None))
        if channel is not None and kind == "BRPOP" and channel._in_poll:
            return channel.handlers[kind]()
        return super().on_readable(fileno)

    def _update_brpop_polling(self) -> None:
        """Do not pause: kombu would stop reading a reply while there is no credit for it."""

    def get(self, callback: Any, timeout: float | None = None) -> Any:
        """One turn without a loop: short enough to look at all lists, and after a channel that rests or is paused."""
        self.maybe_touch()
        shortest = min((channel.look_interval for channel in self._channels), default=LOOK_AFTER)
        try:
            return super().get(callback, shortest if timeout is None else min(timeout, shortest))
        except Empty:
            if not self.look():
                self.maybe_restore_messages()
                raise

    def look(self) -> bool:
        """Let idle channels look at the lists nothing wakes them for. Raises when the connection is lost."""
        looks = [channel.look() for channel in list(self._channels)]  # all of them, whatever the first finds
        return any(looks)

    def maybe_restore_messages(self) -> None:
        """Put back what no worker gave a sign of life for, if it is time; what Redis refuses is tried again."""
        self._unless_away(super().maybe_restore_messages)

    def maybe_touch(self) -> None:
        """Give a sign of life for all held messages, if it is time; what Redis refuses is tried again."""
        for channel in list(self._channels):
            if channel._qos is not None:
                self._unless_away(channel.qos.touch)

    def look_after_with(self, loop: Any, *, touch_every: float, look_every: float) -> None:
        """Let the loop touch and look every so many seconds, instead of what it was told before."""
        for timer in self._timers:
            timer.cancel()
        self._timers = (
            loop.call_repeatedly(touch_every, self.maybe_touch),
            loop.call_repeatedly(look_every, self.look),
        )

    def _unless_away(self, look_after: Any) -> None:
        try:
            look_after()
        except exceptions.ResponseError as error:
            logger.warning("Redis refuses to look after held messages, tried again later: %s", error)
        except (exceptions.RedisError, OSError) as error:
            # The loop finds out by itself, and reconnects.
            logger.debug("No connection to look after held messages: %r", error)
