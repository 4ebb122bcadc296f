"""Run the server in this process: socket, start-up lines, stats line, signals, orderly end.

Must not know: routes, what a request asks for, tensors.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import structlog
import uvicorn
from sse_starlette.sse import AppStatus

from dspark_serve.config import Config, ConfigError
from dspark_serve.reports import EngineInfo
from dspark_serve.server.app import create_app
from dspark_serve.server.logs import configure_logging
from dspark_serve.server.service import Loaded, Service, load

STATS_EVERY_S = 10.0
log = structlog.get_logger(__name__)


class StartupError(RuntimeError):
    """The server cannot start; the message is one sentence for the user."""


def serve(config: Config, load: Callable[[Config], Loaded] = load) -> int:
    """Serve until a signal ends it; the process's exit code. Raises StartupError with one sentence."""
    configure_logging(config.server.log_level, config.server.log_format)
    listener = bind(config.server.host, config.server.port)
    try:
        service = Service(config, load)
    except ConfigError as error:
        raise StartupError(str(error)) from None
    app = create_app(service)
    settings = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_keep_alive=65, timeout_graceful_shutdown=5, lifespan="on"
    )
    AppStatus.enable_automatic_graceful_drain = False  # streams end when their requests do; the drain below sees to it
    server = DrainingServer(settings, service, config.server.shutdown_timeout)
    server.run(sockets=[listener])
    if server.failure is not None:
        raise StartupError(_sentence(server.failure)) from server.failure
    if service.engine.thread_alive:
        # A daemon thread inside native code makes the interpreter's teardown crash; there is nothing left to save.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if server.forced else 0)
    return 1 if server.forced else 0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded so that a port in use is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(f"port {port} on {host} is in use; choose another with --port") from None
        raise StartupError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener


class DrainingServer(uvicorn.Server):
    """uvicorn that keeps listening while it drains, so that /ready can say 503; a second signal ends it at once."""

    def __init__(self, settings: uvicorn.Config, service: Service, shutdown_timeout_s: float) -> None:
        super().__init__(settings)
        self.service = service
        self.shutdown_timeout_s = shutdown_timeout_s
        self.failure: BaseException | None = None  # why loading failed
        self.forced = False
        self._draining: asyncio.Task[None] | None = None

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        chores = [asyncio.create_task(self._announce()), asyncio.create_task(log_stats(self.service))]
        try:
            await super().main_loop()
        finally:
            for chore in chores:
                chore.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is None and not self.forced and hasattr(self, "_loop"):
            self._loop.call_soon_threadsafe(self._start_drain, signal.Signals(sig).name)
        else:
            self.forced = self.should_exit = self.force_exit = True

    def _start_drain(self, name: str) -> None:
        if self._draining is None:
            log.info("draining", signal=name, requests=self.service.engine.num_requests)
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        if not await self.service.engine.drain(self.shutdown_timeout_s):
            log.warning("requests were cut off", after_s=self.shutdown_timeout_s)
        self.should_exit = True

    async def _announce(self) -> None:
        """Wait for the engine and print the start-up lines, or end the server with the reason."""
        try:
            info = await self.service.engine.wait_loaded()
        except Exception as error:
            if self._draining is None and not self.forced:  # else it is the signal that ended the loading
                self.failure = error
            self.should_exit = True
            return
        address = self.servers[0].sockets[0].getsockname()
        for line in startup_lines(info, self.service, f"{address[0]}", address[1]):
            print(line, flush=True)


def startup_lines(info: EngineInfo, service: Service, host: str, port: int) -> list[str]:
    """What a ready server says: K/V pool, speculation, exactness, the URLs, and a request to paste."""
    lengths = info.pool_tokens / info.max_model_len
    drafts = "off" if info.drafter == "none" else f"{info.drafter}, up to {info.num_speculative_tokens} drafts per step"
    if info.head is not None:
        mib, separate = info.head_bytes / 2**20, info.separate_draft_bytes / 2**20
        drafts += f"; head {info.head}: {mib:.1f} MiB, a separate model of equal depth {separate:.1f} MiB"
    if info.row_invariant:
        exact = "bitwise: arithmetic is row-invariant, the same seed gives the same text in any batch, drafts or not"
    else:
        exact = "same distribution; arithmetic is not row-invariant here, so near-ties may fall differently in a batch"
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown}:{port}"
    if service.can_chat:
        path = "/v1/chat/completions"
        body: dict[str, object] = {"messages": [{"role": "user", "content": "Say hello in five words."}]}
    else:
        path, body = "/v1/completions", {"prompt": [1, 2, 3], "return_token_ids": True}
    key = " -H 'Authorization: Bearer '$KEY" if service.config.server.api_key else ""
    return [
        f"model        {service.model_name}: {info.architecture}, {info.dtype} on {info.device}, {info.backend}"
        + (f", CUDA graphs up to {info.graph_tokens} tokens" if info.graph_tokens else ""),
        f"K/V pool     {info.pool_tokens:,} tokens ({info.kv_bytes / 2**20:,.0f} MiB), "
        f"{lengths:.1f} requests at the full length of {info.max_model_len:,}",
        f"speculation  {drafts} ({info.verify_mode})",
        *(f"warning      {sentence}" for sentence in info.warnings),
        f"exactness    {exact}",
        *([f"live page    {url}/"] if service.config.server.ui else []),
        f"ready        {url}/v1",
        f"curl {url}{path} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'",
    ]


async def log_stats(service: Service, every_s: float = STATS_EVERY_S) -> None:
    """One line every ten seconds while there is work; never returns."""
    totals, then_s = replace(service.metrics.totals), time.monotonic()
    while True:
        await asyncio.sleep(every_s)
        before, totals = totals, replace(service.metrics.totals)
        elapsed_s, then_s = time.monotonic() - then_s, time.monotonic()
        stats = service.engine.stats
        generated = totals.generation_tokens - before.generation_tokens
        if stats is None or not (generated or stats.num_running or stats.num_waiting):
            continue
        drafted = totals.draft_tokens - before.draft_tokens
        log.info(
            "serving",
            running=stats.num_running,
            waiting=stats.num_waiting,
            kv_cache_usage=round(stats.pages_used / max(1, stats.pages_total), 3),
            prompt_tokens_per_s=round((totals.prompt_tokens - before.prompt_tokens) / elapsed_s, 1),
            tokens_per_s=round(generated / elapsed_s, 1),
            draft_tokens_per_s=round(drafted / elapsed_s, 1),
            acceptance_rate=round((totals.accepted_tokens - before.accepted_tokens) / drafted, 3) if drafted else None,
        )


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # ValueErrors and errors of our own are sentences already; of any other the kind is worth knowing.
    ours = type(error) is ValueError or type(error).__module__.startswith("dspark_serve")
    return text if ours and text else f"loading failed with {type(error).__name__}: {text}"
