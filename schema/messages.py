"""The wire contract: task names, headers and limits, used by whoever writes a message and whoever reads one."""

from __future__ import annotations

from typing import Final

ACCRUE: Final = "tokens.accrue"
BURN: Final = "tokens.burn"
APPLY_MANY: Final = "tokens.apply_many"

#: Task → the type of the one event that its arguments are.
TYPES: Final = {ACCRUE: "accrual", BURN: "burn"}

#: The default queue; lanes are `tokens.0`, `tokens.1`, …
DEFAULT_QUEUE: Final = "tokens"

MAX_BODY_BYTES: Final = 16 * 1024 * 1024  # of a message that a worker reads

#: The header of a message that replays a dead letter: the letter's number.
REPLAY_HEADER: Final = "tokentrail_dead_letter"

# What the transport says of a message, whatever its producer said.

#: How often the message was restored because its worker's heartbeat had stopped.
RESTORES_HEADER: Final = "tokentrail_restores"

#: How often a worker died while it had this message in flight and no other.
SOLO_DEATHS_HEADER: Final = "tokentrail_deaths"

#: The task name under which bytes arrive that are not a message; the body is then those bytes.
UNDECODABLE_TASK: Final = "tokentrail.undecodable"

#: Why those bytes are not a message, in a sentence.
UNDECODABLE_REASON_HEADER: Final = "tokentrail_reason"
