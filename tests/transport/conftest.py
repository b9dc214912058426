"""The Redis that the tests of the transport work on."""

import pytest
import redis


@pytest.fixture
def broker(broker_url):
    with redis.Redis.from_url(broker_url) as client:
        yield client
