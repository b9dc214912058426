"""What PostgreSQL holds of a demo: how many of its events are decided, and the books at its end."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Final, NamedTuple

from schema.canonical import plain_number
from worker.output import history_table, moment, printable, supply_table, table, tokens
from worker.read.pages import RECORDS, read_page
from worker.read.supply import Supply, read_supply

if TYPE_CHECKING:
    import psycopg
    from rich.console import Console

    from schema.responses import TransactionHistory
    from worker.local.demo.economy import Economy

#: The keys of one run are adjacent in each user's part of the unique index.
_RUN: Final = "user_id = ANY(%(users)s) AND idempotency_key >= %(first)s AND idempotency_key < %(end)s"

_DECIDED: Final = f"""
    SELECT (SELECT count(*) FROM transaction_record WHERE {_RUN})
         + (SELECT count(*) FROM rejected_event WHERE {_RUN})
         + (SELECT count(*) FROM dead_letter WHERE {_RUN})
"""  # noqa: S608 - no text from outside

_OUTCOMES: Final = f"""
    SELECT 'applied', type, NULL, count(*), sum(amount) FROM transaction_record WHERE {_RUN} GROUP BY type
    UNION ALL
    SELECT 'rejected', type, reason, count(*), sum(amount) FROM rejected_event WHERE {_RUN} GROUP BY type, reason
    UNION ALL
    SELECT 'dead-lettered', NULL, reason, count(*), NULL FROM dead_letter WHERE {_RUN} GROUP BY reason
    ORDER BY 1, 2, 3
"""  # noqa: S608 - no text from outside

_TOP: Final = """
    SELECT user_id, balance, sequence, rejections, last_recorded_at FROM account
    WHERE user_id = ANY(%(users)s) ORDER BY balance DESC, user_id LIMIT 8
"""

_HELD: Final = "SELECT coalesce(sum(balance - opening_balance), 0) FROM account WHERE sequence > 0"


def count_decided(connection: psycopg.Connection, economy: Economy) -> int:
    """How many of the events have an outcome."""
    row = connection.execute(_DECIDED, _key_range(economy)).fetchone()
    assert row is not None  # an aggregate has one row
    return int(row[0])


class Account(NamedTuple):
    """One of the accounts with the highest balances."""

    user_id: str
    balance: Decimal
    records: int
    rejections: int
    last_recorded_at: datetime | None


class OutcomeCount(NamedTuple):
    """How many events have one outcome, and their tokens: None for dead letters, whose amounts may be unreadable."""

    outcome: str
    type: str | None
    reason: str | None
    events: int
    tokens: Decimal | None


class Report(NamedTuple):
    """The books after a run, read in one snapshot."""

    outcomes: list[OutcomeCount]
    repeated: int  # deliveries of events that were already decided
    top_accounts: list[Account]
    supply: Supply
    held: Decimal  # by all accounts, without their opening balances from the legacy schema
    user_id: str
    history: TransactionHistory

    @property
    def balanced(self) -> bool:
        """Whether the supply equals the sum of the accounts' balances."""
        return self.supply.circulating == self.held

    def json_text(self) -> str:
        """The report as one JSON object; amounts are text."""
        fields = {
            "outcomes": [outcome._asdict() for outcome in self.outcomes],
            "deliveredAgain": self.repeated,
            "balances": [
                {
                    "userId": account.user_id,
                    "balance": account.balance,
                    "records": account.records,
                    "rejections": account.rejections,
                    "lastRecordedAt": account.last_recorded_at,
                }
                for account in self.top_accounts
            ],
            "supply": self.supply._asdict(),
            "held": self.held,
            "balanced": self.balanced,
            "userId": self.user_id,
            "history": json.loads(self.history.json_text()),
        }
        return json.dumps(fields, default=_as_text)


async def read(connection: psycopg.AsyncConnection, economy: Economy, published: int) -> Report:
    """The books of this run; `published` counts its deliveries, repeated ones included."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        outcomes = [OutcomeCount(*row) async for row in await connection.execute(_OUTCOMES, _key_range(economy))]
        top_accounts = [Account(*row) async for row in await connection.execute(_TOP, _key_range(economy))]
        supply = await read_supply(connection)
        held = await (await connection.execute(_HELD)).fetchone()
        user = economy.users[0]
        history = await read_page(connection, RECORDS, user, page=1, limit=10)
    assert held is not None  # an aggregate has one row
    return Report(outcomes, published - economy.size, top_accounts, supply, held[0], user, history)


def show(report: Report, console: Console) -> None:
    """Print the books as tables."""
    outcomes = table("What became of them", outcome="left", what="left", reason="left", events="right", tokens="right")
    for outcome, kind, reason, count, amount in report.outcomes:
        outcomes.add_row(outcome, kind or "", reason or "", f"{count:,}", tokens(amount) if amount is not None else "")
    outcomes.add_row("delivered again", "", "already decided", f"{report.repeated:,}", "0")
    console.print(outcomes)
    console.print()

    balances = table("Balances", user="left", balance="right", records="right", rejections="right", last_record="left")
    for name, balance, records, rejections, last in report.top_accounts:
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


def _key_range(economy: Economy) -> dict[str, object]:
    # "." follows "-" in ASCII, so the range holds exactly the keys that start with the prefix.
    return {"users": economy.users, "first": economy.prefix, "end": f"{economy.prefix[:-1]}."}
