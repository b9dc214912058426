"""What PostgreSQL says about a demo's events: counts while it runs, tables when all is decided."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from worker.read.history import read_history_now
from worker.read.supply import read_supply
from worker.show import history_table, moment, printable, supply_table, table, tokens

if TYPE_CHECKING:
    import psycopg
    from rich.console import Console

    from worker.demo.economy import Economy

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


def show(connection: psycopg.Connection, economy: Economy, arriving: int, console: Console) -> bool:
    """Print the tables, all of one moment; whether the supply is what the accounts hold."""
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        outcomes = connection.execute(_OUTCOMES, _mine(economy)).fetchall()
        top = connection.execute(_TOP, _mine(economy)).fetchall()
        supply = read_supply(connection)
        held = connection.execute(_HELD).fetchone()
        user = economy.users[0]
        history = read_history_now(connection, user, page=1, limit=10)
    assert held is not None  # an aggregate has one row

    fates = table("What became of them", outcome="left", what="left", reason="left", events="right", tokens="right")
    for outcome, kind, reason, count, amount in outcomes:
        fates.add_row(outcome, kind or "", reason or "", f"{count:,}", tokens(amount) if amount is not None else "")
    fates.add_row("delivered again", "", "already decided", f"{arriving - economy.size:,}", "0")
    console.print(fates)
    console.print()

    balances = table("Balances", user="left", balance="right", records="right", rejections="right", last_record="left")
    for name, balance, records, rejections, last in top:
        balances.add_row(
            printable(name), tokens(balance), f"{records:,}", f"{rejections:,}", moment(last) if last else "never"
        )
    console.print(balances)
    console.print()
    console.print(supply_table(supply))
    console.print()
    console.print(history_table(user, history))
    console.print()
    if supply.circulating != held[0]:
        console.print(
            f"The supply {tokens(supply.circulating)} is not the {tokens(held[0])} that the accounts hold!",
            style="bold red",
        )
        return False
    console.print(
        f"Supply {tokens(supply.circulating)} = Σ balances {tokens(held[0])}: every token is accounted for.",
        style="bold green",
    )
    return True


def _mine(economy: Economy) -> dict[str, object]:
    # "." is the character after "-": every key that begins with the prefix lies between the two.
    return {"users": economy.users, "first": economy.prefix, "behind": f"{economy.prefix[:-1]}."}
