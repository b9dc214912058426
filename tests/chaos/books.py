"""What a test publishes, and the expected outcomes and balances."""

from __future__ import annotations

import json
import random
import uuid
from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING

from schema.events import Accrual, Burn
from tests.kit.messages import message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schema.events import Event

APPLIED, REJECTED, DEAD_LETTER = "transaction_record", "rejected_event", "dead_letter"

#: Accounts that all workers share, and the balance that each gets first, so that none of its burns can fail.
ACCOUNTS, OPENING_BALANCE = 40, 10**9


class Books:
    """Events made from a seed, and the one outcome that each key must have, in whatever order they are decided."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.expected: dict[tuple[str | None, str | None], str] = {}
        self.balances: Counter[str] = Counter()
        self.messages = 0
        self._pairs = 0

    def opening(self) -> list[Event]:
        """The opening balances of the shared accounts; apply them before anything else is published."""
        return [self._accrual(f"u{n}", OPENING_BALANCE) for n in range(ACCOUNTS)]

    def uncovered(self, count: int) -> list[Event]:
        """Burns that no accrual covers: each is parked for its patience, then rejected."""
        return [self._burn(f"h{n}", 1, REJECTED) for n in range(count)]

    def invalid(self) -> bytes:
        """A message that can be decoded and whose event is invalid: a dead letter."""
        key = self._key()
        self.expected["invalid", key] = DEAD_LETTER
        self.messages += 1
        kwargs = {"user_id": "invalid", "idempotency_key": key, "amount": "1e5", "action": "mistake"}
        headers = {"task": "tokens.burn", "id": str(uuid.uuid4())}
        return message(headers=headers, body=json.dumps([[], kwargs, {}]))

    def undecodable(self) -> bytes:
        """Bytes that are no message: a dead letter without user and key."""
        self.expected[None, None] = DEAD_LETTER
        self.messages += 1
        return b"\xff: no message at all"

    def single(self) -> Event:
        """An accrual that nothing depends on."""
        self.messages += 1
        return self._accrual("single", self.random.randint(1, 1000))

    def poison(self) -> Event:
        """An accrual that kills each worker that applies it, and becomes a dead letter."""
        self.messages += 1
        event = self._accrual("poison", 1)
        self.expected["poison", event.idempotency_key] = DEAD_LETTER
        self.balances["poison"] = 0
        return event

    def pair(self) -> list[Event]:
        """An accrual, and the burn that spends all of it."""
        self._pairs += 1
        amount = self.random.randint(1, 1000)
        return [self._accrual(f"p{self._pairs}", amount), self._burn(f"p{self._pairs}", amount)]

    def messages_for(self, count: int) -> list[Event]:
        """`count` messages: accruals and burns of shared accounts, pairs, and one in ten published twice."""
        events: list[Event] = []
        while len(events) < count:
            kind = self.random.random()
            if kind < 0.1 and events:
                events.append(self.random.choice(events))
            elif kind < 0.2:
                events += self.pair()
            else:
                user = f"u{self.random.randrange(ACCOUNTS)}"
                make = self._accrual if kind < 0.6 else self._burn
                events.append(make(user, self.random.randint(1, 1000)))
        self.messages += len(events)
        return events

    def _accrual(self, user: str, amount: int) -> Event:
        event = Accrual(user_id=user, amount=amount, idempotency_key=self._key(), source="chaos")
        self.expected[user, event.idempotency_key] = APPLIED
        self.balances[user] += amount
        return event

    def _burn(self, user: str, amount: int, outcome: str = APPLIED) -> Event:
        event = Burn(user_id=user, amount=amount, idempotency_key=self._key(), action="chaos")
        self.expected[user, event.idempotency_key] = outcome
        if outcome == APPLIED:
            self.balances[user] -= amount
        return event

    def _key(self) -> str:
        return f"k{len(self.expected)}"

    # Verdict

    def wrong_balances(self, rows: Sequence[tuple[str, Decimal]]) -> list[str]:
        """Accounts whose balance is not the sum of their applied events."""
        balances = dict(rows)
        users = {user for user, _ in self.expected if user not in (None, "invalid")}
        return [
            f"{user}: {balances.get(user, 0)} instead of {self.balances[user]}"
            for user in sorted(users)
            if balances.get(user, Decimal(0)) != self.balances[user]
        ]

    def wrong_outcomes(self, rows: Sequence[tuple[str | None, str | None, str]]) -> dict[str, list[str]]:
        """Keys that are lost, decided twice, decided wrongly, or were never published."""
        decided: dict[tuple[str | None, str | None], list[str]] = {}
        for user, key, outcome in rows:
            decided.setdefault((user, key), []).append(outcome)
        wrong: dict[str, list[str]] = {"lost": [], "decided twice": [], "decided wrongly": []}
        for name, outcome in self.expected.items():
            outcomes = decided.pop(name, [])
            if not outcomes:
                wrong["lost"].append(f"{name}")
            elif len(outcomes) > 1:
                wrong["decided twice"].append(f"{name}: {outcomes}")
            elif outcomes != [outcome]:
                wrong["decided wrongly"].append(f"{name}: {outcomes[0]} instead of {outcome}")
        wrong["never published"] = [f"{name}: {outcomes}" for name, outcomes in decided.items()]
        return wrong
