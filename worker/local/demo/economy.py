"""A believable token economy: who buys tokens, what spends them, and what the network does to the messages."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from schema.events import Accrual, Burn, Event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: A few customers do most of it, each with its share of the traffic.
HEAVY_USERS: Final = {
    "acme-research": 30,
    "globex-labs": 18,
    "initech-support": 12,
    "umbrella-bio": 8,
    "hooli-search": 5,
}
_LIGHT_USERS: Final = 140
_LIGHT_SHARE: Final = 27  # of 100
_FIRST_NAMES: Final = (
    *("ada", "bela", "chen", "dora", "emre", "fatou", "goran", "hana", "ines", "jonas", "kofi", "lena"),
    *("mira", "noor", "omar", "petra", "quinn", "rosa", "sven", "tariq", "uma", "vera", "wei", "yuki"),
)

REPEATED: Final = 20  # one delivery in so many arrives again
_BULK_EVERY: Final = 70  # one step in so many is a night's batch in one message
_BEGINS: Final = datetime(2026, 1, 5, 8, tzinfo=UTC)  # fixed: the same seed and run must say the same again

_CHAT: Final = Decimal("0.00021")  # tokens per model token
_EMBEDDING: Final = Decimal("0.000000111")
_IMAGE: Final = Decimal("0.04")


class Delivery(NamedTuple):
    """What is published at once: one event, or many in one message."""

    events: tuple[Event, ...]
    bulk: bool
    again: bool  # it was delivered before


class Economy:
    """Events of a made-up month; seed and run decide all of them, keys included."""

    def __init__(self, seed: int, run: str, size: int) -> None:
        """`size` different events; with the repeated deliveries a few per cent more arrive."""
        self.size = size
        self.prefix = f"demo-{run}-"
        self._random = Random(seed)  # noqa: S311 - a story, not a secret
        self._made = 0
        self._now = _BEGINS
        light = self._light_users(min(_LIGHT_USERS, max(size // 10, 1)))
        self.users = [*HEAVY_USERS, *light]
        self._shares = [*HEAVY_USERS.values(), *(_LIGHT_SHARE / len(light) for _ in light)]
        # What each would hold if all were applied in order: it decides who buys and who overdraws, no more.
        self._balances = dict.fromkeys(self.users, Decimal(0))

    def deliveries(self) -> Iterator[Delivery]:
        """Everything that arrives, in order. One delivery in 20 arrives again, a little later."""
        repeats: list[tuple[int, Delivery]] = []
        for step, delivery in enumerate(self._first_deliveries()):
            yield delivery
            # A bulk repeats many events at once, so it does so less often.
            if self._random.random() < 1 / (REPEATED * (4 if delivery.bulk else 1)):
                repeats.append((step + self._random.randint(1, 200), delivery._replace(again=True)))
            while repeats and repeats[0][0] <= step:
                yield repeats.pop(0)[1]
        for _, delivery in repeats:
            yield delivery

    def _first_deliveries(self) -> Iterator[Delivery]:
        bonus = [self._accrual(user, Decimal(25), "signup-bonus") for user in self.users[: self.size]]
        for start in range(0, len(bonus), 100):
            yield Delivery(tuple(bonus[start : start + 100]), bulk=True, again=False)
        while self._made < self.size:
            user = self._random.choices(self.users, self._shares)[0]
            if user in HEAVY_USERS and self._random.randrange(_BULK_EVERY) == 0:
                count = min(self._random.randint(20, 80), self.size - self._made)
                yield Delivery(tuple(self._embedding(user) for _ in range(count)), bulk=True, again=False)
            else:
                yield Delivery((self._next_of(user),), bulk=False, again=False)

    def _next_of(self, user: str) -> Event:
        heavy = user in HEAVY_USERS
        if self._balances[user] < (200 if heavy else 5) and self._random.random() < (0.9 if heavy else 0.5):
            if heavy:
                packs = (500, 1000, 2500)
                return self._accrual(
                    user, Decimal(self._random.choice(packs)), "purchase", order=self._random.randrange(10**6)
                )
            if self._random.random() < 0.2:  # noqa: PLR2004 - of light users' accruals
                return self._accrual(user, Decimal("2.5"), "referral", friend=self._random.choice(self.users))
            return self._accrual(
                user, Decimal(self._random.choice((10, 20))), "purchase", order=self._random.randrange(10**6)
            )
        makers: tuple[Callable[[str], Event], ...] = (self._chat, self._embedding, self._image, self._fine_tuning)
        return self._random.choices(makers, (58, 20, 12, 10))[0](user)

    def _chat(self, user: str) -> Event:
        count = int(self._random.lognormvariate(6.5, 1.1)) + 1
        model = self._random.choice(("sonata-large", "sonata-mini"))
        return self._burn(user, count * _CHAT, "chat-completion", model=model, tokens=count)

    def _embedding(self, user: str) -> Event:
        count = self._random.choice((7000, 700, 1400, 350, 2100))  # 7,000 of them cost 0.000777
        return self._burn(user, count * _EMBEDDING, "embedding", model="vector-2", tokens=count)

    def _image(self, user: str) -> Event:
        count = self._random.randint(1, 4)
        return self._burn(user, count * _IMAGE, "image", model="canvas-1", images=count, size="1024x1024")

    def _fine_tuning(self, user: str) -> Event:
        """Costly: most light users ask for more than they hold."""
        epochs = self._random.randint(1, 3)
        return self._burn(user, epochs * Decimal("19.99"), "fine-tuning", model="sonata-mini", epochs=epochs)

    def _accrual(self, user: str, amount: Decimal, source: str, **metadata: Any) -> Event:
        self._balances[user] += amount
        return Accrual(source=source, **self._fields(user, amount, metadata))

    def _burn(self, user: str, amount: Decimal, action: str, **metadata: Any) -> Event:
        if amount <= self._balances[user]:
            self._balances[user] -= amount
        return Burn(action=action, **self._fields(user, amount, metadata))

    def _fields(self, user: str, amount: Decimal, metadata: dict[str, Any]) -> dict[str, Any]:
        self._made += 1
        self._now += timedelta(seconds=self._random.randint(1, 900))
        return {
            "user_id": user,
            "amount": amount,
            "idempotency_key": f"{self.prefix}{self._made:06}",
            "occurred_at": self._now,
            "metadata": metadata or None,
        }

    def _light_users(self, count: int) -> list[str]:
        return [f"{_FIRST_NAMES[i % len(_FIRST_NAMES)]}-{self._random.randrange(100, 1000)}-{i}" for i in range(count)]
