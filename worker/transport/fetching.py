"""How messages leave Redis: one script for all lists that are consumed, and a wait that changes nothing while idle.

Between `transport.py`, which delivers what is fetched, and `scripts.py`. It takes the place of kombu's BRPOP, after
which a message is nowhere but in a socket until it is noted as unacknowledged.
"""

from __future__ import annotations

import json
import logging
from itertools import count
from queue import Empty
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from redis import exceptions

from worker.transport.scripts import FETCH, ScriptedChannel

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

logger = logging.getLogger(__name__)

#: Seconds between two tries, and between two lines in the log, while Redis answers but refuses.
REST, COMPLAIN_EVERY = 1.0, 10.0


class Source(NamedTuple):
    """A list that is fetched from: one priority step of one queue."""

    queue: str
    key: str  # without the global prefix
    closing: str  # what closes a record of it, see put_back.lua; empty when nothing is recorded


class Asked(NamedTuple):
    """A fetch that is on its way."""

    prefix: str
    most: int
    sources: list[Source]

    def tags(self) -> list[str]:
        """The tags of all messages that it may bring, oldest first."""
        return [f"{self.prefix}{number}" for number in range(1, self.most + 1)]


class Fetched(NamedTuple):
    """A message as it came out of Redis."""

    source: Source
    tag: str
    raw: bytes
    restores: int
    deaths: int  # of workers that had it in hand alone


