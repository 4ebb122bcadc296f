"""What happens to every request before any route: its id, the API key, the size of its body, the last safety net.

Plain ASGI, because Starlette's function middleware hides disconnects. Must not know: routes, engine, text.
"""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import Set

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_serve.server.context import HttpRequest, serving
from dspark_serve.server.errors import ApiError, to_api_error

log = structlog.get_logger(__name__)
TRACE_HEADERS = ("traceparent", "tracestate")  # W3C Trace Context
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """The outermost layer. Sets scope["request_id"], answers 401, 413 and 500 itself; `open_paths` need no key."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, max_body_bytes: int, open_paths: Set[str] = OPEN_PATHS
    ) -> None:
        self.app = app
        self.api_key = None if api_key is None else api_key.encode()
        self.max_body_bytes = max_body_bytes
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        request_id = asked if _SAFE_ID.fullmatch(asked) else uuid.uuid4().hex
        scope["request_id"] = request_id
        traced = {name: headers[name] for name in TRACE_HEADERS if name in headers}
        with serving(HttpRequest(request_id, traced)):
            await self._answer(scope, receive, send, headers, request_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers, request_id: str) -> None:
        began_s, status = time.monotonic(), None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            self._admit(scope["path"], headers)
            await self.app(scope, self._limited(receive), send_with_id)
        except Exception as error:
            answer = to_api_error(error, request_id)
            if answer.status >= 500:
                log.exception("request failed", path=scope["path"])
            if status is not None:
                raise  # half an answer is out: cutting the connection is the only honest signal left
            await answer.response()(scope, receive, send_with_id)
        finally:
            # What went well is told by the line of the generation, and probes ask all the time; refusals are what an
            # operator is asked about.
            quiet = scope["path"] in OPEN_PATHS or (status is not None and status < 400)
            say = log.debug if quiet else log.info
            took_s = round(time.monotonic() - began_s, 4)
            say("answered", method=scope["method"], path=scope["path"], status=status, seconds=took_s)

    def _admit(self, path: str, headers: Headers) -> None:
        if self.api_key is not None and path not in self.open_paths:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key):
                raise ApiError(
                    401,
                    "missing or wrong API key: send `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > 15 or int(length) > self.max_body_bytes):
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts while the body comes in, because a chunked body has no length to check first."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise HTTPException(413, self._too_large().args[0])
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request body is larger than {self.max_body_bytes} bytes", code="content_too_large")
