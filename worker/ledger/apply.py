"""One batch of deliveries in one database transaction: lock → look up → decide → record. The order is the proof."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from functools import reduce
from time import monotonic
from typing import Any, Final, NamedTuple

from psycopg import Connection, Cursor

from schema.canonical import plain_number
from schema.events import Accrual, Event
from schema.reasons import DeadLetterReason

from . import chain, dead_letters, store
from .dead_letters import NewDeadLetter
from .deliveries import Delivery, IfShort
from .outcomes import Applied, DeadLettered, Decision, Outcome, Rejected, Undecided
from .rules import CLOCK_TOLERANCE, MONEY, Reason, decide, too_far_ahead
from .store import Account, Earlier, Flow, copy_bytes, copy_line, copy_text

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
    """Decide each delivery once, in the order given, and keep `letters`; all of it or, on any error, nothing.

    A key that was decided before, here or by anyone, gets its first answer back. The statements are the same
    few whatever the batch's size. `clock` stands in for the server's in tests.
    Raises what PostgreSQL raises; the transaction is then rolled back.
    """
    users = sorted({delivery.event.user_id for delivery in deliveries})
    began = monotonic()
    try:
        with connection.transaction(), connection.cursor() as cursor:
            accounts = store.lock_accounts(cursor, users) if users else {}
            if len(accounts) < len(users):
                raise _SomeAreNew  # noqa: TRY301 - the way out of a transaction
            contended = monotonic() - began > CONTENDED_AFTER_SECONDS
            return _Batch(stripe, accounts, letters, contended=contended).run(cursor, deliveries, clock)
    except _SomeAreNew:
        pass
    # Only now that the locks are let go: who opens accounts while holding others' can end up waiting for a batch that
    # waits for those.
    with connection.transaction(), connection.cursor() as cursor:
        store.open_accounts(cursor, users)
        accounts = store.lock_accounts(cursor, users)
        contended = monotonic() - began > CONTENDED_AFTER_SECONDS
        return _Batch(stripe, accounts, letters, contended=contended).run(cursor, deliveries, clock)


class _SomeAreNew(Exception):
    """Rolls back, which unlike a commit syncs nothing. Not psycopg's Rollback: that one escapes, as no database error,
    where the connection is lost before the rollback.
    """


class _Moment(NamedTuple):
    """A moment at which rows are made: as COPY and the chain write it, and the flow of its hour."""

    text: str
    micros: str
    flow: Flow


class _Batch:
    """What one transaction has read, decided and is about to write."""

    def __init__(
        self, stripe: int, accounts: Mapping[str, Account], letters: Iterable[NewDeadLetter], *, contended: bool
    ) -> None:
        self.stripe = stripe
        self.contended = contended
        self.accounts = accounts
        self.letters = list(letters)
        self.earlier: dict[tuple[str, str], Earlier] = {}
        self.now: datetime | None = None
        self.outcomes: list[Outcome] = []
        self.conflicts: list[tuple[int, Delivery, Earlier]] = []
        self.events: dict[tuple[str, str], Event] = {}  # decided in this very batch
        self.moved: dict[str, Account] = {}
        self.flows: defaultdict[datetime, Flow] = defaultdict(Flow)
        self.moments: dict[datetime, _Moment] = {}  # nearly always one
        self.lines: defaultdict[str, list[str]] = defaultdict(list)

    def run(self, cursor: Cursor[Any], deliveries: Sequence[Delivery], clock: datetime | None) -> list[Outcome]:
        """Look up, decide, record. The accounts are locked."""
        if deliveries:
            self.earlier, now = store.look_up(cursor, deliveries)
            self.now = clock or now
            self.outcomes = [self.decide(place, delivery) for place, delivery in enumerate(deliveries)]
        self.record(cursor)
        return self.outcomes

    def decide(self, place: int, delivery: Delivery) -> Outcome:
        """The answer to the delivery at a place of the batch; what it means is noted for `record`."""
        event = delivery.event
        key = (event.user_id, event.idempotency_key)
        if earlier := self.earlier.get(key):
            if earlier.payload_hash == delivery.payload_hash:
                return earlier.decision._replace(repeated=True)
            self.conflicts.append((place, delivery, earlier))
            return DeadLettered("conflict", "")  # `record` finds the words

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
        elif verdict is Reason.INSUFFICIENT_TOKENS and (
            delivery.if_short is IfShort.WAIT
            or (delivery.if_short is IfShort.REJECT_UNLESS_CONTENDED and self.contended)
        ):
            return Undecided(account.balance)
        else:
            decision = self._reject(delivery, account, verdict)
        self.earlier[key] = Earlier(delivery.payload_hash, decision)
        self.events[key] = event
        return decision

    def _apply(self, delivery: Delivery, account: Account, after: Decimal) -> Applied:
        event, before = delivery.event, account.balance
        moment = self._moment(account)
        created, amount = moment.text, chain.money(event.amount)
        money_before, money_after = chain.money(before), chain.money(after)
        if account.sequence == 0:
            account.opening_balance = before
        account.sequence += 1
        account.balance = after
        account.head_hash = chain.record_hash(
            event,
            account.sequence,
            amount,
            money_before,
            money_after,
            moment.micros,
            delivery.payload_hash,
            account.head_hash,
        )

        user, number = copy_text(event.user_id), str(account.sequence)
        self.lines["transaction_record"].append(
            copy_line(
                user,
                number,
                copy_text(event.idempotency_key),
                event.type,
                amount,
                money_before,
                money_after,
                copy_text(event.metadata),
                None if event.occurred_at is None else event.occurred_at.isoformat(" "),
                created,
                copy_bytes(delivery.payload_hash),
                copy_bytes(account.head_hash),
                str(chain.VERSION),
            )
        )
        flow = moment.flow
        if isinstance(event, Accrual):
            self.lines["accrual_record"].append(copy_line(user, number, amount, copy_text(event.source), created))
            flow.accruals += 1
            flow.issued = MONEY.add(flow.issued, event.amount)
        else:
            self.lines["burned_credit"].append(
                copy_line(user, number, amount, copy_text(event.action), money_before, money_after, created)
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
        self.lines["rejected_event"].append(
            copy_line(
                copy_text(event.user_id),
                str(account.rejections),
                copy_text(event.idempotency_key),
                event.type,
                amount,
                copy_text(event.source) if isinstance(event, Accrual) else None,
                None if isinstance(event, Accrual) else copy_text(event.action),
                copy_text(event.metadata),
                None if event.occurred_at is None else event.occurred_at.isoformat(" "),
                moment.text,
                reason,
                balance,
                copy_bytes(delivery.payload_hash),
                copy_bytes(account.rejection_head),
                str(chain.VERSION),
            )
        )
        moment.flow.rejections += 1
        return Rejected(account.rejections, reason, account.balance, event.amount)

    def _moment(self, account: Account) -> _Moment:
        """When the account's next row is made: now, or its last moment if the clock has gone back since."""
        assert self.now is not None
        when = self.now
        if account.last_recorded_at is not None and account.last_recorded_at > when:
            when = account.last_recorded_at
        account.last_recorded_at = when
        self.moved[account.user_id] = account
        if (moment := self.moments.get(when)) is None:
            flow = self.flows[when.replace(minute=0, second=0, microsecond=0)]
            moment = self.moments[when] = _Moment(when.isoformat(" "), chain.micros(when), flow)
        return moment

    def _dead(self, delivery: Delivery, reason: DeadLetterReason, detail: str) -> DeadLettered:
        self.letters.append(NewDeadLetter.of_event(reason, detail, delivery.event, delivery.origin))
        return DeadLettered(reason, detail)

    def record(self, cursor: Cursor[Any]) -> None:
        """Write everything down. The stripe comes last: every other batch on it waits from here to the commit."""
        self._explain_conflicts(cursor)
        for table in store.RECORDED:
            if lines := self.lines.get(table):
                store.record(cursor, table, lines)
        if self.letters:
            dead_letters.keep(cursor, self.letters, self.now)
        if self.moved:
            store.move_balances(cursor, list(self.moved.values()))
            # Not sum(): it would add in the ambient context, which rounds.
            issued = reduce(MONEY.add, (flow.issued for flow in self.flows.values()), Decimal(0))
            burned = reduce(MONEY.add, (flow.burned for flow in self.flows.values()), Decimal(0))
            store.add_to_supply(cursor, self.stripe, issued, burned)
            store.add_to_hours(cursor, self.stripe, self.flows)

    def _explain_conflicts(self, cursor: Cursor[Any]) -> None:
        keys = [(delivery.event.user_id, delivery.event.idempotency_key) for _, delivery, _ in self.conflicts]
        if elsewhere := set(keys) - self.events.keys():
            stored = store.contents(cursor, elsewhere)
        for (place, delivery, earlier), key in zip(self.conflicts, keys, strict=True):
            content = _content(self.events[key]) if key in self.events else stored[key]
            self.outcomes[place] = self._dead(delivery, "conflict", _differences(delivery.event, content, earlier))


