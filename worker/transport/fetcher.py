"""How a channel's messages leave Redis: one script for all lists, and a wait that changes nothing while they are empty.

This replaces kombu's BRPOP, which leaves a popped message nowhere but in a socket until it is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import Enum
from itertools import count
from time import monotonic
from typing import Any, Final
from uuid import uuid4

from redis import exceptions

from .pending import PendingOperations
from .scripts import Fetch, Fetched, QueueList, Scripts

logger = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0  # after Redis refused a command
_LOG_SECONDS: Final = 10.0  # between two log lines about refusals

_CONNECTION_ERRORS: Final = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)


class Mode(Enum):
    """What happens to messages on their lists, and to those that a fetch under way brings."""

    FETCH = "fetch and deliver"
    DELIVER = "fetch nothing more, deliver those under way"
    REQUEUE = "fetch nothing more, requeue those under way"


class Fetcher:
    """Asks Redis for messages and reads its replies, for one channel and its connection."""

    def __init__(
        self, scripts: Scripts, pending: PendingOperations, *, max_messages: int, max_bytes: int, wait_seconds: float
    ) -> None:
        self.mode = Mode.FETCH
        #: The error with which Redis refused the last fetch; None if it did not.
        self.refusal: str | None = None
        self._scripts = scripts
        self._pending = pending
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._wait_seconds = wait_seconds
        self._identity = uuid4().hex
        self._numbers = count(1)
        self._sent = Fetch([], 0, 0, "")  # the fetch whose reply is still to be read, or the last one
        self._sent_with_wait = False
        self._lists_were_empty = False  # after the last reply: the next fetch waits for the first list
        self._full_until = self._retry_at = self._log_at = 0.0  # as of monotonic()

    def next_fetch(self, lists: Sequence[QueueList], allowed: int | None) -> Fetch | None:
        """The fetch of up to `allowed` messages to send now; None without lists, while paused, or after a refusal."""
        if not lists or self.mode is not Mode.FETCH or monotonic() < self._retry_at:
            return None
        return self._fetch(lists, allowed)

    def send(self, fetch: Fetch, connection: Any) -> None:
        """Send a fetch; if the lists were empty, in one round trip with a command that waits for the first list."""
        self._sent, self._sent_with_wait = fetch, self._lists_were_empty
        commands = [self._scripts.fetch_command(fetch)]
        if self._sent_with_wait:
            commands.insert(0, self._wait_command(fetch.lists[0]))
        connection.send_packed_command(connection.pack_commands(commands))

    def read(self, client: Any, options: dict[str, Any]) -> list[Fetched]:
        """The messages of the fetch that was sent. Raises connection errors; a refusal is logged and tried again."""
        connection = client.connection
        refusal: exceptions.ResponseError | None = None
        if self._sent_with_wait:
            try:
                client.parse_response(connection, "BLMOVE", **options)
            except exceptions.OutOfMemoryError:
                self._full_until = monotonic() + _RETRY_SECONDS  # the fetch behind it is allowed nevertheless
            except exceptions.ResponseError as error:
                refusal = error
        reply: list[Any] = [0]
        try:
            try:
                reply = client.parse_response(connection, "EVALSHA", **options) or reply
            except exceptions.NoScriptError:  # Redis restarted, or has not seen the script yet
                return self.fetch_now(self._sent.lists, self._sent.max_messages)
        except exceptions.ResponseError as error:
            refusal = error
        if refusal:
            self.refused(refusal)
        else:
            self.refusal = None
        self._lists_were_empty = not reply[0]
        return self._sent.messages(reply)

    def reply_lost(self) -> None:
        """Requeue the messages in a reply that can no longer be read: Redis has recorded them as unacknowledged."""
        self._pending.requeue_later(self._sent.tags())

    def fetch_now(self, lists: Sequence[QueueList], allowed: int | None) -> list[Fetched]:
        """Fetch over a connection of its own. Raises what redis-py raises."""
        fetch = self._fetch(lists, allowed)
        try:
            return fetch.messages(self._scripts.fetch(fetch))
        except _CONNECTION_ERRORS:
            self._pending.requeue_later(fetch.tags())
            raise

    def fetch_unwatched(self, allowed: int | None) -> list[Fetched]:
        """Fetch from the lists that the wait which was sent does not end for. Raises connection errors.

        BLMOVE waits for one list, and Redis checks its timeout only ten times a second.
        """
        lists = self._sent.lists if self._redis_is_full() else self._sent.lists[1:]
        if not (lists and self._sent_with_wait and self.mode is Mode.FETCH):
            return []
        try:
            return self.fetch_now(lists, allowed)
        except exceptions.ResponseError as error:
            self.refused(error)
            return []

    def refused(self, error: exceptions.ResponseError) -> None:
        """Pause for a second, for Redis answers with an error: full disk, too few replicas, missing permission.

        Raises ConnectionError if this Redis is not, or is no longer, the one to write to.
        """
        text = str(error)
        if isinstance(error, exceptions.ReadOnlyError) or text.startswith("UNBLOCKED"):
            raise exceptions.ConnectionError(f"This Redis does not accept writes any more: {text}") from error
        self.refusal = text
        self._retry_at = monotonic() + _RETRY_SECONDS
        if monotonic() >= self._log_at:
            self._log_at = monotonic() + _LOG_SECONDS
            logger.error("Redis rejects the worker's commands; retrying every second: %s", text)

    def _fetch(self, lists: Sequence[QueueList], allowed: int | None) -> Fetch:
        max_messages = self._max_messages if allowed is None else min(allowed, self._max_messages)
        return Fetch(lists, max_messages, self._max_bytes, f"{self._identity}-{next(self._numbers)}-")

    def _wait_command(self, first: QueueList) -> tuple[Any, ...]:
        """A command that returns once `first` has a message, or after `wait_seconds`, and changes nothing."""
        if self._redis_is_full():
            # A full Redis refuses BLMOVE at once, so that the worker would spin. Nothing writes to this key: it waits.
            return ("BLPOP", self._scripts.key("tokentrail.nothing"), self._wait_seconds)
        return ("BLMOVE", first.key, first.key, "RIGHT", "RIGHT", self._wait_seconds)

    def _redis_is_full(self) -> bool:
        return monotonic() < self._full_until