class FetchingChannel(ScriptedChannel):
    """A channel whose messages are in `unacked` from the moment they leave their list."""

    #: At most so many messages, and bytes unless one message alone is larger, leave Redis at once.
    fetch_count = 500
    fetch_bytes = 1 << 20
    #: Seconds after which an idle channel, which Redis wakes for its first list, looks at all the others.
    look_interval = 0.025

    from_transport_options = (
        *ScriptedChannel.from_transport_options,
        "fetch_count",
        "fetch_bytes",
        "look_interval",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._identity = uuid4().hex
        self._fetches = count(1)
        self._outstanding = Asked("", 0, [])
        self._waited = False
        self._idle = False
        self._intake = self._welcome = True
        self._no_ack_queues: set[str] = set()
        self._full_until = self._rest_until = self._complain_at = 0.0
        super().__init__(*args, **kwargs)
        #: Why Redis refuses to work for this channel, None while it does not.
        self.refusal: str | None = None

    def pause(self, *, requeue_fetched: bool = True) -> None:
        """Fetch nothing until `resume`; acknowledgements and signs of life go on.

        What is on its way by now goes back to where it was, or, if it need not be `requeue_fetched`, is delivered.
        """
        self._intake, self._welcome = False, not requeue_fetched

    def resume(self) -> None:
        """Fetch again after `pause`."""
        self._intake = self._welcome = True

    def _brpop_start(self, timeout: float | None = None) -> None:  # noqa: ARG002
        """Ask for messages; if few came last time, in one round trip with a wait for the first list."""
        sources = self._sources(self._queue_cycle.consume(len(self.active_queues)), self._no_ack_queues)
        if not sources or not self._intake or monotonic() < self._rest_until:
            return
        asked, keys, arguments = self._ask(sources, self._credit())
        commands: list[tuple[Any, ...]] = [("EVALSHA", FETCH.sha, len(keys), *map(self._key, keys), *arguments)]
        if self._idle:
            commands.insert(0, self._wait(sources))
        self._waited, self._outstanding = self._idle, asked
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        connection.send_packed_command(connection.pack_commands(commands))

    def _wait(self, sources: list[Source]) -> tuple[Any, ...]:
        """A command that returns when the first list has something, or after `brpop_timeout`, and changes nothing."""
        if monotonic() < self._full_until:
            # A full Redis refuses BLMOVE at once, and we would spin. Nobody writes to this key: this only waits.
            return ("BLPOP", self._key("tokentrail.nothing"), self.brpop_timeout)
        first = self._key(sources[0].key)
        return ("BLMOVE", first, first, "RIGHT", "RIGHT", self.brpop_timeout)

    def look(self) -> bool:
        """Fetch from the lists that nothing wakes us for, if we wait. Returns whether there was something.

        Redis cannot tell us: BLMOVE waits on one list, and its timeouts are only looked at ten times a second.
        Raises when the connection is lost.
        """
        unwatched = self._outstanding.sources[0 if monotonic() < self._full_until else 1 :]
        if not (self._in_poll and self._waited and unwatched and self._intake and self.qos.can_consume()):
            return False
        try:
            fetched = self._fetch_now(unwatched, self._credit())
        except exceptions.ResponseError as error:
            self._refused(error)
            return False
        self._deliver_all(fetched)
        return bool(fetched)

    def _brpop_read(self, **options: Any) -> bool:
        """Deliver what was asked for. Raises Empty when there is nothing, and whatever the connection raises."""
        connection = self.client.connection
        try:
            fetched = self._read_reply(connection, options)
        except self.connection_errors:
            connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if not fetched:
            raise Empty
        self._deliver_all(fetched)
        return True

    def _read_reply(self, connection: Any, options: dict[str, Any]) -> list[Fetched]:
        refusal: exceptions.ResponseError | None = None
        if self._waited:
            try:
                self.client.parse_response(connection, "BLMOVE", **options)
            except exceptions.OutOfMemoryError:
                self._full_until = monotonic() + REST  # the fetch behind it is allowed even so
            except exceptions.ResponseError as error:
                refusal = error
        asked = self._outstanding
        reply: list[Any] = [0]
        try:
            try:
                reply = self.client.parse_response(connection, "EVALSHA", **options) or reply
            except exceptions.NoScriptError:  # Redis restarted, or does not know us yet
                return self._fetch_now(asked.sources, asked.most)
        except exceptions.ResponseError as error:
            refusal = error
        if refusal:
            self._refused(refusal)
        else:
            self.refusal = None
        self._idle = not reply[0]
        return self._fetched(reply, asked)

    def _sources(self, queues: Sequence[str], unrecorded: Collection[str]) -> list[Source]:
        return [
            Source(
                queue,
                self._q_for_pri(queue, step),
                "" if queue in unrecorded else f',"",{json.dumps(queue)}{" " * step}]',
            )
            for step in self.priority_steps
            for queue in queues
        ]

    def _credit(self) -> int:
        credit = self.qos.can_consume_max_estimate()
        return self.fetch_count if credit is None else min(credit, self.fetch_count)

    def _fetch_now(self, sources: list[Source], most: int) -> list[Fetched]:
        asked, keys, arguments = self._ask(sources, most)
        try:
            reply = self._run(FETCH, keys, arguments)
        except self.connection_errors:
            self.owed.requeue_later(asked.tags())
            raise
        return self._fetched(reply, asked)

    def _on_connection_disconnect(self, connection: Any) -> None:
        """Remember what the reply that is lost may have brought: it is recorded as ours, and nobody will read it."""
        if self._in_poll is connection:
            self.owed.requeue_later(self._outstanding.tags())
        super()._on_connection_disconnect(connection)

    def _ask(self, sources: list[Source], most: int) -> tuple[Asked, list[str], list[str]]:
        """A fetch with a prefix of tags that no other fetch has, here or elsewhere; keys and arguments for it."""
        asked = Asked(f"{self._identity}-{next(self._fetches)}-", most, sources)
        keys = [self.unacked_key, self.unacked_index_key, self.unacked_restores_key, *(s.key for s in sources)]
        limits = [str(most), str(self.fetch_bytes), asked.prefix]
        return asked, keys, [*limits, *(source.closing for source in sources)]

    @staticmethod
    def _fetched(reply: list[Any], asked: Asked) -> list[Fetched]:
        items = zip(reply[1::4], reply[2::4], reply[3::4], reply[4::4], strict=True)
        return [Fetched(asked.sources[at], tag, *rest) for tag, (at, *rest) in zip(asked.tags(), items, strict=False)]

    def _deliver_all(self, fetched: list[Fetched]) -> None:
        """Hand messages to their consumers."""
        raise NotImplementedError

    def _refused(self, error: exceptions.ResponseError) -> None:
        """Redis answers, but not what was asked for: full disk, too few replicas, no permission. Try again in a second.

        Raises a connection error when this Redis is not, or no longer, the one to write to.
        """
        text = str(error)
        if isinstance(error, exceptions.ReadOnlyError) or text.startswith("UNBLOCKED"):
            raise exceptions.ConnectionError(f"Redis is no longer the one to write to: {text}") from error
        self.refusal = text
        self._rest_until = monotonic() + REST
        if monotonic() >= self._complain_at:
            self._complain_at = monotonic() + COMPLAIN_EVERY
            logger.error("Redis refuses its part, the worker tries again every second: %s", text)
