"""From a Redis list to a Celery consumer without a gap: popped and recorded as unacknowledged in one step.

A small subclass of kombu's Redis transport, with the same keys: workers with ours and with kombu's can share a queue.
What differs is how messages leave the lists (`fetching.py`), how they are acknowledged and put back (`unacked.py`), and
that neither bytes in a list nor a restart of Redis can end the worker. tests/transport/test_contract.py names every
private member of kombu that this leans on. `register()` makes it what redis://, rediss:// and sentinel:// mean.
"""

# mypy: disallow-subclassing-any=False
# ruff: noqa: SLF001 - kombu's stubs leave out most of what a transport needs

from __future__ import annotations

import contextlib
import hashlib
import logging
from importlib import import_module
from queue import Empty
from typing import TYPE_CHECKING, Any

from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis import exceptions

from schema import messages
from schema.text import ascii_line
from worker.transport import envelope
from worker.transport.fetching import Fetched, FetchingChannel
from worker.transport.poller import Poller
from worker.transport.scripts import SHIELD, stock

if TYPE_CHECKING:
    from collections.abc import Callable

transports: Any = import_module("kombu.transport")

logger = logging.getLogger(__name__)


class Channel(FetchingChannel):
    """A channel whose messages are in `unacked` from the moment they leave their list."""

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], Any], consumer_tag: str, **kwargs: Any
    ) -> Any:
        """Consume from `queue`; with `no_ack` its messages are not recorded, and gone once fetched."""
        (self._no_ack_queues.add if no_ack else self._no_ack_queues.discard)(queue)
        result = super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)

        def deliver(raw_message: Any) -> Any:
            message = self.message_to_python(raw_message)  # ours is built already: bytes that are none must not raise
            if not no_ack:
                self.qos.append(message, message.delivery_tag)
            return callback(message)

        self.connection._callbacks[queue] = deliver
        return result

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Bind as kombu does. A full Redis refuses, and then must be drained by workers that start or reconnect: what
        they consume is found by its name, and the binding is written with a later connection.
        """
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except exceptions.OutOfMemoryError as error:
            logger.warning("Redis is full: %s is consumed without a note of its binding (%s).", queue, error)

    def _deliver_all(self, fetched: list[Fetched]) -> None:
        """Hand messages to their consumers; those that none takes, for whatever reason, go back to where they were."""
        waiting = list(reversed(fetched))
        try:
            while waiting and self._welcome and not self._closing:
                item = waiting[-1]
                callback = self.connection._callbacks.get(item.source.queue)
                if callback is None:
                    break
                waiting.pop()
                self._queue_cycle.rotate(item.source.queue)
                if message := self._message(item):
                    callback(message)
        finally:
            if waiting:
                self._return_unseen(list(reversed(waiting)))

    def _return_unseen(self, unseen: list[Fetched]) -> None:
        """Put back what no consumer has seen. Never raises: what cannot go back now goes with the next connection."""
        tags = [item.tag for item in unseen if item.source.closing]
        try:
            for _ in self.qos.put_back(tags, "RPUSH"):
                pass
            for item in reversed([item for item in unseen if not item.source.closing]):
                with self.conn_or_acquire() as client:
                    client.rpush(item.source.key, item.raw)
        except Exception as error:  # noqa: BLE001
            self.owed.requeue_later(tags)
            logger.warning("Could not put %d fetched messages back at once: %r.", len(unseen), error)

    def _message(self, item: Fetched) -> Any:
        """A kombu message of what was fetched, whatever it is; None where it is unreadable and nobody acknowledges."""
        try:
            message = self._built(envelope.parse(item.raw, item.source.queue), item)
            reason = f"its body cannot be unpacked: {message.errors[0][1]}" if message.errors else ""
        except envelope.NotAMessage as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - building it runs codecs on content
            reason = f"its body cannot be unpacked: {type(error).__name__}: {error}"
        if reason:
            if not item.source.closing:
                logger.warning(
                    "Dropped unreadable bytes from %s, where nobody acknowledges: %s", item.source.queue, reason
                )
                return None
            payload = envelope.undecodable(item.raw, item.source.queue, reason)
            self._shield(item, envelope.text_of(payload))
            message = self._built(payload, item)
        message.size = len(item.raw)
        return message

    def _built(self, payload: dict[str, Any], item: Fetched) -> Any:
        payload["properties"]["delivery_tag"] = item.tag
        if item.restores:
            payload["headers"][messages.RESTORES_HEADER] = item.restores
            payload["headers"][messages.SOLO_DEATHS_HEADER] = item.deaths
            payload["headers"]["redelivered"] = True
            payload["properties"]["delivery_info"]["redelivered"] = True
            if item.source.closing:
                fingerprint = hashlib.sha1(item.raw, usedforsecurity=False).hexdigest()
                self.qos.remember_restored(item.tag, fingerprint)
        else:
            for ours in (messages.RESTORES_HEADER, messages.SOLO_DEATHS_HEADER):
                payload["headers"].pop(ours, None)  # not a producer's to say
        return self.Message(payload, channel=self)

    def _shield(self, item: Fetched, text: str) -> None:
        try:
            self._run(SHIELD, [self.unacked_key], [item.tag, f"[{text}{item.source.closing}"])
        except Exception as error:  # noqa: BLE001 - its bytes are recorded as they are, which our own restore reads
            logger.warning("Could not record an undecodable message for other transports: %r.", error)

    # Broadcasts

    def _handle_message(self, client: Any, response: Any) -> dict[str, Any]:
        """What a fanout channel brought; without its data where reading it fails as kombu does not expect."""
        payload: dict[str, Any] = super()._handle_message(client, response)
        try:
            if isinstance(payload["data"], str | bytes):
                loads(bytes_to_str(payload["data"]))  # which replaces what is no UTF-8, as kombu does before it reads
        except (TypeError, ValueError):
            pass  # kombu says so, and goes on
        except Exception as error:  # noqa: BLE001 - type tags run constructors on content
            logger.warning("Dropped a broadcast that is no JSON: %s", ascii_line(repr(error), 200))
            payload["data"] = None
        return payload

    def _deliver_fanout_message(self, message: Any, exchange: str) -> Any:
        """Deliver a broadcast; what is no message is dropped with a warning, for Celery would die of it."""
        problems: list[Any]
        try:
            problems = self.Message(envelope.parse(dumps(message).encode(), exchange), channel=self).errors
        except Exception as error:  # noqa: BLE001 - building it runs codecs on content
            problems = [error]
        if problems:
            logger.warning("Dropped a broadcast that is no message: %s", ascii_line(repr(problems[0]), 200))
            return True
        return super()._deliver_fanout_message(message, exchange)

    # Without a consumer

    def basic_get(self, queue: str, no_ack: bool = False, **_kwargs: Any) -> Any:
        """One message of `queue`, recorded as unacknowledged unless `no_ack`; None when it is empty."""
        try:
            message = self._fetch_one(queue, no_ack)
        except Empty:
            return None
        if not no_ack:
            self.qos.append(message, message.delivery_tag)
        return message

    def _get(self, queue: str, timeout: float | None = None) -> Any:  # noqa: ARG002
        return self._fetch_one(queue, no_ack=False)._raw

    def _fetch_one(self, queue: str, no_ack: bool) -> Any:
        sources = self._sources([queue], {queue} if no_ack else ())
        fetched = self._fetch_now(sources, 1)
        with self.conn_or_acquire() as client:
            self._maybe_update_queues_expire(client, queue)
        for item in fetched:
            if message := self._message(item):
                return message
        raise Empty

    # The end

    def close(self) -> None:
        """Acknowledge what is done, put the rest back, disconnect; however the broker fares: never raises."""
        self._closing = True
        if not self.closed:
            self._at_the_end("read what was on its way", self._read_outstanding)
            if self._qos:
                self._qos.restore_unacked_once()
            self._at_the_end("acknowledge", self.settle)
        self._at_the_end("close the connections", super().close)

    def _read_outstanding(self) -> None:
        if self._in_poll:
            with contextlib.suppress(Empty):
                self._brpop_read()

    def _at_the_end(self, what: str, do: Callable[[], Any]) -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001 - a worker must not die of a broker that is away
            logger.debug("A channel could not %s: %r", what, error)


class SentinelChannel(Channel, stock.SentinelChannel):
    """For sentinel://."""

    from_transport_options = tuple(
        dict.fromkeys(Channel.from_transport_options + stock.SentinelChannel.from_transport_options)
    )


class Transport(stock.Transport):
    """kombu's Redis transport with channels and a poller of our own."""

    Channel = Channel

    #: Seconds that an idle channel waits at a stretch; closing takes as long, as what comes last is not to be missed.
    brpop_timeout = 0.1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let the loop read, look, restore, and give signs of life three times per visibility timeout."""
        super().register_with_event_loop(connection, loop)
        options = connection.client.transport_options
        self.cycle.look_after_with(
            loop,
            touch_every=float(options.get("visibility_timeout", Channel.visibility_timeout)) / 3,
            look_every=float(options.get("look_interval", Channel.look_interval)),
        )


class SentinelTransport(Transport):
    """The same through Redis Sentinel."""

    default_port = stock.SentinelTransport.default_port
    Channel = SentinelChannel


def register() -> None:
    """Make redis://, rediss:// and sentinel:// mean this transport, in this process."""
    for scheme, transport in (("redis", "Transport"), ("rediss", "Transport"), ("sentinel", "SentinelTransport")):
        transports.TRANSPORT_ALIASES[scheme] = f"{__name__}:{transport}"
        transports._transport_cache.pop(scheme, None)
