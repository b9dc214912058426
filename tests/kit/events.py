"""The events that tests publish and apply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from schema.events import parse_event

if TYPE_CHECKING:
    from schema.events import Accrual, Burn

#: The largest `max_amount` that amounts have digits for: what the schema allows is tested in tests/schema.
ANY_AMOUNT = 10**20


def accrual(user: str, amount: object, key: str, **fields: Any) -> Accrual:
    """`accrual("ann", "12.5", "order-1", metadata={"n": 1})`"""
    event = {"user_id": user, "amount": amount, "idempotency_key": key, "source": "payroll"} | fields
    return parse_event(event, type_="accrual", max_amount=ANY_AMOUNT)  # type: ignore[return-value]


def burn(user: str, amount: object, key: str, **fields: Any) -> Burn:
    """`burn("ann", 1, "call-1", action="chat")`"""
    event = {"user_id": user, "amount": amount, "idempotency_key": key, "action": "render"} | fields
    return parse_event(event, type_="burn", max_amount=ANY_AMOUNT)  # type: ignore[return-value]
