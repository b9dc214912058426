"""The Redis that the tests of the transport work on, and what they may change in kombu."""

import kombu.transport
import pytest
import redis


@pytest.fixture
def broker(broker_url):
    with redis.Redis.from_url(broker_url) as client:
        yield client


@pytest.fixture
def own_aliases(monkeypatch):
    """What `register` changes is changed for this test only."""
    for name in ("TRANSPORT_ALIASES", "_transport_cache"):
        monkeypatch.setattr(kombu.transport, name, dict(getattr(kombu.transport, name)))
