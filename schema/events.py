"""The events: an accrual funds a user's account, a burn spends tokens on an action of the user.

The type carries the sign, never the amount. The producer chooses the idempotency key, and sends the event again
under the same key when in doubt. Events only grow: a new field is optional, and its absence changes no meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from .canonical import MAX_EXPONENT, DuplicateKeys, JsonNumber, NotCanonical, plain_number, write_json, write_text
from .messages import MAX_AMOUNT
from .text import quote

MAX_METADATA_BYTES: Final = 16 * 1024  # of the canonical text, in UTF-8
MAX_METADATA_DEPTH: Final = 8
EARLIEST: Final = datetime(2000, 1, 1, tzinfo=UTC)

_AMOUNT = re.compile(r"[0-9]{1,20}(\.[0-9]{1,18})?", re.ASCII)
#: Hours and minutes are bounded here: later Pythons accept 24:00, and 3.11 an offset of +05:60.
_MOMENT = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]([01]\d|2[0-3]):\d\d:\d\d(\.\d{1,6})?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)", re.ASCII
)
_DECIMALS: Final = 18
_DIGITS: Final = 20  # before the point


def _refuse(rule: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{rule}", {"rule": rule})


def _untagged(value: object, tag: str) -> object:
    """The text in what Celery's send_task makes of a Decimal or datetime: {"__type__": tag, "__value__": text}."""
    if isinstance(value, DuplicateKeys):
        return value  # Celery writes no key twice
    if isinstance(value, dict) and value.keys() == {"__type__", "__value__"} and value["__type__"] == tag:
        return value["__value__"]
    return value


def _amount(value: object, info: ValidationInfo) -> Decimal:
    """An exact amount: an ASCII decimal string or a JSON integer, more than 0, at most max_amount."""
    text = value if isinstance(value, str) else _amount_text(value)
    if text is None or not _AMOUNT.fullmatch(text):
        raise _refuse('must be digits with at most 20 before and 18 after the point, such as "12.5"')
    amount = Decimal(text)
    limit = info.context.get("max_amount", MAX_AMOUNT) if info.context else MAX_AMOUNT
    if not 0 < amount <= limit:
        raise _refuse(f"must be more than 0 and at most {limit}")
    return amount


def _amount_text(value: object) -> str | None:
    """The digits of an amount that is not a string; None if it has none."""
    if isinstance(value, dict):
        value = _decimal_tag(value)
    if isinstance(value, bool | float | JsonNumber) and not _is_long_integer(value):
        raise _refuse('must be a string such as "1.5" or a JSON integer: other numbers lose digits on their way')
    if isinstance(value, Decimal):
        return _plain(value)
    if isinstance(value, int):
        # An int this long exceeds every limit, and Python would be slow to print it, or refuse.
        return str(value) if -(10**40) < value < 10**40 else "9" * 41
    return None


def _is_long_integer(value: object) -> bool:
    """Whether this is a JSON integer so long that `read_json` makes no int of it."""
    return isinstance(value, JsonNumber) and value.as_tuple().exponent == 0 and value.adjusted() >= MAX_EXPONENT


def _decimal_tag(value: object) -> object:
    text = _untagged(value, "decimal")
    # Decimal() accepts underscores, digits of other scripts and huge exponents; str(Decimal) writes none of them.
    if isinstance(text, str) and re.fullmatch(r"[0-9.]{1,60}(E[+-]?[0-9]{1,3})?", text, re.ASCII):
        try:
            return Decimal(text)
        except ArithmeticError:
            return None
    return None


def _plain(amount: Decimal) -> str:
    exponent = amount.as_tuple().exponent
    if not isinstance(exponent, int) or exponent < -60 or abs(amount.adjusted()) > 60:  # noqa: PLR2004 - far past any amount
        return "beyond"
    return plain_number(amount)


def _moment(value: object) -> datetime:
    """An instant in UTC, from RFC 3339 text with an offset and at most microseconds."""
    value = _untagged(value, "datetime")
    if isinstance(value, datetime):
        value = value.isoformat()
    if not isinstance(value, str) or not _MOMENT.fullmatch(value):
        raise _refuse('must be RFC 3339 with an offset and at most microseconds, such as "2026-01-31T12:00:00Z"')
    try:
        moment = datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise _refuse("must be a moment that the calendar has") from None
    if moment < EARLIEST:
        raise _refuse("must not be before 2000-01-01")
    return moment


def _metadata(value: object) -> str:
    """The canonical text of a JSON object."""
    if not isinstance(value, dict):
        raise _refuse("must be a JSON object")
    try:
        text = write_json(value, max_depth=MAX_METADATA_DEPTH)
    except NotCanonical as error:
        raise _refuse(f"must be plain JSON at most {MAX_METADATA_DEPTH} deep, but {error}") from None
    if len(text) > MAX_METADATA_BYTES or len(text.encode()) > MAX_METADATA_BYTES:
        raise _refuse(f"must be at most {MAX_METADATA_BYTES} bytes long as compact JSON")
    return text


def _no_nul(text: str) -> str:
    if "\x00" in text:  # pydantic has refused surrogates, so a search for both would be wasted time
        raise _refuse("must not hold a NUL character")
    return text


UserId: TypeAlias = Annotated[
    str, StringConstraints(strict=True, min_length=1, max_length=128), AfterValidator(_no_nul)
]
Label: TypeAlias = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200), AfterValidator(_no_nul)]
Amount: TypeAlias = Annotated[
    Decimal,
    BeforeValidator(_amount),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^[0-9]{1,20}(\.[0-9]{1,18})?$"},
                {"type": "integer", "exclusiveMinimum": 0},
            ]
        }
    ),
]
Moment: TypeAlias = Annotated[
    datetime, BeforeValidator(_moment), WithJsonSchema({"type": "string", "format": "date-time"})
]
Metadata: TypeAlias = Annotated[str, BeforeValidator(_metadata), WithJsonSchema({"type": "object"})]


