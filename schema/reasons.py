"""The closed lists of why an event was not applied. The codes are stored and matched on: they only grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias, get_args

#: Why an event is refused for good; the order of `worker.ledger.rules`.
RejectionReason: TypeAlias = Literal["insufficient_tokens", "balance_limit"]

#: Why a message has no outcome.
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

REJECTION_REASONS: Final[tuple[RejectionReason, ...]] = get_args(RejectionReason)

DEAD_LETTER_REASONS: Final[Mapping[DeadLetterReason, str]] = {
    "unknown_task": "No task of ours has this name.",
    "undecodable": "The body, its content type or its encoding cannot be read.",
    "invalid_arguments": "The task was called with other arguments than it has.",
    "invalid_event": "A field of the event breaks its rule.",
    "conflict": "The idempotency key stands for another event already.",
    "refused_by_database": "PostgreSQL refused this event alone (SQLSTATE class 22, class 23, or 54001).",
    "internal_error": "Our own code failed on this event alone: a bug to report, and to replay once mended.",
    "poison": "Workers died again and again while they had this message in hand and nothing else.",
    "oversized": "The message is larger than one may be.",
    "revoked": "The task was revoked before it was decided.",
    "expired": "The message's time to be decided (expires) was over.",
    "scheduled": "The message has an eta or countdown, and the ledger does not wait by the clock.",
}
