"""One OpenAI-compatible server, ours or another, as a benchmark sees it: streamed answers with their times.

openai's own client does HTTP, retries and server-sent events; chunks stay plain dictionaries, because typed ones would
cost the client more than some servers need for a token. Must not know: loads, statistics, engines.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI, AsyncStream

from dspark_serve.bench.figures import Sample

_RETRY_COUNT = "x-stainless-retry-count"  # openai's client says in each request how many it took


class BenchError(Exception):
    """The benchmark cannot go on; one sentence that says what to do."""


class Endpoint:
    """A server and the model asked for there. `client`: the HTTP client to ask with, if not openai's own."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 3,
        client: Any = None,
    ) -> None:
        self.root = url.rstrip("/").removesuffix("/v1")
        self.model = model
        key = api_key or "none"
        self._client = AsyncOpenAI(
            base_url=f"{self.root}/v1", api_key=key, timeout=timeout_s, max_retries=retries, http_client=client
        )

    async def close(self) -> None:
        await self._client.close()

    async def find_model(self) -> str:
        """The model to ask for; the server's first unless one was named. Raises BenchError when there is no telling."""
        if self.model is None:
            try:
                models = (await self._client.models.list()).data
            except (APIError, ValueError) as error:
                hint = "; is the server running there (--url)?" if isinstance(error, APIConnectionError) else ""
                raise BenchError(f"{self.root} could not be asked for its models: {explain(error)}{hint}") from error
            if not models:
                raise BenchError(f"{self.root} lists no model; name one with --model")
            self.model = models[0].id
        return self.model

    async def ask(self, body: Mapping[str, Any]) -> Sample:
        """Send one request, chat where it has `messages`, and read its answer to the end. Failures are samples too."""
        path = "/chat/completions" if "messages" in body else "/completions"
        whole = {**body, "model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        started_s = time.perf_counter()
        try:
            stream = await self._client.post(
                path, body=whole, cast_to=object, stream=True, stream_cls=AsyncStream[object]
            )
            return await _read(stream, started_s)
        except Exception as error:  # whatever goes wrong with one request is a result of the benchmark, not its end
            response = getattr(error, "response", None)
            retries = 0 if response is None else int(response.request.headers.get(_RETRY_COUNT, 0))
            status = error.status_code if isinstance(error, APIStatusError) else None
            ended_s = time.perf_counter()
            return Sample(started_s, ended_s, error=explain(error), status=status, retries=retries)

    async def metrics(self) -> str | None:
        """The server's page of Prometheus text; None where it has none."""
        try:
            return await self._client.get(f"{self.root}/metrics", cast_to=str)
        except APIError:
            return None

    async def tokenize(self, text: str) -> list[int] | None:
        """Token ids of a text by vLLM's /tokenize; None where the server has no such route."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            answer: Any = await self._client.post(f"{self.root}/tokenize", body=body, cast_to=object)
            return [int(token) for token in answer["tokens"]]
        except (APIError, KeyError, TypeError):
            return None

    async def version(self) -> str | None:
        """What the server says of itself; None where it says nothing."""
        try:
            answer: Any = await self._client.get(f"{self.root}/version", cast_to=object)
            return str(answer["version"])
        except (APIError, KeyError, TypeError, ValueError):
            return None


async def _read(stream: AsyncStream[Any], started_s: float) -> Sample:
    arrivals_s: list[float] = []
    texts: list[str] = []
    usage: Mapping[str, Any] | None = None
    finished = False
    async for chunk in stream:
        now_s = time.perf_counter()
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or ():
            finished = finished or choice.get("finish_reason") is not None
            text = _text(choice)
            if text:
                arrivals_s.append(now_s)
                texts.append(text)
    ended_s = time.perf_counter()
    retries = int(stream.response.request.headers.get(_RETRY_COUNT, 0))
    if not finished:
        return Sample(started_s, ended_s, error="the stream ended before the answer did", retries=retries)
    return Sample(
        started_s,
        max(arrivals_s, default=ended_s),  # the usage that follows is no part of the answer
        tuple(arrivals_s),
        num_input=int(usage["prompt_tokens"]) if usage else 0,
        num_output=int(usage["completion_tokens"]) if usage else len(arrivals_s),
        counted=usage is None,
        text="".join(texts),
        retries=retries,
    )


def _text(choice: Mapping[str, Any]) -> str:
    """What a chunk's choice adds to the answer, its reasoning included."""
    if "text" in choice:
        return choice["text"] or ""
    delta = choice.get("delta") or {}
    return "".join(delta.get(key) or "" for key in ("reasoning_content", "reasoning", "content"))


def explain(error: BaseException) -> str:
    """An error in one line: the server's own sentence where it sent one, else what the connection ran into."""
    if isinstance(error, APIStatusError):
        body: Any = error.body
        said = body.get("message") if isinstance(body, Mapping) else None
        return f"HTTP {error.status_code}: {said or error.message}"
    cause = error.__cause__
    text = str(error) if cause is None else f"{error} ({str(cause) or type(cause).__name__})"
    return " ".join(text.split()) or type(error).__name__
