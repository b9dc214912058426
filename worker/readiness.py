"""What a worker looks at before it starts: that both servers let it in, and keep what it is going to rely on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import psycopg
from redis.exceptions import RedisError, ResponseError

from schema.publisher import connect as connect_broker
from schema.publisher import unreachable
from schema.urls import said, shown
from worker.config import ConfigError
from worker.db import connect
from worker.schema_version import check_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from worker.config import Settings

#: The oldest Redis whose scripts know the flag allow-oom, without which a full one could not be drained.
_OLDEST_REDIS: Final = (7, 0)

_MORE_CONNECTIONS: Final = "raise its limit of connections, or end some of them"
#: What a PostgreSQL that runs says when it lets nobody in, which has no SQLSTATE then, and what helps.
_OF_CONNECTING: Final = {
    "too many c": _MORE_CONNECTIONS,  # clients, connections for a role or a database
    "connection slots are reserved": _MORE_CONNECTIONS,
    "No space left on device": "free some space on its disk",
    "the database system is": "try again once it is up",  # starting up, shutting down, in recovery mode
}
_OTHERWISE: Final = "check that it runs, and that DATABASE_URL is right"


class NotReady(Exception):
    """What the command needs is unreachable or taken; the message says what. Exit code 1."""


def look_at_servers(settings: Settings) -> list[str]:
    """Sentences to warn with, none when all is well.

    Raises NotReady, SchemaError or ConfigError, in one sentence, where a worker could not keep its promises.
    """
    return [*_database(settings), *look_at_broker(settings.broker())]


def _database(settings: Settings) -> Iterator[str]:
    try:
        with connect(settings.database(), settings) as connection:
            if warning := check_schema(connection):
                yield warning
    except psycopg.OperationalError as error:
        raise NotReady(no_database(error)) from error


def no_database(error: psycopg.OperationalError) -> str:
    """One sentence for a PostgreSQL that is away, or does not let us in."""
    why = said(error)
    advice = next((advice for words, advice in _OF_CONNECTING.items() if words in why), _OTHERWISE)
    return f"PostgreSQL cannot be used ({why}): {advice}."


def look_at_broker(url: str) -> list[str]:
    """As `look_at_servers`, of Redis alone."""
    return list(_broker(url))


def _broker(url: str) -> Iterator[str]:
    where = f"Redis at {shown(url)}"
    try:
        with connect_broker(url) as broker:
            broker.ping()
            try:
                found = dict(broker.info())
            except ResponseError as error:  # an ACL, or a service that hides it
                yield f"{where} does not say how it is set up ({said(error)}): see yourself that it never evicts keys."
                return
            yield from _durability(where, found, broker)
    except (RedisError, OSError) as error:
        raise NotReady(
            f"{unreachable(shown(url), error)[:-1]}: check that it runs, and that BROKER_URL is right."
        ) from error
    except ValueError as error:
        raise ConfigError(f"BROKER_URL is not usable: {error}.") from error


def _durability(where: str, found: dict[str, Any], broker: redis.Redis) -> Iterator[str]:
    """Whether what is in the queue stays there. Where INFO leaves something out, nothing is said about it."""
    version = str(found.get("redis_version", ""))
    if (numbers := re.match(r"(\d+)\.(\d+)", version)) and tuple(map(int, numbers.groups())) < _OLDEST_REDIS:
        raise NotReady(
            f"{where} has version {version}, which is too old: tokentrail needs Redis 7.0 or newer, or Valkey."
        )
    policy = str(found.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys-"):
        raise NotReady(
            f"{where} has maxmemory-policy {policy}, so that it forgets queues with all their messages when it is"
            " full: set it to noeviction."
        )
    if policy != "noeviction":
        yield f"{where} has maxmemory-policy {policy}: noeviction is what the queue is tried with, so set that."
    if found.get("aof_enabled") == 0:
        yield f"{where} has appendonly no, so that a crash loses messages: set it to yes, and appendfsync to always."
        return
    try:
        sync = broker.config_get("appendfsync").get("appendfsync", "always")
    except ResponseError:  # services forbid CONFIG, and see to it themselves
        return
    if sync != "always":
        yield (
            f"{where} has appendfsync {sync}, so that the newest messages are lost when its machine fails: set it to"
            " always, or publish again with the same keys after a failure."
        )
