"""When a burn that met too small a balance is worth another try."""

from __future__ import annotations

from tests.kit.events import accrual, burn
from tests.ledger.support import sent
from worker.ledger.apply import apply_batch
from worker.ledger.deliveries import IfShort
from worker.ledger.store import answerable


def test_a_burn_is_answerable_by_its_balance_or_by_the_decision_of_another_delivery(connection):
    apply_batch(connection, sent(accrual("alice", "10", "funds"), burn("alice", "7", "spent")), stripe=1)
    apply_batch(connection, sent(burn("alice", "5", "refused")), stripe=1)
    waiting = [
        burn("alice", "3", "enough"),
        burn("alice", "4", "too little"),
        burn("alice", "7", "spent"),
        burn("alice", "5", "refused"),
        burn("bob", "1", "spent"),
    ]
    assert answerable(connection, sent(*waiting, if_short=IfShort.WAIT)) == [True, False, True, True, False]
