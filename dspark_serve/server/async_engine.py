"""The only door to the engine: submit requests, receive their tokens, cancel them, drain.

The engine lives in one thread of its own, loading included. Commands go in through a mailbox, deltas come out with
one wake-up of the event loop per step. Must not know: HTTP, text, tensors.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Literal, Protocol, TypeVar

import structlog

from dspark_serve.reports import EngineInfo, EngineStats, StepReport, TokenDelta
from dspark_serve.types import CostCurve, EngineBusy, EngineDead, FinishReason, Request

log = structlog.get_logger(__name__)
T = TypeVar("T")
State = Literal["new", "loading", "ready", "draining", "dead", "stopped"]


class EngineLike(Protocol):
    """What the door asks of an engine; `dspark_serve.engine.engine.Engine` is one."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> object: ...
    def step(self) -> StepReport: ...
    def stats(self) -> EngineStats: ...
    def cost_curve(self) -> CostCurve | None: ...


class Observer(Protocol):
    """Told on the event loop what happens: the metrics, the live page's counts, traces."""

    def on_loaded(self, info: EngineInfo, stats: EngineStats) -> None: ...
    def on_submit(self, request: Request) -> None: ...
    def on_reject(self, request_id: str) -> None: ...
    def on_step(self, report: StepReport | None, stats: EngineStats, started_s: float) -> None: ...
    def on_end(self, request_id: str, reason: FinishReason) -> None:
        """A request ended outside the engine's own reports: a stop string, a hang-up, a failure."""


class RequestFailed(RuntimeError):
    """A running request was lost to a failure of the server; the message is fit for the client."""


