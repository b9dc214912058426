"""How many tokens there are: what the stripes of the global balance add up to."""

from __future__ import annotations

from decimal import Decimal
from typing import Final, NamedTuple

from psycopg import Connection

#: One statement, so that the numbers are of one moment, and PostgreSQL's arithmetic: Python's would round at 28 digits.
SUPPLY: Final = """
    SELECT coalesce(sum(issued), 0), coalesce(sum(burned), 0), coalesce(sum(issued - burned), 0),
           coalesce(sum(balance) FILTER (WHERE issued IS NULL), 0)
    FROM global_token_balance
"""


class Supply(NamedTuple):
    """Tokens since the trail began, all exact; `legacy` is what the global balance held before it, kept apart."""

    issued: Decimal
    burned: Decimal
    circulating: Decimal  # issued - burned
    legacy: Decimal


def read_supply(connection: Connection) -> Supply:
    """The supply of this moment."""
    row = connection.execute(SUPPLY).fetchone()
    assert row is not None  # an aggregate has one row
    return Supply(*row)
