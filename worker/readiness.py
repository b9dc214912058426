"""The checks before a worker starts: both servers can be used, and Redis keeps what is in its queue."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import psycopg
from redis.exceptions import RedisError, ResponseError

from schema.broker import connect as connect_broker
from schema.broker import unusable
from schema.text import one_line_error
from schema.urls import public_address
from worker.config import ConfigError
from worker.db import connect
from worker.errors import TokentrailError
from worker.schema_version import check_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from worker.config import Settings

#: Older ones ignore a script's flag allow-oom, without which the queue of a full Redis cannot be emptied.
MIN_REDIS_VERSION: Final = (7, 0)

#: Part of libpq's message, for a refused connection has no SQLSTATE → what to do.
_ADVICE_BY_MESSAGE: Final = {
    "too many c": "raise its limit of connections, or end some of them",  # clients; connections for a role, a database
    "connection slots are reserved": "raise its limit of connections, or end some of them",
    "No space left on device": "free some space on its disk",
    "the database system is": "try again once it is up",  # starting up, shutting down, in recovery mode
}
_DEFAULT_ADVICE: Final = "check that it runs, and that DATABASE_URL is right"


class NotReady(TokentrailError):
    """A server or a port that the command needs cannot be used; the message names it."""


def check_servers(settings: Settings) -> list[str]:
    """Return warnings, one sentence each.

    Raises NotReady, SchemaError or ConfigError where a worker could not keep its promises.
    """
    return [*_check_postgresql(settings), *check_broker(settings.broker())]


def check_broker(url: str) -> list[str]:
    """As `check_servers`, for Redis alone."""
    return list(_check_redis(url))


def postgresql_unreachable(error: psycopg.OperationalError) -> str:
    """One sentence for a PostgreSQL that is unreachable or refuses the connection."""
    message = one_line_error(error)
    advice = next((advice for part, advice in _ADVICE_BY_MESSAGE.items() if part in message), _DEFAULT_ADVICE)
    return f"PostgreSQL cannot be used ({message}): {advice}."


def _check_postgresql(settings: Settings) -> Iterator[str]:
    try:
        with connect(settings.database(), settings) as connection:
            if warning := check_schema(connection):
                yield warning
    except psycopg.OperationalError as error:
        raise NotReady(postgresql_unreachable(error)) from error


def _check_redis(url: str) -> Iterator[str]:
    where = f"Redis at {public_address(url)}"
    try:
        with connect_broker(url) as broker:
            broker.ping()
            try:
                info = dict(broker.info())
            except ResponseError as error:  # an ACL, or a service that hides it
                why = one_line_error(error)
                yield f"{where} does not report its settings ({why}): check yourself that it never evicts keys."
                return
            yield from _check_durability(where, info, broker)
    except (RedisError, OSError) as error:
        raise NotReady(
            f"{unusable(public_address(url), error)}: check that it runs, and that BROKER_URL is right."
        ) from error
    except ValueError as error:
        raise ConfigError(f"BROKER_URL is not usable: {error}.") from error


def _check_durability(where: str, info: dict[str, Any], broker: redis.Redis) -> Iterator[str]:
    """Warn of settings with which Redis loses messages. A setting that INFO leaves out is taken for right."""
    version = str(info.get("redis_version", ""))
    if (numbers := re.match(r"(\d+)\.(\d+)", version)) and tuple(map(int, numbers.groups())) < MIN_REDIS_VERSION:
        raise NotReady(
            f"{where} has version {version}, which is too old: tokentrail needs Redis 7.0 or newer, or Valkey."
        )
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys-"):
        raise NotReady(
            f"{where} has maxmemory-policy {policy}, so a full Redis drops whole queues with their"
            " messages: set it to noeviction."
        )
    if policy != "noeviction":
        yield f"{where} has maxmemory-policy {policy}: tokentrail is tested with noeviction, so set that."
    if info.get("aof_enabled") == 0:
        yield f"{where} has appendonly no, so a crash loses messages: set it to yes, and appendfsync to always."
        return
    try:
        sync = broker.config_get("appendfsync").get("appendfsync", "always")
    except ResponseError:  # managed services forbid CONFIG, and set this themselves
        return
    if sync != "always":
        yield (
            f"{where} has appendfsync {sync}, so a failure of its machine loses the newest messages: set it to"
            " always, or publish again with the same keys after a failure."
        )