def _content(event: Event) -> dict[str, Any]:
    return {
        "type": event.type,
        "amount": event.amount,
        "source": event.source if isinstance(event, Accrual) else None,
        "action": None if isinstance(event, Accrual) else event.action,
        "metadata": event.metadata,
        "occurred_at": event.occurred_at,
    }


def _differences(event: Event, stored: dict[str, Any], earlier: Earlier) -> str:
    """The sentence of a conflict: which fields differ, and how."""
    differing = [
        f"{field} is {_shown(value)}, was {_shown(stored[field])}"
        for field, value in _content(event).items()
        if value != stored[field]
    ]
    decision = earlier.decision
    first = (
        f"applied as #{decision.sequence}" if isinstance(decision, Applied) else f"rejected as no. {decision.number}"
    )
    return (
        f"This idempotency key was {first} with other content: {'; '.join(differing)}. "
        "Send a new event under a new key."
    )


def _shown(value: object) -> str:
    if value is None:
        return "absent"
    if isinstance(value, Decimal):
        return plain_number(value)
    text = value.isoformat() if isinstance(value, datetime) else str(value)
    if not text.isprintable():  # nothing that breaks the line or turns it around
        text = ascii(text[:60])[1:-1]
    return text if len(text) <= 60 else f"{text[:57]}…"  # noqa: PLR2004 - a sentence, not a dump


def _ahead(event: Event) -> str:
    return (
        f"occurred_at is {event.occurred_at}, more than {CLOCK_TOLERANCE.days} day ahead of the ledger's clock: "
        "check the producer's clock and time zone."
    )
