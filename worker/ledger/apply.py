"""One batch of deliveries in one database transaction: lock → look up → decide → record. The order is the proof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from functools import reduce
from time import monotonic
from typing import Any, Final, NamedTuple

from psycopg import Connection, Cursor

from schema.canonical import plain_number
from schema.events import Accrual, Event
from schema.reasons import DeadLetterReason
from schema.text import printable_line

from . import chain, dead_letters, locks, store
from .dead_letters import NewDeadLetter
from .deliveries import Delivery, IfShort
from .outcomes import Applied, DeadLettered, Decision, Outcome, Rejected, Undecided
from .rows import Account, AccrualRow, BurnedRow, Flow, RejectedRow, TransactionRow
from .rules import CLOCK_TOLERANCE, MONEY, Reason, decide, too_far_ahead
from .store import Content, Earlier, Key

#: A batch that waited longer than this for its row locks is contended: an accrual may be waiting for the same holder.
CONTENDED_AFTER_SECONDS: Final = 0.5


def apply_batch(
    connection: Connection[Any],
    deliveries: Sequence[Delivery],
    *,
    stripe: int,
    letters: Sequence[NewDeadLetter] = (),
    clock: datetime | None = None,
) -> list[Outcome]:
    """Decide each delivery once, in the order given, and write `letters`; all of it or, on any error, nothing.

    A key that any worker decided before gets its first outcome again. The number of statements does not depend on the
    size of the batch. `clock` replaces the server's clock in tests.
    Raises what PostgreSQL raises; the transaction is then rolled back.
    """
    users = sorted({delivery.event.user_id for delivery in deliveries})
    started = monotonic()

    def transaction(*, insert_missing: bool) -> list[Outcome]:
        with connection.transaction(), connection.cursor() as cursor:
            if insert_missing:
                locks.insert_missing_accounts(cursor, users)
            accounts = locks.lock_accounts(cursor, users) if users else {}
            if len(accounts) < len(users):
                raise _AccountsMissing
            contended = monotonic() - started > CONTENDED_AFTER_SECONDS
            batch = _Batch(accounts, letters, contended=contended)
            if deliveries:
                batch.look_up(cursor, deliveries, clock)
            outcomes = [batch.decide(delivery) for delivery in deliveries]
            batch.record(cursor, stripe)
            return outcomes

    try:
        return transaction(insert_missing=False)
    except _AccountsMissing:
        pass
    # Only after releasing all row locks: two batches that each insert while holding locks can deadlock.
    return transaction(insert_missing=True)


class _AccountsMissing(Exception):
    """Raised to roll back, which unlike a commit syncs nothing, and caught by `apply_batch`.

    psycopg's own Rollback escapes, and is no database error, if the connection is lost before the rollback.
    """


class _Moment(NamedTuple):
    """The time at which rows are created: for the tables, for the hash chain, and the flow of its hour."""

    text: str
    micros: str
    flow: Flow


class _Batch:
    """What one transaction has locked, looked up and decided, and the rows that it writes."""

    def __init__(self, accounts: Mapping[str, Account], letters: Sequence[NewDeadLetter], *, contended: bool) -> None:
        self.accounts = accounts
        self.contended = contended
        self.now: datetime | None = None
        self.earlier: dict[Key, Earlier] = {}  # decided by earlier batches, or earlier in this one
        self.contents: dict[Key, Content] = {}  # of earlier events that a delivery conflicts with
        self.events: dict[Key, Event] = {}  # decided in this batch
        self.transactions: list[TransactionRow] = []
        self.accruals: list[AccrualRow] = []
        self.burned: list[BurnedRow] = []
        self.rejected: list[RejectedRow] = []
        self.letters = list(letters)  # those of this batch follow in the order of its deliveries
        self.changed: dict[str, Account] = {}
        self.flows: defaultdict[datetime, Flow] = defaultdict(Flow)
        self.moments: dict[datetime, _Moment] = {}  # nearly always one

    def look_up(self, cursor: Cursor[Any], deliveries: Sequence[Delivery], clock: datetime | None) -> None:
        """Read the clock, and what the deliveries' keys stand for: no other batch decides them, their accounts are
        locked.
        """
        self.earlier, now = store.look_up(cursor, deliveries)
        self.now = clock or now
        conflicting = self.earlier and {
            key
            for delivery in deliveries
            if (earlier := self.earlier.get(key := delivery.key)) and earlier.payload_hash != delivery.payload_hash
        }
        if conflicting:
            self.contents = store.contents(cursor, conflicting)

    def decide(self, delivery: Delivery) -> Outcome:
        """The outcome of a delivery; the rows that it needs are kept for `record`."""
        event = delivery.event
        key = event.user_id, event.idempotency_key
        if earlier := self.earlier.get(key):
            if earlier.payload_hash == delivery.payload_hash:
                return earlier.decision._replace(repeated=True)
            first = self.contents.get(key) or Content.of(self.events[key])
            return self._dead(delivery, "conflict", _differences(event, first, earlier.decision))

        if delivery.refusal is not None:
            return self._dead(delivery, *delivery.refusal)
        assert self.now is not None
        if too_far_ahead(event.occurred_at, self.now):
            return self._dead(delivery, "invalid_event", _ahead(event))

        account = self.accounts[event.user_id]
        verdict = decide(event.type, event.amount, account.balance)
        decision: Decision
        if isinstance(verdict, Decimal):
            decision = self._apply(delivery, account, verdict)
        elif verdict is Reason.INSUFFICIENT_TOKENS and self._may_wait(delivery):
            return Undecided(account.balance)
        else:
            decision = self._reject(delivery, account, verdict)
        self.earlier[key] = Earlier(delivery.payload_hash, decision)
        self.events[key] = event
        return decision

    def _may_wait(self, delivery: Delivery) -> bool:
        match delivery.if_short:
            case IfShort.WAIT:
                return True
            case IfShort.REJECT_UNLESS_CONTENDED:
                return self.contended
            case IfShort.REJECT:
                return False

    def _apply(self, delivery: Delivery, account: Account, after: Decimal) -> Applied:
        event, before = delivery.event, account.balance
        moment = self._moment(account)
        amount, balance_before, balance_after = chain.money(event.amount), chain.money(before), chain.money(after)
        if account.sequence == 0:
            account.opening_balance = before
        account.sequence += 1
        account.balance = after
        account.head_hash = chain.record_hash(
            event,
            account.sequence,
            amount,
            balance_before,
            balance_after,
            moment.micros,
            delivery.payload_hash,
            account.head_hash,
        )
        self.transactions.append(
            TransactionRow.__new__(
                TransactionRow,
                user_id=event.user_id,
                sequence=account.sequence,
                idempotency_key=event.idempotency_key,
                type=event.type,
                amount=amount,
                balance_before=balance_before,
                balance_after=balance_after,
                metadata=event.metadata,
                occurred_at=_text(event.occurred_at),
                created_at=moment.text,
                payload_hash=delivery.payload_hash,
                hash=account.head_hash,
                hash_version=chain.VERSION,
            )
        )
        flow = moment.flow
        if isinstance(event, Accrual):
            self.accruals.append(
                AccrualRow.__new__(
                    AccrualRow,
                    user_id=event.user_id,
                    sequence=account.sequence,
                    amount=amount,
                    source=event.source,
                    created_at=moment.text,
                )
            )
            flow.accruals += 1
            flow.issued = MONEY.add(flow.issued, event.amount)
        else:
            self.burned.append(
                BurnedRow.__new__(
                    BurnedRow,
                    user_id=event.user_id,
                    sequence=account.sequence,
                    amount=amount,
                    action=event.action,
                    balance_before=balance_before,
                    balance_after=balance_after,
                    created_at=moment.text,
                )
            )
            flow.burns += 1
            flow.burned = MONEY.add(flow.burned, event.amount)
        return Applied(account.sequence, before, after)

    def _reject(self, delivery: Delivery, account: Account, reason: Reason) -> Rejected:
        event = delivery.event
        moment = self._moment(account)
        amount, balance = chain.money(event.amount), chain.money(account.balance)
        account.rejections += 1
        account.rejection_head = chain.rejection_hash(
            event,
            account.rejections,
            amount,
            reason,
            balance,
            moment.micros,
            delivery.payload_hash,
            account.rejection_head,
        )
        self.rejected.append(
            RejectedRow(
                user_id=event.user_id,
                number=account.rejections,
                idempotency_key=event.idempotency_key,
                type=event.type,
                amount=amount,
                source=event.source if isinstance(event, Accrual) else None,
                action=None if isinstance(event, Accrual) else event.action,
                metadata=event.metadata,
                occurred_at=_text(event.occurred_at),
                created_at=moment.text,
                reason=reason,
                balance=balance,
                payload_hash=delivery.payload_hash,
                hash=account.rejection_head,
                hash_version=chain.VERSION,
            )
        )
        moment.flow.rejections += 1
        return Rejected(account.rejections, reason, account.balance, event.amount)

    def _moment(self, account: Account) -> _Moment:
        """The time at which the account's next row is created: now, or that of its last row if the clock went back."""
        assert self.now is not None
        when = self.now
        if account.last_recorded_at is not None and account.last_recorded_at > when:
            when = account.last_recorded_at
        account.last_recorded_at = when
        self.changed[account.user_id] = account
        if (moment := self.moments.get(when)) is None:
            flow = self.flows[when.replace(minute=0, second=0, microsecond=0)]
            moment = self.moments[when] = _Moment(when.isoformat(" "), chain.micros(when), flow)
        return moment

    def _dead(self, delivery: Delivery, reason: DeadLetterReason, detail: str) -> DeadLettered:
        self.letters.append(NewDeadLetter.of_event(reason, detail, delivery.event, delivery.origin))
        return DeadLettered(reason, detail)

    def record(self, cursor: Cursor[Any], stripe: int) -> None:
        """Write all rows. The stripe comes last: every other batch on it waits from then until the commit."""
        for rows in (self.transactions, self.accruals, self.burned, self.rejected):
            if rows:
                store.append(cursor, rows)
        if self.letters:
            dead_letters.write(cursor, self.letters, self.now)
        if self.changed:
            store.update_accounts(cursor, list(self.changed.values()))
            # Not sum(): it would add in the ambient context, which rounds.
            issued = reduce(MONEY.add, (flow.issued for flow in self.flows.values()), Decimal(0))
            burned = reduce(MONEY.add, (flow.burned for flow in self.flows.values()), Decimal(0))
            store.add_to_supply(cursor, stripe, issued, burned)
            store.add_to_hours(cursor, stripe, self.flows)


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(" ")


def _differences(event: Event, first: Content, decision: Decision) -> str:
    """The sentence of a conflict: which fields differ, and how."""
    differing = [
        f"{field} is {_in_words(value)}, was {_in_words(earlier)}"
        for field, value, earlier in zip(Content._fields, Content.of(event), first, strict=True)
        if value != earlier
    ]
    outcome = (
        f"applied as #{decision.sequence}" if isinstance(decision, Applied) else f"rejected as no. {decision.number}"
    )
    return (
        f"This idempotency key was {outcome} with other content: {'; '.join(differing)}. "
        "Send a new event under a new key."
    )


def _in_words(value: object) -> str:
    if value is None:
        return "absent"
    if isinstance(value, Decimal):
        return plain_number(value)
    return printable_line(value.isoformat() if isinstance(value, datetime) else str(value), 60)


def _ahead(event: Event) -> str:
    return (
        f"occurred_at is {event.occurred_at}, more than {CLOCK_TOLERANCE.days} day ahead of the ledger's clock: "
        "check the producer's clock and time zone."
    )
