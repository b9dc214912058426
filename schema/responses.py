"""The queries and responses of the HTTP API. Fields are only ever added: a reader ignores those it does not know.

Amounts are strings, because JSON readers turn numbers into binary floats; metadata is exactly what the producer sent.
/openapi.json is generated from these models.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from .canonical import JsonText, plain_number, write_json
from .events import Label, UserId
from .reasons import DeadLetterReason, RejectionReason

MAX_LIMIT: Final = 100  # records on one page
MAX_KEYS: Final = 100  # receipts of one request
MAX_WAIT: Final = 10  # seconds that a reader may wait for a receipt

#: What a parameter must be: in the API's description, and in the sentence that refuses another value.
USER_RULE: Final = "1 to 128 characters, none of them NUL"
KEY_RULE: Final = "1 to 200 characters, none of them NUL"

#: A page may lie far behind the last one, but Python refuses to parse much longer numbers.
_MAX_DIGITS: Final = 100

_DIGITS = re.compile(rf"[0-9]{{1,{_MAX_DIGITS}}}", re.ASCII)


def _whole_number(value: object) -> object:
    """Refuse what else int() accepts: spaces, signs, underscores, digits of other scripts."""
    if isinstance(value, str):
        if not _DIGITS.fullmatch(value):
            raise PydanticCustomError("digits", "not a whole number in plain digits")
        return int(value)
    return value


def _moment(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


Page: TypeAlias = Annotated[int, Field(ge=1), BeforeValidator(_whole_number)]
Limit: TypeAlias = Annotated[int, Field(ge=1, le=MAX_LIMIT), BeforeValidator(_whole_number)]
Wait: TypeAlias = Annotated[int, Field(ge=0, le=MAX_WAIT), BeforeValidator(_whole_number)]
Tokens: TypeAlias = Annotated[
    Decimal,
    PlainSerializer(plain_number, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9]{1,20}(\.[0-9]{0,17}[1-9])?$", "examples": ["12.5"]}),
]
Moment: TypeAlias = Annotated[
    datetime,
    PlainSerializer(_moment, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-01-31T12:00:00.000001Z"]}),
]
Metadata: TypeAlias = Annotated[str, PlainSerializer(JsonText, return_type=Any), WithJsonSchema({"type": "object"})]


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)

    def json_text(self) -> str:
        """The response as JSON. No number passes through a float."""
        return write_json(self.model_dump(by_alias=True), sort_keys=False)


class _Transaction(Answer):
    user_id: str
    sequence: Annotated[int, Field(ge=1, description="The account's records are numbered 1, 2, 3 … without a gap.")]
    type: Literal["accrual", "burn"]
    amount: Annotated[Tokens, Field(description="Always above 0: the type says whether it is added or taken.")]
    balance_before: Tokens
    balance_after: Tokens
    metadata: Annotated[Metadata | None, Field(description="The metadata that the producer sent.")]
    idempotency_key: str
    occurred_at: Annotated[Moment | None, Field(description="By the producer's clock; null if it sent none.")]
    created_at: Annotated[Moment, Field(description="When the ledger recorded it; never before the previous record.")]


class AccrualTransaction(_Transaction):
    """The account was funded from `source`."""

    type: Literal["accrual"]
    source: str


class BurnTransaction(_Transaction):
    """The user spent tokens on `action`."""

    type: Literal["burn"]
    action: str


Transaction: TypeAlias = Annotated[AccrualTransaction | BurnTransaction, Field(discriminator="type")]

_TRANSACTION: TypeAdapter[AccrualTransaction | BurnTransaction] = TypeAdapter(Transaction)


def transaction(fields: dict[str, Any]) -> AccrualTransaction | BurnTransaction:
    """The transaction with these fields, by Python name. Raises ValidationError if one that its type has is missing."""
    return _TRANSACTION.validate_python(fields)


class Pagination(Answer):
    """Which page this is. `total` counts all records, or rejections, of the account."""

    page: int
    limit: int
    total: int
    total_pages: int


class TransactionHistory(Answer):
    """One page of an account's records, newest first; empty behind the last page and for an unknown user."""

    transactions: list[Transaction]
    pagination: Pagination


class _Rejection(Answer):
    user_id: str
    number: Annotated[int, Field(ge=1, description="The account's rejections are numbered 1, 2, 3 … without a gap.")]
    type: Literal["accrual", "burn"]
    amount: Tokens
    reason: RejectionReason
    balance: Annotated[Tokens, Field(description="The balance when the event was decided.")]
    metadata: Annotated[Metadata | None, Field(description="The metadata that the producer sent.")]
    idempotency_key: str
    occurred_at: Annotated[Moment | None, Field(description="By the producer's clock; null if it sent none.")]
    created_at: Annotated[Moment, Field(description="When the ledger decided it.")]


