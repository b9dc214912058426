"""The Lua that moves messages inside Redis: each script happens as one step, and no content makes it fail.

Below `fetching.py`; the scripts themselves are in `lua/`. All of them may run while Redis is full: they free memory, or
move what is there, and a worker that could not fetch or acknowledge would keep Redis full for ever. They need Redis 7.0
or Valkey.
"""
# mypy: disallow-subclassing-any=False

from __future__ import annotations

import hashlib
from importlib import import_module
from importlib.resources import files
from typing import Any, NamedTuple

from redis import exceptions

from worker.transport import envelope
from worker.transport.pending import PendingBrokerOps
from worker.transport.qos import QoS

stock: Any = import_module("kombu.transport.redis")

#: Redis 7's way to say that a script may write over `maxmemory`; it has to be the first line.
_SHEBANG = "#!lua flags=allow-oom\n"


class Script(NamedTuple):
    """A script, and the sha1 under which Redis knows it once it was loaded."""

    text: str
    sha: str


def _script(*names: str) -> Script:
    folder = files("worker.transport") / "lua"
    text = _SHEBANG + "\n".join((folder / f"{name}.lua").read_text() for name in names)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


FETCH = _script("fetch")
ACKNOWLEDGE = _script("acknowledge")
COUNT = _script("count")
TOUCH = _script("touch")
SHIELD = _script("shield")
RESTORE = _script("put_back", "restore")
REQUEUE = _script("put_back", "requeue")

#: Bytes per call that puts messages back; the caller calls again until all is done.
BYTES_PER_CALL = 1 << 20


class ScriptedChannel(stock.Channel):
    """A channel that can run them."""

    QoS = QoS

    unacked_restores_key = "unacked_restores"
    from_transport_options = (*stock.Channel.from_transport_options, "unacked_restores_key")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        client = self.connection.client
        broker = tuple(sorted(client.alt)) or (client.hostname, client.port)  # sorted: kombu moves on from host to host
        self.owed = PendingBrokerOps.of((broker, client.virtual_host, self._key(self.unacked_key)))

    def settle(self) -> None:
        """Tell Redis what this process owes it, see `PendingBrokerOps`. Raises when Redis does, and keeps the rest."""
        if self.owed:
            self.owed.settle(self)

    def acknowledge(self, arguments: list[str]) -> None:
        """Run acknowledge.lua with these arguments."""
        self._run(ACKNOWLEDGE, [self.unacked_key, self.unacked_index_key, self.unacked_restores_key], arguments)

    def count(self, field: str, by: int) -> None:
        """Run count.lua with these arguments."""
        self._run(COUNT, [self.unacked_restores_key], [field, str(by)])

    def touch(self, arguments: list[str]) -> None:
        """Run touch.lua with these arguments."""
        self._run(TOUCH, [self.unacked_index_key], arguments)

    def restore(self, arguments: list[str]) -> Any:
        """Run restore.lua with these arguments behind the common ones."""
        return self._put_back(RESTORE, arguments)

    def requeue(self, arguments: list[str]) -> Any:
        """Run requeue.lua with these arguments behind the common ones."""
        return self._put_back(REQUEUE, arguments)

    def _put_back(self, script: Script, arguments: list[str]) -> Any:
        keys = [self.unacked_key, self.unacked_index_key, self.unacked_restores_key]
        bindings = self.keyprefix_queue % ("",)
        common = [self.global_keyprefix, self.sep, bindings, envelope.ENVELOPE_START, str(BYTES_PER_CALL)]
        return self._run(script, keys, [*common, *arguments])

    def _run(self, script: Script, keys: list[str], arguments: list[str]) -> Any:
        # kombu's client with a global prefix prefixes the first key of a script and no other.
        first, *others = keys
        with self.conn_or_acquire() as client:
            call = (script.sha, len(keys), first, *map(self._key, others), *arguments)
            try:
                return client.evalsha(*call)
            except exceptions.NoScriptError:
                self._load(script)
                return client.evalsha(*call)

    def _load(self, script: Script) -> None:
        """Let Redis know a script: it forgets them when it restarts."""
        try:
            with self.conn_or_acquire() as client:
                client.script_load(script.text)
        except exceptions.ResponseError as error:
            if "compiling script" not in str(error):
                raise
            raise RuntimeError(f"This Redis is too old: use Redis 7.0 or newer, or Valkey. It says: {error}") from error

    def _key(self, name: str) -> str:
        return f"{self.global_keyprefix}{name}"
