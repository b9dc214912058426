"""How many tokens there are: the sum over the stripes of the global balance."""

from __future__ import annotations

from decimal import Decimal
from typing import Final, NamedTuple

from psycopg import AsyncConnection

#: One statement, so that all numbers are of one moment. PostgreSQL adds up, for Python would round at 28 digits.
SUPPLY: Final = """
    SELECT coalesce(sum(issued), 0), coalesce(sum(burned), 0), coalesce(sum(issued - burned), 0),
           coalesce(sum(balance) FILTER (WHERE issued IS NULL), 0)
    FROM global_token_balance
"""


class Supply(NamedTuple):
    """Tokens since the audit trail began, all exact. `legacy`, the balance before it, is kept apart."""

    issued: Decimal
    burned: Decimal
    circulating: Decimal  # issued - burned
    legacy: Decimal


async def read_supply(connection: AsyncConnection) -> Supply:
    """The current supply."""
    row = await (await connection.execute(SUPPLY)).fetchone()
    assert row is not None  # an aggregate has one row
    return Supply(*row)
