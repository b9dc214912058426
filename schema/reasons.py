"""The closed lists of reasons why an event is not applied. Codes are stored and matched on: the lists only grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias, get_args

#: Why an event is rejected, in the order of `worker.ledger.rules`.
RejectionReason: TypeAlias = Literal["insufficient_tokens", "balance_limit"]

#: Why an event has no outcome but a dead letter.
DeadLetterReason: TypeAlias = Literal[
    "unknown_task",
    "undecodable",
    "invalid_arguments",
    "invalid_event",
    "conflict",
    "refused_by_database",
    "internal_error",
    "poison",
    "oversized",
    "revoked",
    "expired",
    "scheduled",
]

DEAD_LETTER_STATES: Final = ("open", "replayed", "discarded")

REJECTION_REASONS: Final[tuple[RejectionReason, ...]] = get_args(RejectionReason)

DEAD_LETTER_REASONS: Final[Mapping[DeadLetterReason, str]] = {
    "unknown_task": "The worker has no task of this name.",
    "undecodable": "The body, its content type or its encoding cannot be read.",
    "invalid_arguments": "The arguments are not those that the task takes.",
    "invalid_event": "A field of the event breaks its rule.",
    "conflict": "The idempotency key belongs to another event already.",
    "refused_by_database": "PostgreSQL refused this event alone (SQLSTATE class 22, class 23, or 54001).",
    "internal_error": "The worker failed on this event alone: report the bug, and replay the event once it is fixed.",
    "poison": "Workers died again and again while this was their only message in flight.",
    "oversized": "The message is larger than the limit.",
    "revoked": "The task was revoked before it was decided.",
    "expired": "The message expired (expires) before it was decided.",
    "scheduled": "The message has an eta or countdown, and workers apply events at once.",
}