class AccrualRejection(_Rejection):
    """The account was not funded from `source`."""

    type: Literal["accrual"]
    source: str


class BurnRejection(_Rejection):
    """The user spent no tokens on `action`."""

    type: Literal["burn"]
    action: str


Rejection: TypeAlias = Annotated[AccrualRejection | BurnRejection, Field(discriminator="type")]

_REJECTION: TypeAdapter[AccrualRejection | BurnRejection] = TypeAdapter(Rejection)


def rejection(fields: dict[str, Any]) -> AccrualRejection | BurnRejection:
    """The rejection with these fields, by Python name. Raises ValidationError if one that its type has is missing."""
    return _REJECTION.validate_python(fields)


class Rejections(Answer):
    """One page of an account's rejections, newest first; empty behind the last page and for an unknown user."""

    rejections: list[Rejection]
    pagination: Pagination


class _Receipt(Answer):
    user_id: str
    idempotency_key: str


class AppliedReceipt(_Receipt):
    """The event changed the balance, exactly once."""

    status: Literal["applied"] = "applied"
    transaction: Transaction


class RejectedReceipt(_Receipt):
    """The event was rejected, finally: it is never applied under this key, whatever the balance becomes."""

    status: Literal["rejected"] = "rejected"
    reason: RejectionReason
    balance: Annotated[Tokens, Field(description="The balance when the event was decided.")]
    number: int
    created_at: Moment


class DeadLetteredReceipt(_Receipt):
    """The event has no outcome. Its key is not used up: the event, or a corrected one, can still be applied."""

    status: Literal["dead_lettered"] = "dead_lettered"
    reason: DeadLetterReason
    detail: Annotated[str, Field(description="One sentence: why it was not decided.")]
    state: Annotated[
        Literal["open", "discarded"],
        Field(description="Whether it waits for an operator, or one has closed it."),
    ]
    dead_letter: Annotated[int, Field(description="Its number, for `tokentrail dead-letters`.")]
    last_seen_at: Moment


class UnknownReceipt(_Receipt):
    """No event with this key is decided. It may still be queued."""

    status: Literal["unknown"] = "unknown"
    detail: str = "No event with this key has been decided: it may still be queued, or it was never published."


Receipt: TypeAlias = Annotated[
    AppliedReceipt | RejectedReceipt | DeadLetteredReceipt | UnknownReceipt, Field(discriminator="status")
]


class Receipts(Answer):
    """One receipt per key, in the order of the keys."""

    receipts: list[Receipt]


class HistoryQuery(BaseModel):
    """An account and a page. A parameter's description is also the rule in the sentence that refuses a bad value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: Annotated[UserId, Field(alias="userId", description=USER_RULE)]
    page: Annotated[
        Page, Field(description=f"a page number, from 1 (newest), in at most {_MAX_DIGITS} plain digits")
    ] = 1
    limit: Annotated[Limit, Field(description=f"a whole number from 1 to {MAX_LIMIT}, in plain digits")] = 10


class ReceiptsQuery(BaseModel):
    """Some of a user's keys, and how long to wait for an outcome."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: Annotated[UserId, Field(alias="userId", description=USER_RULE)]
    idempotency_keys: Annotated[
        list[Label],
        Field(
            alias="idempotencyKey",
            min_length=1,
            max_length=MAX_KEYS,
            description=f"given 1 to {MAX_KEYS} times, each {KEY_RULE}",
        ),
    ]
    wait: Annotated[
        Wait,
        Field(
            description=f"a whole number of seconds from 0 to {MAX_WAIT}, in plain digits: how long the response waits"
            " for the first receipt that is not unknown"
        ),
    ] = 0


class Health(Answer):
    status: Literal["ok", "ready"]


class Directory(Answer):
    """The endpoints."""

    addresses: Annotated[dict[str, str], Field(description="Each path, and what it returns.")]


class Problem(Answer):
    """An error (RFC 9457, application/problem+json)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: Annotated[str, Field(description="One sentence: what is wrong and what to do.")]
    instance: str
    parameter: Annotated[str | None, Field(description="The wrong parameter; absent if none is.")] = None

    def json_text(self) -> str:
        return write_json(self.model_dump(by_alias=True, exclude_none=True), sort_keys=False)
