"""Every "no" of the read endpoint, as application/problem+json (RFC 9457): one sentence, never a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from schema.responses import HistoryQuery, Problem, ReceiptsQuery
from worker.schema_version import SchemaError

from .database import DatabaseAway

MEDIA_TYPE: Final = "application/problem+json"

#: Seconds after which a reader who met an outage should ask again.
RETRY_AFTER: Final = 2

#: Characters of a bad value that its refusal repeats.
_SHOWN: Final = 60

HISTORY: Final = "/api/account/transaction-history"
REJECTIONS: Final = "/api/account/rejections"
RECEIPTS: Final = "/api/account/receipts"

#: Address → parameter → what it must be.
_RULES: Final = {
    path: {field.alias or name: field.description for name, field in query.model_fields.items()}
    for path, query in ((HISTORY, HistoryQuery), (REJECTIONS, HistoryQuery), (RECEIPTS, ReceiptsQuery))
}

#: The only parameter that may be given more than once.
_REPEATED: Final = "idempotencyKey"


class BadParameter(Exception):
    """A parameter is at fault in a way that no model sees."""

    def __init__(self, parameter: str, detail: str) -> None:
        super().__init__(parameter, detail)
        self.parameter = parameter
        self.detail = detail


def problem(
    request: Request,
    status: int,
    detail: str,
    *,
    parameter: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer that says no."""
    path = request.scope.get("raw_path") or request.scope["path"].encode()
    text = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=path.decode("ascii", "backslashreplace"),
        parameter=parameter,
    ).json_text()
    return Response(text.encode(), status, headers, MEDIA_TYPE)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an endpoint's `responses` says of these problems."""
    schema = Problem.model_json_schema(mode="serialization")
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


def check_query_string(request: Request) -> None:
    """Refuse what parsing would lose: a parameter's second value, and bytes that are no UTF-8.

    Raises BadParameter.
    """
    seen: set[str] = set()
    rules = _rules(request)
    query = request.scope["query_string"].decode("latin-1")
    for name, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        if not _is_text(name) or not _is_text(value):
            raise BadParameter(
                _named(name, rules), f"{_named(name, rules)} must be percent-encoded UTF-8, and this is not."
            )
        if name in seen and not (name == _REPEATED and name in rules):
            raise BadParameter(_named(name, rules), f"{_named(name, rules)} is given more than once: give it once.")
        seen.add(name)


def install(app: FastAPI) -> None:
    """Answer with a problem wherever the application raises."""

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        parameter, detail = _refusal(error.errors()[0], _rules(request))
        return problem(request, 422, detail, parameter=parameter)

    @app.exception_handler(BadParameter)
    def bad_parameter(request: Request, error: BadParameter) -> Response:
        return problem(request, 422, error.detail, parameter=error.parameter)

    @app.exception_handler(DatabaseAway)
    @app.exception_handler(SchemaError)
    def not_now(request: Request, error: Exception) -> Response:
        return problem(request, 503, str(error), headers={"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        match error.status_code:
            case 404:
                detail = f"There is nothing at this address; there is {', '.join(sorted(app.openapi()['paths']))}."
            case 405:
                headers["Allow"] = "GET, HEAD"
                detail = "This address can only be read: use GET or HEAD."
            case _:
                detail = str(error.detail)
        return problem(request, error.status_code, detail, headers=headers)


def _rules(request: Request) -> Mapping[str, str | None]:
    return _RULES.get(request.scope["path"], {})


def _refusal(error: Mapping[str, Any], rules: Mapping[str, str | None]) -> tuple[str, str]:
    """The parameter at fault, and the sentence."""
    where = error["loc"]
    name = _named(str(where[1] if len(where) > 1 else where[0]), rules)  # behind it: which of several values
    match error["type"]:
        case "missing":
            return name, f"{name} is missing: it must be {rules[name]}."
        case "extra_forbidden":
            return name, f"{name} is not a parameter of this address; there are {', '.join(rules)}."
        case "too_long":
            return name, f"{name} is given {len(error['input'])} times: it must be {rules[name]}."
        case _:
            return name, f"{name} is {_shown(error['input'])}: it must be {rules[name]}."


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _named(name: str, rules: Mapping[str, str | None]) -> str:
    """A parameter's name as an answer may hold it: ours as it is, anything else in ASCII and short."""
    return name if name in rules else ascii(name[:_SHOWN])[1:-1]


def _shown(value: object) -> str:
    """A value as an answer may hold it: ASCII, and short."""
    text = str(value)
    shown = ascii(text[:_SHOWN])
    return shown if len(shown) <= _SHOWN and len(text) <= _SHOWN else f"{shown[:_SHOWN]}...'"
