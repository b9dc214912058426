"""A worker's ledger as a process of its own, so that a test can freeze it: settles one batch and says what it saw."""

from __future__ import annotations

import json
import sys

from worker.config import Settings
from worker.ledger.deliveries import Delivery
from worker.ledger.settle import Ledger

from .support import accrual, logged

if __name__ == "__main__":
    url, key, *users = sys.argv[1:]
    reports: list[str | None] = []
    ledger = Ledger(
        Settings(DATABASE_URL=url, lock_timeout=60, idle_in_transaction_timeout=1), stripe=9, degraded=reports.append
    )
    print(ledger.connection().info.backend_pid, flush=True)
    with logged():  # standard output is for the test
        outcomes = ledger.settle([Delivery.of(accrual(user, 1, key)) for user in users])
    ledger.close()
    print(json.dumps([[str(outcome) for outcome in outcomes], reports]), flush=True)
