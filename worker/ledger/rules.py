"""The rules: whether an event may move a balance, and the balance after it. No I/O, no clock."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Context, Decimal, Inexact, InvalidOperation
from enum import StrEnum
from typing import Final

#: The context of all money arithmetic. Python's default context keeps 28 digits, rounds silently, and differs between
#: threads; balances have up to 38 digits and their sums more.
MONEY: Final = Context(prec=60, traps=[Inexact, InvalidOperation])

#: A balance has at most 20 digits before the point: what NUMERIC(38,18) holds.
BALANCE_LIMIT: Final = Decimal(10) ** 20

#: How far a producer's clock may be ahead of PostgreSQL's.
CLOCK_TOLERANCE: Final = timedelta(days=1)


class Reason(StrEnum):
    """Why an event is rejected, in order of precedence."""

    INSUFFICIENT_TOKENS = "insufficient_tokens"  # the account holds less than the burn asks for
    BALANCE_LIMIT = "balance_limit"  # the balance would pass 20 digits


def decide(kind: str, amount: Decimal, balance: Decimal) -> Decimal | Reason:
    """The balance after an event of `amount` on `balance`, or the reason to reject the event."""
    if kind == "burn":
        return MONEY.subtract(balance, amount) if amount <= balance else Reason.INSUFFICIENT_TOKENS
    after = MONEY.add(balance, amount)
    return after if after < BALANCE_LIMIT else Reason.BALANCE_LIMIT


def too_far_ahead(occurred_at: datetime | None, now: datetime) -> bool:
    """Whether an event claims a time further ahead than CLOCK_TOLERANCE. Checked at its first decision only."""
    return occurred_at is not None and occurred_at > now + CLOCK_TOLERANCE
