"""Failures as HTTP: every error leaves as {"error": {message, type, param, code}} with the right status.

Must not know: the engine, text, what a request asks for.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dspark_serve.server.async_engine import RequestFailed
from dspark_serve.types import EngineBusy, EngineDead, InvalidRequest

RETRY_AFTER_S = 1


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorBody


class ApiError(Exception):
    """An answer other than success, complete."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = ErrorResponse(error=ErrorBody(message=message, type=_type(status), param=param, code=code))

    def response(self) -> JSONResponse:
        return _AsciiJSON(self.body.model_dump(), self.status, self.headers)


class _AsciiJSON(JSONResponse):
    def render(self, content: Any) -> bytes:
        # A message may quote the client, who may have sent half a surrogate pair: only escapes can carry that.
        return json.dumps(content, ensure_ascii=True, allow_nan=False).encode("ascii")


def _type(status: int) -> str:
    names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable"}
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")


def to_api_error(error: BaseException, request_id: str) -> ApiError:
    """The answer that an exception deserves; anything unforeseen is a 500 that says nothing but its request id."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case EngineBusy():
            return ApiError(503, str(error), code="engine_busy", headers={"Retry-After": str(RETRY_AFTER_S)})
        case EngineDead():
            return ApiError(503, str(error), code="engine_dead")
        case RequestFailed():
            return ApiError(500, f"{error} (request id {request_id})", code="engine_failed")
        case RequestValidationError():
            return _from_validation(error)
        case HTTPException():
            return _from_http(error)
        case _:
            return ApiError(500, f"internal server error (request id {request_id})", code="internal_error")


def _from_http(error: HTTPException) -> ApiError:
    message = str(error.detail)
    if error.status_code == 400 and isinstance(error.__cause__, UnicodeDecodeError):
        message = "the request body is not valid UTF-8"
    elif error.status_code == 404:
        message = "no such route"
    elif error.status_code == 405:
        message = "this route does not take that method"
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    return ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))


def _from_validation(error: RequestValidationError) -> ApiError:
    """One sentence on the first field that is wrong; the alternatives of a union are joined by `or`."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the request body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    path = _path(first["loc"])
    if not path:
        return ApiError(400, "send a JSON object with `Content-Type: application/json`", code="invalid_value")
    same = [p["msg"] for p in problems if _path(p["loc"]).split(".")[0] == path.split(".")[0]]
    messages = list(dict.fromkeys(same))[:4]
    return ApiError(400, f"{path}: {' or '.join(messages)}", param=path, code="invalid_value")


def _path(loc: tuple[int | str, ...] | list[int | str]) -> str:
    """`messages.0.role` from pydantic's location, without the part that names the alternative of a union."""
    parts = [str(part) for part in loc if part not in ("body", "path", "query")]
    return ".".join(part for part in parts if "[" not in part and part not in ("str", "int", "float", "bool"))


def install(app: FastAPI) -> None:
    """Make every failure inside the application leave in the one shape."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return to_api_error(error, request.scope.get("request_id", "")).response()

    for kind in (
        ApiError,
        InvalidRequest,
        EngineBusy,
        EngineDead,
        RequestFailed,
        RequestValidationError,
        HTTPException,
    ):
        app.add_exception_handler(kind, handle)
