"""From a Redis list to a Celery consumer without a gap: fetched, and recorded as unacknowledged, in one step.

This is kombu's Redis transport, with the same keys: workers with ours and with kombu's can share a queue. Different are
how messages leave their lists (`fetcher.py`), how they are acknowledged, requeued and restored (`qos.py`), and that
neither the bytes on a list nor a restart of Redis can end the worker. tests/transport/test_contract.py names every
private member of kombu that this package relies on.
"""

# mypy: disallow-subclassing-any=False
# ruff: noqa: SLF001 - kombu's stubs leave out most of what a transport needs

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from queue import Empty
from time import monotonic
from typing import Any

from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis import exceptions

from schema.messages import RESTORES_HEADER, SOLO_DEATHS_HEADER
from schema.text import ascii_line

from . import envelope
from .fetcher import Fetcher, Mode
from .pending import pending_operations
from .poller import Poller
from .qos import QoS
from .scripts import Fetched, QueueList, Scripts

stock: Any = import_module("kombu.transport.redis")

logger = logging.getLogger(__name__)


class Channel(stock.Channel):
    """kombu's channel, whose messages are in `unacked` from the moment they leave their list."""

    QoS = QoS

    #: A hash: how often messages were restored, and attempted alone.
    unacked_restores_key = "unacked_restores"
    #: The most messages that one fetch takes, and the most bytes unless a single message is larger.
    fetch_count = 500
    fetch_bytes = 1 << 20
    #: Seconds between two polls of the lists that an idle channel's wait does not cover.
    poll_interval = 0.025

    from_transport_options = (
        *stock.Channel.from_transport_options,
        "unacked_restores_key",
        "fetch_count",
        "fetch_bytes",
        "poll_interval",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._no_ack_queues: set[str] = set()
        super().__init__(*args, **kwargs)
        keys = (self.unacked_key, self.unacked_index_key, self.unacked_restores_key)
        names = (self.sep, self.keyprefix_queue % ("",))
        self.scripts = Scripts(self.conn_or_acquire, self.global_keyprefix, keys, *names)
        client = self.connection.client
        hosts = tuple(sorted(client.alt)) or (client.hostname, client.port)  # sorted: kombu rotates the hosts it tries
        self.pending = pending_operations((hosts, client.virtual_host, self.scripts.key(self.unacked_key)))
        limits = {"max_messages": self.fetch_count, "max_bytes": self.fetch_bytes, "wait_seconds": self.brpop_timeout}
        self.fetcher = Fetcher(self.scripts, self.pending, **limits)

    # Fetch

    def pause(self, requeue_fetched: bool = True) -> None:
        """Fetch nothing until `resume`; acknowledgements and heartbeats go on.

        Messages that a fetch under way brings are requeued, or delivered if not `requeue_fetched`.
        """
        self.fetcher.mode = Mode.REQUEUE if requeue_fetched else Mode.DELIVER

    def resume(self) -> None:
        """Fetch again after `pause`."""
        self.fetcher.mode = Mode.FETCH

    def flush_pending(self) -> None:
        """Send the pending operations of this process. Raises what redis-py raises, and keeps the rest."""
        self.pending.flush(self.scripts)

    def _brpop_start(self, timeout: float | None = None) -> None:  # noqa: ARG002
        """Send a fetch, where kombu sends BRPOP."""
        lists = self._lists(self._queue_cycle.consume(len(self.active_queues)), self._no_ack_queues)
        if fetch := self.fetcher.next_fetch(lists, self.qos.can_consume_max_estimate()):
            self._in_poll = self.client.connection  # before it is sent: if the connection is lost, so is the reply
            self._brpop_sent_at = monotonic()
            self.fetcher.send(fetch, self._in_poll)

    def _brpop_read(self, **options: Any) -> bool:
        """Deliver what the fetch brings. Raises Empty if that is nothing, and connection errors."""
        connection = self.client.connection
        try:
            fetched = self.fetcher.read(self.client, options)
        except self.connection_errors:
            connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if not fetched:
            raise Empty
        self._deliver_fetched(fetched)
        return True

    def poll_lists(self) -> bool:
        """Deliver from the lists that an idle channel's wait does not cover; whether there were messages.

        Raises connection errors.
        """
        if not (self._in_poll and self.qos.can_consume()):
            return False
        fetched = self.fetcher.fetch_unwatched(self.qos.can_consume_max_estimate())
        self._deliver_fetched(fetched)
        return bool(fetched)

    def _on_connection_disconnect(self, connection: Any) -> None:
        if self._in_poll is connection:
            self.fetcher.reply_lost()
        super()._on_connection_disconnect(connection)

    def _lists(self, queues: Sequence[str], no_ack_queues: Collection[str]) -> list[QueueList]:
        return [
            QueueList(
                queue,
                self.scripts.key(self._q_for_pri(queue, step)),
                "" if queue in no_ack_queues else f',"",{json.dumps(queue)}{" " * step}]',
            )
            for step in self.priority_steps
            for queue in queues
        ]

    # Deliver

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Callable[[Any], Any], consumer_tag: str, **kwargs: Any
    ) -> Any:
        """Consume from `queue`; with `no_ack` its messages are not recorded, and gone once fetched."""
        (self._no_ack_queues.add if no_ack else self._no_ack_queues.discard)(queue)
        result = super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)

        def deliver(raw_message: Any) -> Any:
            message = self.message_to_python(raw_message)  # a broadcast; a fetched message is a Message already
            if not no_ack:
                self.qos.append(message, message.delivery_tag)
            return callback(message)

        self.connection._callbacks[queue] = deliver
        return result

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Bind as kombu does, but start to consume even if a full Redis refuses to store the binding.

        Workers have to drain it. They find the lists by the queue's name, and a later connection stores the binding.
        """
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except exceptions.OutOfMemoryError as error:
            logger.warning("Redis is full: consuming %s without storing its binding (%s).", queue, error)

    def _deliver_fetched(self, fetched: list[Fetched]) -> None:
        """Pass messages to their consumers. Requeues those that no consumer takes: none is there, or one raised."""
        undelivered = deque(fetched)
        try:
            while undelivered and not self._closing and self.fetcher.mode is not Mode.REQUEUE:
                item = undelivered[0]
                callback = self.connection._callbacks.get(item.source.queue)
                if callback is None:
                    break
                undelivered.popleft()
                self._queue_cycle.rotate(item.source.queue)
                if message := self._message(item):
                    callback(message)
        finally:
            if tags := [item.tag for item in undelivered if item.source.record_end]:
                self._requeue(tags)

    def _requeue(self, tags: list[str]) -> None:
        try:
            for _ in self.scripts.requeue(tags):
                pass
        except Exception as error:  # noqa: BLE001 - an unreachable broker must not end the worker; the tags are kept
            self.pending.requeue_later(tags)
            logger.warning(
                "Could not requeue %d fetched messages (%r): they are requeued with the next connection.",
                len(tags),
                error,
            )

    def _message(self, item: Fetched) -> Any:
        """A kombu message of whatever was fetched; None for undecodable bytes that need no acknowledgement."""
        try:
            message = self._build(envelope.parse(item.raw, item.source.queue), item)
            reason = f"its body cannot be unpacked: {message.errors[0][1]}" if message.errors else ""
        except envelope.UndecodableError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - kombu runs codecs on the content, which raise anything
            reason = f"its body cannot be unpacked: {type(error).__name__}: {error}"
        if reason:
            if not item.source.record_end:
                logger.warning(
                    "Dropped undecodable bytes from %s, a queue without acknowledgements: %s", item.source.queue, reason
                )
                return None
            payload = envelope.undecodable(item.raw, item.source.queue, reason)
            try:
                self.scripts.record_undecodable(item.tag, f"[{envelope.to_json(payload)}{item.source.record_end}")
            except Exception as error:  # noqa: BLE001 - the bytes stay recorded as they are, which restore.lua reads, too
                logger.warning("Could not record an undecodable message in the form that kombu can restore: %r.", error)
            message = self._build(payload, item)
        message.size = len(item.raw)
        return message

    def _build(self, payload: dict[str, Any], item: Fetched) -> Any:
        headers, properties = payload["headers"], payload["properties"]
        properties["delivery_tag"] = item.tag
        if item.restores:
            headers[RESTORES_HEADER] = item.restores
            headers[SOLO_DEATHS_HEADER] = item.solo_deaths
            headers["redelivered"] = True
            properties["delivery_info"]["redelivered"] = True
            if item.source.record_end:
                self.qos.remember_restored(item.tag, hashlib.sha1(item.raw, usedforsecurity=False).hexdigest())
        else:  # a producer must not set these
            headers.pop(RESTORES_HEADER, None)
            headers.pop(SOLO_DEATHS_HEADER, None)
        return self.Message(payload, channel=self)

    # Broadcasts

    def _handle_message(self, client: Any, response: Any) -> dict[str, Any]:
        """A broadcast as kombu reads it; without its data if parsing that raises what kombu does not catch."""
        payload: dict[str, Any] = super()._handle_message(client, response)
        try:
            if isinstance(payload["data"], str | bytes):
                loads(bytes_to_str(payload["data"]))  # which replaces invalid UTF-8, as kombu does before it parses
        except (TypeError, ValueError):
            pass  # kombu logs it, and goes on
        except Exception as error:  # noqa: BLE001 - type tags run constructors on content, which raise anything
            logger.warning("Dropped a broadcast that is not JSON: %s", ascii_line(repr(error), 200))
            payload["data"] = None
        return payload

    def _deliver_fanout_message(self, message: Any, exchange: str) -> Any:
        """Deliver a broadcast; drop one that is not a message, which would end Celery, with a warning."""
        problems: list[Any]
        try:
            problems = self.Message(envelope.parse(dumps(message).encode(), exchange), channel=self).errors
        except Exception as error:  # noqa: BLE001 - kombu runs codecs on the content, which raise anything
            problems = [error]
        if problems:
            logger.warning("Dropped a broadcast that is not a message: %s", ascii_line(repr(problems[0]), 200))
            return True
        return super()._deliver_fanout_message(message, exchange)

    # Without a consumer

    def basic_get(self, queue: str, no_ack: bool = False, **_kwargs: Any) -> Any:
        """One message of `queue`, recorded as unacknowledged unless `no_ack`; None if there is none."""
        try:
            message = self._get(queue, no_ack=no_ack)
        except Empty:
            return None
        if not no_ack:
            self.qos.append(message, message.delivery_tag)
        return message

    def _get(self, queue: str, timeout: float | None = None, no_ack: bool = False) -> Any:  # noqa: ARG002
        fetched = self.fetcher.fetch_now(self._lists([queue], {queue} if no_ack else ()), 1)
        with self.conn_or_acquire() as client:
            self._maybe_update_queues_expire(client, queue)
        for item in fetched:
            if message := self._message(item):
                return message
        raise Empty

    # Close

    def close(self) -> None:
        """Acknowledge, requeue messages in flight, disconnect. Never raises: the broker may be unreachable."""
        self._closing = True
        if not self.closed:
            self._try("read the reply to its fetch", self._read_reply)
            if self._qos:
                self._qos.restore_unacked_once()
            self._try("send its pending operations", self.flush_pending)
        self._try("close its connections", super().close)

    def _read_reply(self) -> None:
        if self._in_poll:
            with contextlib.suppress(Empty):
                self._brpop_read()

    def _try(self, purpose: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - an unreachable broker must not end the worker
            logger.debug("A closing channel could not %s: %r", purpose, error)


class SentinelChannel(Channel, stock.SentinelChannel):
    """The channel for sentinel:// URLs."""

    from_transport_options = tuple(
        dict.fromkeys(Channel.from_transport_options + stock.SentinelChannel.from_transport_options)
    )


class Transport(stock.Transport):
    """kombu's Redis transport with our channel and poller."""

    Channel = Channel

    #: Seconds that an idle channel's wait lasts. Closing takes as long, for it reads the reply.
    brpop_timeout = 0.1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Let the loop read, poll, restore, and send heartbeats three times per visibility timeout."""
        super().register_with_event_loop(connection, loop)
        options = connection.client.transport_options
        self.cycle.set_timers(
            loop,
            heartbeat_interval=float(options.get("visibility_timeout", Channel.visibility_timeout)) / 3,
            poll_interval=float(options.get("poll_interval", Channel.poll_interval)),
        )


class SentinelTransport(Transport):
    """The transport for sentinel:// URLs."""

    default_port = stock.SentinelTransport.default_port
    Channel = SentinelChannel
