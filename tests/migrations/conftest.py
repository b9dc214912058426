"""What tests of migrations share."""

from __future__ import annotations

import pytest


@pytest.fixture
def tokentrail_migrate(tokentrail):
    """`tokentrail_migrate(url, "stamp")` runs `tokentrail migrate stamp`; the URL None stands for no DATABASE_URL."""
    return lambda url, *arguments: tokentrail("migrate", *arguments, DATABASE_URL=url)