class _Event(BaseModel):
    """The fields of both events."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: UserId
    amount: Amount
    idempotency_key: Label
    occurred_at: Moment | None = None  # the producer's clock, in UTC; the worker never fills it in
    metadata: Metadata | None = None  # canonical text of a JSON object


class Accrual(_Event):
    """The account of `user_id` is funded with `amount` tokens from `source`."""

    type: Literal["accrual"] = "accrual"
    source: Label

    if TYPE_CHECKING:  # the types that a caller may pass; those of the fields are what validation makes of them

        def __init__(
            self,
            *,
            user_id: str,
            amount: str | int | Decimal,
            idempotency_key: str,
            source: str,
            occurred_at: datetime | str | None = None,
            metadata: dict[str, Any] | None = None,
        ) -> None: ...

    @property
    def purpose(self) -> str:
        """The source: where the tokens come from."""
        return self.source


class Burn(_Event):
    """`action` of `user_id` spends `amount` tokens, if the account of `user_id` holds them."""

    type: Literal["burn"] = "burn"
    action: Label

    if TYPE_CHECKING:  # the types that a caller may pass; those of the fields are what validation makes of them

        def __init__(
            self,
            *,
            user_id: str,
            amount: str | int | Decimal,
            idempotency_key: str,
            action: str,
            occurred_at: datetime | str | None = None,
            metadata: dict[str, Any] | None = None,
        ) -> None: ...

    @property
    def purpose(self) -> str:
        """The action: what the tokens are spent on."""
        return self.action


Event: TypeAlias = Accrual | Burn

_MODELS: Final[dict[str, type[Accrual | Burn]]] = {"accrual": Accrual, "burn": Burn}


class InvalidEvent(ValueError):
    """The data is not an event; the message names field, value (shortened) and rule in one sentence."""


def parse_event(data: object, *, type_: str | None = None, max_amount: int = MAX_AMOUNT) -> Event:
    """The event that `data` states.

    `type_` is the type that the task's name says; None reads it from `data`.
    Raises InvalidEvent, and nothing else, whatever `data` is.
    """
    if not isinstance(data, Mapping):
        raise InvalidEvent(f"An event must be a JSON object, not {quote(data)}.")
    if isinstance(data, DuplicateKeys):
        raise InvalidEvent(f"The event has the field {quote(data.name)} twice.")
    kind = data.get("type", type_)
    model = _MODELS.get(kind) if isinstance(kind, str) else None
    if model is None or (type_ is not None and kind != type_):
        shown = "missing" if kind is None and "type" not in data else quote(kind)
        raise InvalidEvent(f"type is {shown}: must be {quote(type_) if type_ else 'accrual or burn'}.")
    try:
        # model_validate does the same and passes on five more arguments, which takes a sixth of its time.
        return model.__pydantic_validator__.validate_python(data, context={"max_amount": max_amount})  # type: ignore[no-any-return]
    except ValidationError as error:
        raise InvalidEvent(_sentence(error)) from None


def event_json(event: Event, *, with_type: bool = True) -> str:
    """The event as JSON: canonical, but metadata stands last; absent fields are left out.

    Without the type these are the keyword arguments of the event's task, whose name says the type.
    Raises NotCanonical for an event, made past its checks, that holds a NUL or a lone surrogate.
    """
    # Spelled out, keys in canonical order: `write_json` of a dict of them takes two to three times as long.
    user_id = write_text(event.user_id, (None, "user_id"))
    key = write_text(event.idempotency_key, (None, "idempotency_key"))
    type_ = f'"type":"{event.type}",' if with_type else ""
    action = source = occurred_at = metadata = ""
    if isinstance(event, Accrual):
        source = f'"source":{write_text(event.source, (None, "source"))},'
    else:
        action = f'"action":{write_text(event.action, (None, "action"))},'
    if event.occurred_at is not None:
        occurred_at = f'"occurred_at":"{event.occurred_at.isoformat().replace("+00:00", "Z")}",'
    if event.metadata is not None:
        metadata = f',"metadata":{event.metadata}'
    return (
        f'{{{action}"amount":"{plain_number(event.amount)}","idempotency_key":{key},'
        f'{occurred_at}{source}{type_}"user_id":{user_id}{metadata}}}'
    )


def _sentence(error: ValidationError) -> str:
    clauses = []
    for item in error.errors(include_url=False)[:3]:
        field = ".".join(str(part) for part in item["loc"])
        match item["type"]:
            case "missing":
                clauses.append(f"{field} is missing")
            case "extra_forbidden":
                clauses.append(f"{quote(field)} is not a field of this event")
            case _ if not field or item["type"] == "invalid_key":  # the name itself is not text
                clauses.append(f"{quote(item['input'])} is not a field of this event")
            case _:
                clauses.append(f"{field} is {quote(item['input'])}: {_rule(item)}")
    return "; ".join(clauses) + "."


def _rule(item: ErrorDetails) -> str:
    """The broken rule, worded as the rules of this module where pydantic words it otherwise."""
    match item["type"]:
        case "string_type":
            return "must be a string"
        case "string_too_short":
            return "must not be empty"
        case "string_too_long":
            return f"must be at most {item['ctx']['max_length']} characters long"
        case "string_unicode":
            return "must not hold half of a surrogate pair, which is not a character"
    return item["msg"]
