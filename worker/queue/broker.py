"""What the consumer asks of kombu's channels besides fetching and acknowledging.

`AtomicBroker` asks our own transport (`worker.transport`). `StockBroker` stands for kombu's: it cannot pause, does not
know solo attempts, and counts parked messages against the prefetch limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog
from kombu.message import Message

log = structlog.get_logger(__name__)


class Broker:
    """One per worker process, through all its connections. No method raises; those that kombu lacks do nothing."""

    def attach(self, channel: Any) -> None:
        """Use this channel, which a new connection brought, for `pause` and `resume`."""

    def pause(self, *, requeue_fetched: bool) -> None:
        """Stop fetching. Messages on their way are requeued, or else delivered."""

    def resume(self) -> None:
        """Fetch again."""

    def park(self, message: Message) -> None:
        """Stop counting a message in flight against the prefetch limit."""

    def record_solo_attempt(self, message: Message) -> None:
        """Count, before a suspect is applied alone, that it is: a worker that dies of it can count no more."""

    def undo_solo_attempts(self, message: Message, count: int) -> None:
        """Take back what `record_solo_attempt` counted: this worker survived."""

    def requeue(self, messages: Sequence[Message]) -> None:
        """Requeue the messages in this order, where they are served next if possible. No death is counted."""
        raise NotImplementedError


class AtomicBroker(Broker):
    """The transport of `worker.transport`. A message is handled by the channel that brought it."""

    def __init__(self) -> None:
        self._channel: Any = None

    def attach(self, channel: Any) -> None:
        self._channel = channel

    def pause(self, *, requeue_fetched: bool) -> None:
        if self._channel is not None:
            self._channel.pause(requeue_fetched=requeue_fetched)

    def resume(self) -> None:
        if self._channel is not None:
            self._channel.resume()

    def park(self, message: Message) -> None:
        _qos(message).park(message.delivery_tag)

    def record_solo_attempt(self, message: Message) -> None:
        try:
            _qos(message).record_solo_attempt(message.delivery_tag)
        except Exception as error:  # noqa: BLE001 - Redis may be unreachable: then one attempt is not counted
            log.warning("could not record a solo attempt at a suspect message", reason=str(error))

    def undo_solo_attempts(self, message: Message, count: int) -> None:
        _qos(message).undo_solo_attempts(message.delivery_tag, count)

    def requeue(self, messages: Sequence[Message]) -> None:
        by_channel: dict[int, list[Message]] = {}
        for message in messages:
            by_channel.setdefault(id(message.channel), []).append(message)
        for group in by_channel.values():
            qos = _qos(group[0])
            tags = [message.delivery_tag for message in group]
            try:
                qos.requeue(tags)
            except Exception as error:  # noqa: BLE001 - Redis may be unreachable, or refuse
                qos.requeue_later(tags)
                _log_requeue_error(len(group), error)


class StockBroker(Broker):
    """kombu's own transports, which can only requeue."""

    def requeue(self, messages: Sequence[Message]) -> None:
        for message in messages:  # kombu puts each where it is served last
            try:
                message.requeue()
            except Exception as error:  # noqa: BLE001 - the broker may be unreachable, or refuse
                _log_requeue_error(1, error)


def _log_requeue_error(messages: int, error: Exception) -> None:
    log.warning(
        "could not requeue messages: done with the next connection, or after the visibility timeout",
        messages=messages,
        reason=str(error),
    )


def _qos(message: Message) -> Any:
    channel: Any = message.channel
    return channel.qos
