"""Which HTTP request is being served here: what log lines and traces say of it, handed down beside the arguments.

Tasks inherit it. Must not know: routes, the engine, how anything is logged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from structlog.contextvars import bound_contextvars


@dataclass(frozen=True)
class HttpRequest:
    """Its id, the client's or ours, and the headers of W3C Trace Context that came along."""

    request_id: str = ""
    trace_headers: Mapping[str, str] = field(default_factory=dict)


_current: ContextVar[HttpRequest] = ContextVar("http_request")


def current() -> HttpRequest:
    """The request being served; without an id where none is."""
    return _current.get(HttpRequest())


@contextmanager
def serving(request: HttpRequest) -> Iterator[None]:
    """Everything inside, tasks started there included, belongs to `request`; its log lines carry the id."""
    token = _current.set(request)
    try:
        with bound_contextvars(request_id=request.request_id):
            yield
    finally:
        _current.reset(token)