class TokenStream:
    """The deltas of the requests of one submission, in the order the engine produced them.

    Iterate until all of them have ended. Always close it: closing cancels whatever still runs, and is free after.
    """

    def __init__(self, door: AsyncEngine, requests: Iterable[Request]) -> None:
        self._door = door
        self._open = {request.request_id for request in requests}
        self._news: asyncio.Queue[TokenDelta | Exception] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[TokenDelta]:
        return self

    async def __anext__(self) -> TokenDelta:
        """The next delta; RequestFailed or EngineBusy when the server ends the request for reasons of its own."""
        while self._open or not self._news.empty():
            news = await self._news.get()
            if isinstance(news, Exception):
                raise news
            if news.request_id not in self._open:
                continue  # ended by us after the engine had produced more
            if news.finish_reason is not None:
                self._open.discard(news.request_id)
            return news
        raise StopAsyncIteration

    def end(self, request_id: str, reason: FinishReason) -> None:
        """End one request early, for `reason`; its pages come back before the engine's next step."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._door._end([request_id], reason)

    def close(self) -> None:
        """Cancel what still runs."""
        for request_id in tuple(self._open):
            self.end(request_id, "abort")

    def _push(self, news: TokenDelta | Exception) -> None:
        self._news.put_nowait(news)


class AsyncEngine:
    """Owns the engine thread. Every public method is called on the event loop that called `start`."""

    def __init__(self, load: Callable[[], EngineLike], *observers: Observer) -> None:
        self.state: State = "new"
        self.info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        self.failure: BaseException | None = None  # why the state is "dead"
        self._load = load
        self._observers = observers
        self._streams: dict[str, TokenStream] = {}
        self._mailbox: deque[Callable[[EngineLike], None]] = deque()
        self._bell = threading.Condition()
        self._stopping = False
        self._answers: set[asyncio.Future[Any]] = set()  # of calls that wait for the engine thread
        self._changed = asyncio.Event()  # replaced at every change of state or of the set of running requests

    # ---- life cycle

    def start(self) -> None:
        """Start the thread, which loads the engine first. Call it on the running event loop; again after `stop`."""
        self._stopping, self.failure = False, None
        self._mailbox.clear()
        self._loop = asyncio.get_running_loop()
        self._set_state("loading")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def wait_loaded(self) -> EngineInfo:
        """Facts of the engine once it is loaded; raises what loading raised."""
        await self._wait_for(lambda: self.state != "loading")
        if self.info is None:
            raise self.failure or EngineDead("the engine was stopped while it was loading")
        return self.info

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests, let the running ones finish for up to `timeout_s`; False if some were cut off."""
        if self.state in ("loading", "ready"):
            self._set_state("draining")
        try:
            await asyncio.wait_for(self._wait_for(lambda: not self._streams), timeout_s)
        except TimeoutError:
            self.abort_all(EngineBusy("the server is shutting down"))
            return False
        return True

    def abort_all(self, error: Exception) -> None:
        """End every request with `error`."""
        streams = set(self._streams.values())
        self._end(tuple(self._streams), "abort")
        for stream in streams:
            stream._push(error)

    async def stop(self) -> None:
        """End everything and the thread; a thread that is still loading is left to die with the process."""
        if self.state in ("new", "stopped"):
            return
        self.abort_all(EngineBusy("the server is shutting down"))
        self._fail_answers(EngineBusy("the server is shutting down"))
        loading = self.state == "loading" or self.info is None
        if self.state != "dead":
            self._set_state("stopped")
        with self._bell:
            self._stopping = True
            self._bell.notify()
        if not loading:
            await asyncio.to_thread(self._thread.join)

    # ---- requests

    async def submit(self, *requests: Request) -> TokenStream:
        """Hand requests to the engine, all or none, and wait until it took them.

        Raises InvalidRequest or EngineBusy as the engine does, EngineBusy while loading or draining, EngineDead.
        """
        self.check_open()
        stream = TokenStream(self, requests)
        ids = [request.request_id for request in requests]
        for request in requests:
            self._streams[request.request_id] = stream
            for observer in self._observers:
                observer.on_submit(request)

        def add(engine: EngineLike) -> None:
            for index, request in enumerate(requests):
                try:
                    engine.add(request)
                except Exception:
                    for added in requests[:index]:
                        engine.cancel(added.request_id)
                    raise

        try:
            await self.call(add)
        except BaseException:
            self._forget(ids)
            # Harmless if they never got in; if we were cancelled while waiting for the answer, they did.
            self._post_command(lambda engine: _cancel(engine, ids))
            for observer in self._observers:
                for request_id in ids:
                    observer.on_reject(request_id)
            raise
        return stream

    async def call(self, function: Callable[[EngineLike], T]) -> T:
        """Run a function on the engine thread between two steps; what it raises is raised here, and harms nothing."""
        if self.state in ("new", "stopped", "dead"):
            raise EngineDead("the engine is not running")
        answer: asyncio.Future[T] = self._loop.create_future()

        def command(engine: EngineLike) -> None:
            try:
                result = function(engine)
            except Exception as error:
                self._post(_settle, answer, None, error)
            else:
                self._post(_settle, answer, result, None)

        self._post_command(command)
        self._answers.add(answer)
        try:
            return await answer
        finally:
            self._answers.discard(answer)

    @property
    def thread_alive(self) -> bool:
        """Whether the thread still runs; after `stop` only one that cannot be interrupted does."""
        return self.state != "new" and self._thread.is_alive()

    @property
    def num_requests(self) -> int:
        """Requests whose end is still to come."""
        return len(self._streams)

    def check_open(self) -> None:
        """Raise what `submit` would raise now for the engine's state: EngineBusy, EngineDead, or nothing."""
        if self.state == "dead":
            raise EngineDead("the engine has failed; the server must be restarted")
        if self.state in ("new", "loading"):
            raise EngineBusy("the model is still loading")
        if self.state != "ready":
            raise EngineBusy("the server is shutting down")

    def _end(self, request_ids: Iterable[str], reason: FinishReason) -> None:
        request_ids = [request_id for request_id in request_ids if request_id in self._streams]
        self._forget(request_ids)
        self._post_command(lambda engine: _cancel(engine, request_ids))
        for observer in self._observers:
            for request_id in request_ids:
                observer.on_end(request_id, reason)

    def _forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._streams.pop(request_id, None)
        self._notify()

    # ---- between loop and thread

    def _post_command(self, command: Callable[[EngineLike], None]) -> None:
        with self._bell:
            self._mailbox.append(command)
            self._bell.notify()

    def _post(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._stopping = True

    def _set_state(self, state: State) -> None:
        self.state = state
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    # ---- the engine thread

    def _run(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            self._post(self._on_death, error)
            return
        self._post(self._on_loaded, engine.info, engine.stats())
        try:
            while self._next_commands(engine):
                started_s = time.monotonic()
                report = engine.step() if engine.has_work else None
                self._post(self._on_step, report, engine.stats(), started_s)
        except BaseException as error:
            log.exception("the engine failed")
            self._post(self._on_death, error)

    def _next_commands(self, engine: EngineLike) -> bool:
        """Run the commands that wait; with nothing else to do, sleep until there is one. False: time to stop."""
        with self._bell:
            while not (self._mailbox or self._stopping or engine.has_work):
                self._bell.wait()
            commands, self._mailbox = self._mailbox, deque()
        for command in commands:
            command(engine)
        return not self._stopping

    # ---- news from the engine thread, on the loop

    def _on_loaded(self, info: EngineInfo, stats: EngineStats) -> None:
        self.info, self.stats = info, stats
        for observer in self._observers:
            observer.on_loaded(info, stats)
        if self.state == "loading":
            self._set_state("ready")

    def _on_step(self, report: StepReport | None, stats: EngineStats, started_s: float) -> None:
        self.stats = stats
        for observer in self._observers:
            observer.on_step(report, stats, started_s)
        ended = False
        for delta in report.deltas if report is not None else ():
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue  # cancelled while the step ran
            if delta.finish_reason is not None:
                del self._streams[delta.request_id]
                ended = True
            stream._push(delta)
        if ended:
            self._notify()

    def _on_death(self, error: BaseException) -> None:
        self.failure = error
        streams = set(self._streams.values())
        for request_id in list(self._streams):
            del self._streams[request_id]
            for observer in self._observers:
                observer.on_end(request_id, "error")
        for stream in streams:
            stream._push(RequestFailed("the engine failed while it worked on this request"))
        self._fail_answers(EngineDead("the engine has failed"))
        self._set_state("dead")

    def _fail_answers(self, error: Exception) -> None:
        for answer in tuple(self._answers):
            _settle(answer, None, error)


def _cancel(engine: EngineLike, request_ids: Iterable[str]) -> None:
    for request_id in request_ids:
        engine.cancel(request_id)


def _settle(answer: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if answer.done():
        return  # whoever asked has gone
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)
