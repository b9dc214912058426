"""What the tests of the transport do to lists and records in Redis."""

from __future__ import annotations

from contextlib import contextmanager

from tests.kit.proxy import Proxy
from tests.kit.wait import eventually


def push(broker, *messages, to="tokens"):
    for each in messages:
        broker.lpush(to, each)


def listed(broker, name="tokens"):
    """The messages on a list, the next one to be served first."""
    return broker.lrange(name, 0, -1)[::-1]


def stop_heartbeats(broker, seconds=1000):
    """Make the last heartbeat of all messages in flight `seconds` older."""
    for tag, score in broker.zrange("unacked_index", 0, -1, withscores=True):
        broker.zadd("unacked_index", {tag: score - seconds})


def stop_fetching(consumer):
    """Pause a consumer, and wait until its last fetch is answered."""
    consumer.channel.pause()
    eventually(lambda: consumer.turn() or not consumer.channel._in_poll)


@contextmanager
def of_wrong_type(broker, name):
    """Let Redis refuse to work with a key for a while."""
    broker.rename(name, f"{name}, put aside")
    broker.set(name, "of a wrong type")
    yield
    broker.delete(name)
    broker.rename(f"{name}, put aside", name)


class Interceptor(Proxy):
    """Calls `action` once, when bytes with `trigger` in them pass. If it raises OSError, the connection is cut."""

    def __init__(self, target, trigger, action):
        self._trigger, self._action = trigger, action
        super().__init__(target)

    def transform(self, data):
        if self._trigger in data and self._action:
            self._action, action = None, self._action
            action()
        return data
