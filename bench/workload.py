"""The events: half accruals, half burns that the balances cover, small metadata, a new key each."""

from __future__ import annotations

import uuid
from decimal import Decimal
from random import Random
from typing import Final

import psycopg

from schema.events import Accrual, Burn, Event

#: What each account holds beforehand, from before the trail: every burn is covered, in whatever order they come.
OPENING: Final = Decimal(1_000_000)


def open_accounts(database_url: str, users: int) -> None:
    """Make the accounts `user-0`, `user-1` …, as a system has them whose trail begins now."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO account (user_id, balance) SELECT 'user-' || n, %s FROM generate_series(0, %s) AS n",
            (OPENING, users - 1),
        )
        connection.execute("UPDATE global_token_balance SET balance = %s WHERE id = 0", (OPENING * users,))


def events(count: int, users: int, *, seed: int = 1) -> list[Event]:
    """So many events of so many users, the same for the same seed."""
    random = Random(seed)
    made: list[Event] = []
    for number in range(count):
        user_id = f"user-{random.randrange(users)}"
        key = str(uuid.UUID(int=random.getrandbits(128), version=4))
        details = f'{{"order":{number},"plan":"pro"}}'
        # Checked already, by whoever makes the keys: building them is no part of what is measured.
        if number % 2:
            amount = Decimal(random.randint(1, 10**9)) / 10**7
            event: Event = Burn.model_construct(
                user_id=user_id, amount=amount, idempotency_key=key, metadata=details, action="completion"
            )
        else:
            amount = Decimal(random.randint(1, 10**9)) / 10**6
            event = Accrual.model_construct(
                user_id=user_id, amount=amount, idempotency_key=key, metadata=details, source="purchase"
            )
        made.append(event)
    return made
