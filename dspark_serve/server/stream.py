"""A running answer as server-sent events, and what happens when the client hangs up.

Must not know: routes, what a chunk holds, the engine's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import structlog
from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from dspark_serve.server.errors import ApiError, to_api_error
from dspark_serve.server.render import Renderer
from dspark_serve.server.service import Answer

T = TypeVar("T")
log = structlog.get_logger(__name__)
PING_EVERY_S = 15
CLIENT_GONE = 499  # nginx's number; nobody is left to read it


class TokenEvents(EventSourceResponse):
    """Streams the chunks of an answer, then [DONE]. However it ends, the answer is closed."""

    def __init__(self, answer: Answer, renderer: Renderer, request_id: str) -> None:
        super().__init__(_events(answer, renderer, request_id), ping=PING_EVERY_S, ping_message_factory=_ping, sep="\n")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()  # here, not in the generator: that may never have been started


async def _events(answer: Answer, renderer: Renderer, request_id: str) -> AsyncIterator[ServerSentEvent]:
    try:
        async for index, piece in answer.pieces():
            for chunk in renderer.chunks(index, piece):
                yield _event(chunk)
        last = renderer.last_chunk()
        if last is not None:
            yield _event(last)
    except Exception as error:
        # The status line is long out; an error event is what OpenAI's clients look for.
        failure = to_api_error(error, request_id)
        if failure.status >= 500:
            log.exception("stream failed")
        yield _event(failure.body.model_dump_json())
    yield _event("[DONE]")


def _event(data: str) -> ServerSentEvent:
    return ServerSentEvent(data=data, sep="\n")


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it as soon as the client hangs up."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_GONE, "the client closed the connection")
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
