"""A plain Celery worker: one task for each event, one SQLAlchemy session for each task, kombu's own Redis transport.

`celery -A bench.naive worker -P prefork -c 2 -E`. It reads the same messages and writes the same tables as
tokentrail's worker. It validates nothing, and fills columns that it does not need with constants: hashes are zeros.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from celery import Celery
from sqlalchemy import create_engine, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from schema.tables import Account, AccrualRecord, BurnedCredit, GlobalTokenBalance, TransactionRecord

app = Celery("naive", broker=os.environ["BROKER_URL"])
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=4,
    task_default_queue="tokens",
    task_serializer="json",
)
engine = create_engine(os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://"))
STRIPE = 1
NO_HASH = bytes(32)


@app.task(name="tokens.accrue")
def accrue(source: str, **event: Any) -> str:
    return apply("accrual", source, event)


@app.task(name="tokens.burn")
def burn(action: str, **event: Any) -> str:
    return apply("burn", action, event)


def apply(kind: str, purpose: str, event: dict[str, Any]) -> str:
    amount = Decimal(event["amount"])
    user = event["user_id"]
    with Session(engine) as session, session.begin():
        duplicate = select(TransactionRecord.sequence).where(
            TransactionRecord.user_id == user, TransactionRecord.idempotency_key == event["idempotency_key"]
        )
        if session.scalar(duplicate):
            return "duplicate"
        session.execute(insert(Account).values(user_id=user).on_conflict_do_nothing())
        account = session.scalar(select(Account).where(Account.user_id == user).with_for_update())
        assert account is not None
        before = account.balance
        if kind == "burn" and before < amount:
            return "rejected"
        after = before + amount if kind == "accrual" else before - amount
        if account.sequence == 0:
            account.opening_balance, account.head_hash = before, NO_HASH
        account.balance, account.sequence = after, account.sequence + 1
        row = {"user_id": user, "sequence": account.sequence, "amount": amount, "created_at": datetime.now(UTC)}
        balances = {"balance_before": before, "balance_after": after}
        session.add(
            TransactionRecord(
                **row,
                **balances,
                idempotency_key=event["idempotency_key"],
                type=kind,
                details=event["metadata"],
                payload_hash=NO_HASH,
                hash=NO_HASH,
                hash_version=1,
            )
        )
        supply = session.scalar(select(GlobalTokenBalance).where(GlobalTokenBalance.id == STRIPE).with_for_update())
        assert supply is not None
        assert supply.issued is not None
        assert supply.burned is not None
        if kind == "accrual":
            session.add(AccrualRecord(**row, source=purpose))
            supply.issued += amount
        else:
            session.add(BurnedCredit(**row, **balances, action=purpose))
            supply.burned += amount
    return "applied"
