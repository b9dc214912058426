"""A Redis client for the URL of the broker, as Celery writes it. Nothing here knows of events."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from .text import one_line_error
from .urls import UNREADABLE, check_broker

_RETRIES: Final = 3  # of connecting; no command is sent twice


def connect(broker_url: str, *, master_name: str | None = None, timeout: float = 5.0) -> redis.Redis:
    """A client for redis://, rediss:// or sentinel://a:26379;sentinel://b:26379/0. It connects with its first command.

    For Sentinel `master_name`, or ?master_name=… in the URL, names the master; user and password in the URL
    are the master's. Connecting is tried four times, within `timeout` seconds each; a command is sent once.
    Raises ValueError for a URL that cannot be read; the message does not repeat the URL.
    """
    check_broker(broker_url)
    options: dict[str, Any] = {
        "protocol": 2,  # no handshake beyond AUTH: the same on Redis and Valkey of any age
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "socket_keepalive": True,
        "health_check_interval": 10,  # seconds idle after which PING tries a connection before events go through it
        "retry": Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), _RETRIES),
    }
    if broker_url.startswith("sentinel://"):
        return _connect_to_master(broker_url, master_name, options)
    # Celery writes ssl_cert_reqs=CERT_REQUIRED where redis-py writes required.
    for level in ("required", "optional", "none"):
        broker_url = broker_url.replace(f"ssl_cert_reqs=CERT_{level.upper()}", f"ssl_cert_reqs={level}")
    client = redis.Redis.from_url(broker_url, **options)
    pool = client.connection_pool
    try:
        pool.connection_class(**pool.connection_kwargs)  # does not connect, but refuses an option of the URL
    except TypeError:
        raise ValueError(UNREADABLE) from None
    return client


def _connect_to_master(broker_url: str, master_name: str | None, options: dict[str, Any]) -> redis.Redis:
    parts = [urlsplit(part) for part in broker_url.split(";")]
    query = parse_qs(parts[-1].query)
    master_name = master_name or query.get("master_name", [None])[0]
    if master_name is None:
        raise ValueError("a sentinel:// URL needs the master's name: add ?master_name=… to it")
    account = next((part for part in parts if part.password), parts[0])
    # redis-py has no types for Sentinel.
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [(part.hostname or "localhost", part.port or 26379) for part in parts],
        sentinel_kwargs={
            **options,
            "retry": Retry(ExponentialWithJitterBackoff(), 0),
        },  # the next sentinel is the retry
    )
    master: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
        master_name,
        db=int(parts[-1].path.strip("/") or 0),
        username=unquote(account.username) if account.username else None,
        password=unquote(account.password) if account.password else None,
        **options,
    )
    return master


def unusable(address: str, error: Exception) -> str:
    """The sentence, without its full stop, for a Redis that is unreachable or refuses the login."""
    return f"Redis at {address} cannot be used ({one_line_error(error)})"
