"""What PostgreSQL says about a demo's events: counts while it runs, tables when all is decided."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Final, NamedTuple

from schema.canonical import plain_number
from worker.output import history_table, moment, printable, supply_table, table, tokens
from worker.read.history import read_history_now
from worker.read.supply import Supply, read_supply

if TYPE_CHECKING:
    import psycopg
    from rich.console import Console

    from schema.responses import TransactionHistory
    from worker.local.demo.economy import Economy

#: Keys of one run lie side by side in each user's part of the unique index.
_MINE: Final = "user_id = ANY(%(users)s) AND idempotency_key >= %(first)s AND idempotency_key < %(behind)s"

_DECIDED: Final = f"""
    SELECT (SELECT count(*) FROM transaction_record WHERE {_MINE})
         + (SELECT count(*) FROM rejected_event WHERE {_MINE})
         + (SELECT count(*) FROM dead_letter WHERE {_MINE})
"""  # noqa: S608 - our own text

_OUTCOMES: Final = f"""
    SELECT 'applied', type, NULL, count(*), sum(amount) FROM transaction_record WHERE {_MINE} GROUP BY type
    UNION ALL
    SELECT 'rejected', type, reason, count(*), sum(amount) FROM rejected_event WHERE {_MINE} GROUP BY type, reason
    UNION ALL
    SELECT 'dead-lettered', NULL, reason, count(*), NULL FROM dead_letter WHERE {_MINE} GROUP BY reason
    ORDER BY 1, 2, 3
"""  # noqa: S608 - our own text

_TOP: Final = """
    SELECT user_id, balance, sequence, rejections, last_recorded_at FROM account
    WHERE user_id = ANY(%(users)s) ORDER BY balance DESC, user_id LIMIT 8
"""

_HELD: Final = "SELECT coalesce(sum(balance - opening_balance), 0) FROM account WHERE sequence > 0"


def decided(connection: psycopg.Connection, economy: Economy) -> int:
    """How many of the events have an outcome."""
    row = connection.execute(_DECIDED, _mine(economy)).fetchone()
    assert row is not None  # an aggregate has one row
    return int(row[0])


class Account(NamedTuple):
    """One of the accounts that hold most."""

    user_id: str
    balance: Decimal
    records: int
    rejections: int
    last_recorded_at: datetime | None


class Fate(NamedTuple):
    """How many events ended in one way, and their tokens: None where their amounts could not be read."""

    outcome: str
    type: str | None
    reason: str | None
    events: int
    tokens: Decimal | None


class Report(NamedTuple):
    """The books after a run, all of one moment."""

    fates: list[Fate]
    repeated: int  # deliveries of events that were decided already
    top: list[Account]
    supply: Supply
    held: Decimal  # by all accounts, beyond what they held before the trail
    user_id: str
    history: TransactionHistory

    @property
    def balanced(self) -> bool:
        """Whether the supply is what the accounts hold."""
        return self.supply.circulating == self.held

    def json_text(self) -> str:
        """All of it as one JSON object; amounts are text."""
        found = {
            "outcomes": [fate._asdict() for fate in self.fates],
            "deliveredAgain": self.repeated,
            "balances": [
                {
                    "userId": account.user_id,
                    "balance": account.balance,
                    "records": account.records,
                    "rejections": account.rejections,
                    "lastRecordedAt": account.last_recorded_at,
                }
                for account in self.top
            ],
            "supply": self.supply._asdict(),
            "held": self.held,
            "balanced": self.balanced,
            "userId": self.user_id,
            "history": json.loads(self.history.json_text()),
        }
        return json.dumps(found, default=_as_text)


def read(connection: psycopg.Connection, economy: Economy, arriving: int) -> Report:
    """What PostgreSQL says about the run."""
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        fates = [Fate(*row) for row in connection.execute(_OUTCOMES, _mine(economy))]
        top = [Account(*row) for row in connection.execute(_TOP, _mine(economy))]
        supply = read_supply(connection)
        held = connection.execute(_HELD).fetchone()
        user = economy.users[0]
        history = read_history_now(connection, user, page=1, limit=10)
    assert held is not None  # an aggregate has one row
    return Report(fates, arriving - economy.size, top, supply, held[0], user, history)


def show(report: Report, console: Console) -> None:
    """Print the books as tables."""
    fates = table("What became of them", outcome="left", what="left", reason="left", events="right", tokens="right")
    for outcome, kind, reason, count, amount in report.fates:
        fates.add_row(outcome, kind or "", reason or "", f"{count:,}", tokens(amount) if amount is not None else "")
    fates.add_row("delivered again", "", "already decided", f"{report.repeated:,}", "0")
    console.print(fates)
    console.print()

    balances = table("Balances", user="left", balance="right", records="right", rejections="right", last_record="left")
    for name, balance, records, rejections, last in report.top:
        balances.add_row(
            printable(name), tokens(balance), f"{records:,}", f"{rejections:,}", moment(last) if last else "never"
        )
    console.print(balances)
    console.print()
    console.print(supply_table(report.supply))
    console.print()
    console.print(history_table(report.user_id, report.history))
    console.print()
    circulating, held = tokens(report.supply.circulating), tokens(report.held)
    if report.balanced:
        console.print(f"Supply {circulating} = Σ balances {held}: every token is accounted for.", style="bold green")
    else:
        console.print(f"The supply {circulating} is not the {held} that the accounts hold!", style="bold red")


def _as_text(value: object) -> str:
    if isinstance(value, Decimal):
        return plain_number(value)
    assert isinstance(value, datetime)
    return value.isoformat().replace("+00:00", "Z")


def _mine(economy: Economy) -> dict[str, object]:
    # "." is the character after "-": every key that begins with the prefix lies between the two.
    return {"users": economy.users, "first": economy.prefix, "behind": f"{economy.prefix[:-1]}."}
