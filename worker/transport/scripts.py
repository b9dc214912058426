"""The Lua scripts that move messages inside Redis, and the keys they work on. Knows redis-py and no kombu.

Redis runs each script of `lua/` as one step, and no content of a message makes a script fail. All of them may write
while Redis is over `maxmemory`: they free memory or move what is there already, and a worker that could neither fetch
nor acknowledge would keep Redis full for ever. They need Redis 7.0 or Valkey.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.resources import files
from itertools import count
from typing import Any, Literal, NamedTuple

import redis
from redis import exceptions

from . import envelope

#: Declares in Redis 7 that a script may write over `maxmemory`; has to be the first line.
_SHEBANG = "#!lua flags=allow-oom\n"

#: Bytes per call that requeues or restores; the caller calls again until all is done.
MAX_BYTES_PER_CALL = 1 << 20

#: Messages per call that requeues or restores.
MAX_MESSAGES_PER_CALL = 500

#: Tags per call of the other scripts: Lua's `unpack` ends at about 8,000, and no call should block Redis for long.
MAX_TAGS_PER_CALL = 1000

#: The field of `unacked_restores` that counts a message's restores is its sha1; solo attempts have this in front of it.
_SOLO_ATTEMPTS = "alone:"


class Script(NamedTuple):
    """A script, and the sha1 by which Redis knows it once it is loaded."""

    text: str
    sha: str


def _script(*names: str) -> Script:
    folder = files("worker.transport") / "lua"
    text = _SHEBANG + "\n".join((folder / f"{name}.lua").read_text() for name in names)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


FETCH = _script("fetch")
ACKNOWLEDGE = _script("acknowledge")
HEARTBEAT = _script("heartbeat")
REQUEUE = _script("return_to_list", "requeue")
RESTORE = _script("return_to_list", "restore")
COUNT_SOLO_ATTEMPTS = _script("count_solo_attempts")
RECORD_UNDECODABLE = _script("record_undecodable")


class QueueList(NamedTuple):
    """A Redis list to fetch from: one queue at one priority."""

    queue: str
    key: str
    record_end: str  # the end of its messages' records, see return_to_list.lua; empty: they are not recorded


class Fetched(NamedTuple):
    """A message as it comes out of Redis."""

    source: QueueList
    tag: str
    raw: bytes
    restores: int
    solo_deaths: int


class Fetch(NamedTuple):
    """The arguments of one call of fetch.lua."""

    lists: Sequence[QueueList]
    max_messages: int
    max_bytes: int
    tag_prefix: str  # no other fetch has it, in this process or elsewhere

    def tags(self) -> list[str]:
        """The tags of all messages that the call may bring, oldest first."""
        return [f"{self.tag_prefix}{number}" for number in range(1, self.max_messages + 1)]

    def messages(self, reply: list[Any]) -> list[Fetched]:
        """The messages in the reply."""
        rows = zip(count(1), reply[1::4], reply[2::4], reply[3::4], reply[4::4], strict=False)
        return [
            Fetched(self.lists[place], f"{self.tag_prefix}{number}", raw, restores, deaths)
            for number, place, raw, restores, deaths in rows
        ]


class Scripts:
    """Runs the scripts on one database. Every method raises what redis-py raises."""

    def __init__(
        self, connect: Callable[[], AbstractContextManager[redis.Redis]], prefix: str, keys: Sequence[str], *names: str
    ) -> None:
        """`keys` are `unacked`, `unacked_index` and `unacked_restores`; all keys get the global `prefix`.

        `names` are what return_to_list.lua makes the keys of lists of.
        """
        self._connect = connect
        self._prefix = prefix
        self._keys = tuple(map(self.key, keys))
        self._shared = (prefix, *names, envelope.ENVELOPE_START, str(MAX_BYTES_PER_CALL))

    def key(self, name: str) -> str:
        """The name of a key with the global prefix."""
        return self._prefix + name

    def fetch_command(self, fetch: Fetch) -> tuple[Any, ...]:
        """The command that runs fetch.lua, for a caller that sends it itself and reads the reply later."""
        keys = (*self._keys, *(source.key for source in fetch.lists))
        limits = (str(fetch.max_messages), str(fetch.max_bytes), fetch.tag_prefix)
        return ("EVALSHA", FETCH.sha, len(keys), *keys, *limits, *(source.record_end for source in fetch.lists))

    def fetch(self, fetch: Fetch) -> list[Any]:
        """Fetch now; returns the reply of fetch.lua."""
        reply: list[Any] = self._execute(FETCH, self.fetch_command(fetch))
        return reply

    def acknowledge(self, tags: Sequence[str], fingerprints: Sequence[str]) -> None:
        """Remove at most MAX_TAGS_PER_CALL messages, and the counts under the `fingerprints` of restored ones."""
        counts = (*fingerprints, *map(_SOLO_ATTEMPTS.__add__, fingerprints))
        self._run(ACKNOWLEDGE, self._keys, str(len(tags)), *tags, *counts)

    def heartbeat(self, tags: Sequence[str]) -> None:
        """Refresh the time of messages in flight, oldest first; other messages are not touched."""
        for start in range(0, len(tags), MAX_TAGS_PER_CALL):
            self._run(HEARTBEAT, self._keys[1:2], str(start), *tags[start : start + MAX_TAGS_PER_CALL])

    def requeue(self, tags: Sequence[str], push: Literal["RPUSH", "LPUSH"] = "RPUSH") -> Iterator[str]:
        """Requeue messages, oldest first in `tags`: served next, or with LPUSH last. Yields each tag once it is done.

        Begins with the newest, as each message is pushed in front of those before it.
        """
        while tags:
            chunk = tags[-MAX_MESSAGES_PER_CALL:]
            left = int(self._run(REQUEUE, self._keys, *self._shared, push, *chunk))
            yield from chunk[left:]
            tags = tags[: len(tags) - len(chunk) + left]

    def restore(self, visibility_timeout: float) -> tuple[int, int, bool]:
        """Restore messages whose last heartbeat is older than `visibility_timeout` seconds.

        Returns how many, how many fit no list and stay, and whether there may be more.
        """
        arguments = (*self._shared, str(visibility_timeout), str(MAX_MESSAGES_PER_CALL))
        restored, stuck, more = self._run(RESTORE, self._keys, *arguments)
        return restored, stuck, bool(more)

    def count_solo_attempts(self, fingerprint: str, change: int) -> None:
        """Add to the number of solo attempts on a message."""
        self._run(COUNT_SOLO_ATTEMPTS, self._keys[2:], _SOLO_ATTEMPTS + fingerprint, str(change))

    def record_undecodable(self, tag: str, record: str) -> None:
        """Replace the record of a message in flight."""
        self._run(RECORD_UNDECODABLE, self._keys[:1], tag, record)

    def _run(self, script: Script, keys: Sequence[str], *arguments: str) -> Any:
        return self._execute(script, ("EVALSHA", script.sha, len(keys), *keys, *arguments))

    def _execute(self, script: Script, command: tuple[Any, ...]) -> Any:
        with self._connect() as client:
            try:
                return _execute(client, *command)
            except exceptions.NoScriptError:  # Redis restarted, and forgot all scripts
                _load(client, script)
                return _execute(client, *command)


def _execute(client: redis.Redis, *command: Any) -> Any:
    # Not client.execute_command: kombu's client adds a global prefix, and only to the first key of a script.
    return redis.Redis.execute_command(client, *command)  # type: ignore[no-untyped-call]


def _load(client: redis.Redis, script: Script) -> None:
    try:
        client.script_load(script.text)
    except exceptions.ResponseError as error:
        if "compiling script" not in str(error):
            raise
        raise RuntimeError(
            f"Redis is too old: use Redis 7.0 or newer, or Valkey. It refused a script: {error}"
        ) from error
