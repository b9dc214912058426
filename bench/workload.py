"""The events: half accruals, half burns that the balances cover, each with small metadata and a new key."""

from __future__ import annotations

import uuid
from decimal import Decimal
from random import Random
from typing import Final

import psycopg

from schema.events import Accrual, Burn, Event

#: Each account's legacy balance: it covers every burn, in whatever order the events arrive.
OPENING_BALANCE: Final = Decimal(1_000_000)


def open_accounts(database_url: str, users: int) -> None:
    """Insert the accounts `user-0`, `user-1` … with a balance of the legacy schema."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO account (user_id, balance) SELECT 'user-' || n, %s FROM generate_series(0, %s) AS n",
            (OPENING_BALANCE, users - 1),
        )
        connection.execute("UPDATE global_token_balance SET balance = %s WHERE id = 0", (OPENING_BALANCE * users,))


def events(count: int, users: int, *, seed: int = 1) -> list[Event]:
    """`count` events of `users` users, the same for the same seed."""
    random = Random(seed)
    result: list[Event] = []
    for number in range(count):
        user_id = f"user-{random.randrange(users)}"
        key = str(uuid.UUID(int=random.getrandbits(128), version=4))
        details = f'{{"order":{number},"plan":"pro"}}'
        # Validation is not measured, so the events skip it.
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
        result.append(event)
    return result
