"""Every error response of the API, as application/problem+json (RFC 9457): one sentence, never a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from schema.responses import Problem
from schema.text import ascii_line, quote
from worker.schema_version import SchemaError

from .database import DatabaseUnavailable

MEDIA_TYPE: Final = "application/problem+json"

RETRY_AFTER: Final = 2  # seconds after which a reader that met an outage should ask again

#: The only parameter that may be given more than once.
_REPEATABLE: Final = "idempotencyKey"


class BadParameter(Exception):
    """A parameter is wrong in a way that its model cannot detect."""

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
    """An error response."""
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
    """The OpenAPI description of these error responses."""
    schema = Problem.model_json_schema(mode="serialization")
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


async def check_query_string(request: Request) -> None:
    """Refuse what FastAPI would drop silently: a parameter's second value, and bytes that are not UTF-8.

    Raises BadParameter.
    """
    seen: set[str] = set()
    rules = _rules(request)
    query = request.scope["query_string"].decode("latin-1")
    for name, value in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        printable = _printable(name, rules)
        if not _is_utf8(name) or not _is_utf8(value):
            raise BadParameter(printable, f"{printable} must be percent-encoded UTF-8, and this is not.")
        if name in seen and not (name == _REPEATABLE and name in rules):
            raise BadParameter(printable, f"{printable} is given more than once: give it once.")
        seen.add(name)


def install(app: FastAPI, queries: Mapping[str, type[BaseModel]]) -> None:
    """Answer with a problem wherever the application raises. `queries` maps a path to its parameters."""
    app.state.rules = {
        path: {field.alias or name: field.description for name, field in query.model_fields.items()}
        for path, query in queries.items()
    }

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        parameter, detail = _refusal(error.errors()[0], _rules(request))
        return problem(request, 422, detail, parameter=parameter)

    @app.exception_handler(BadParameter)
    def bad_parameter(request: Request, error: BadParameter) -> Response:
        return problem(request, 422, error.detail, parameter=error.parameter)

    @app.exception_handler(DatabaseUnavailable)
    @app.exception_handler(SchemaError)
    def unavailable(request: Request, error: Exception) -> Response:
        return problem(request, 503, str(error), headers={"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        match error.status_code:
            case 404:
                detail = (
                    f"No such endpoint. Available: {', '.join(sorted([*app.openapi()['paths'], '/openapi.json']))}."
                )
            case 405:
                headers["Allow"] = "GET, HEAD"
                detail = "This endpoint is read-only: use GET or HEAD."
            case _:
                detail = str(error.detail)
        return problem(request, error.status_code, detail, headers=headers)


def _rules(request: Request) -> Mapping[str, str | None]:
    """Each parameter of this path, and what it must be."""
    rules: Mapping[str, str | None] = request.app.state.rules.get(request.scope["path"], {})
    return rules


def _refusal(error: Mapping[str, Any], rules: Mapping[str, str | None]) -> tuple[str, str]:
    """The wrong parameter, and the sentence."""
    location = error["loc"]  # "query", the parameter, and which of its values
    name = _printable(str(location[1] if len(location) > 1 else location[0]), rules)
    match error["type"]:
        case "missing":
            return name, f"{name} is missing: it must be {rules[name]}."
        case "extra_forbidden":
            return name, f"{name} is not a parameter{_suggestion(name, rules)} Parameters: {', '.join(rules)}."
        case "too_long":
            return name, f"{name} is given {len(error['input'])} times: it must be {rules[name]}."
        case _:
            return name, f"{name} is {quote(error['input'])}: it must be {rules[name]}."


def _suggestion(name: str, rules: Mapping[str, str | None]) -> str:
    """For userid or user_id: userId."""
    folded = {rule.casefold(): rule for rule in rules}
    match = folded.get(name.casefold().replace("_", ""))
    return f"; did you mean {match}?" if match else "."


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _printable(name: str, rules: Mapping[str, str | None]) -> str:
    """A parameter's name for a response: a known one as it is, any other in ASCII and short."""
    return name if name in rules else ascii_line(name, 60)
