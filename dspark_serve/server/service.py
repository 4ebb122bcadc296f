"""What the routes need of the loaded model: prompts to requests, and the choices that become the answer.

Must not know: HTTP responses, tensors; how tokens are made.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Literal

import structlog
from anyio import to_thread

from dspark_serve.choice import Choice, Piece, choice_seeds
from dspark_serve.config import Config, ConfigError
from dspark_serve.reports import EngineInfo, EngineStats
from dspark_serve.server.async_engine import AsyncEngine, EngineLike, RequestFailed, TokenStream
from dspark_serve.server.errors import ApiError
from dspark_serve.server.live import Live, LiveStats
from dspark_serve.server.metrics import Metrics
from dspark_serve.server.protocol import ChatBody, GenerationBody, TokenizeBody
from dspark_serve.text import Tokenizer
from dspark_serve.types import EngineBusy, InvalidRequest, Request

if TYPE_CHECKING:
    from dspark_serve.server.tracing import Traces

log = structlog.get_logger(__name__)
Loaded = tuple[EngineLike, Tokenizer | None]


def load(config: Config) -> Loaded:
    """Build the engine and the tokenizer that belongs to its model; None when the model has none."""
    from dspark_serve.engine.build import build_engine, find_model  # brings torch: only the loading thread pays for it

    model, resolved = config.model, find_model(config)
    # One after the other: Transformers replaces its own module while it is imported, and a second thread that imports
    # it then is left with the empty first one. In a new container, whose files are read slowly, that ended the start.
    tokenizer = Tokenizer.load(resolved.path, model.chat_template, model.trust_remote_code)
    engine = build_engine(config, resolved)
    # Python looks through all objects every now and then. Those of torch and Transformers, which stay as long as the
    # server does, take it a tenth of a second, between two tokens.
    gc.collect()
    gc.freeze()
    return engine, tokenizer


class Service:
    """The engine's door, the tokenizer, the metrics and the traces of one served model. Lives on the event loop.

    Raises ConfigError when traces are asked for and cannot be made.
    """

    def __init__(self, config: Config, load: Callable[[Config], Loaded] = load) -> None:
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.model_name = config.server.served_model_name or config.model.model
        self.metrics = Metrics(self.model_name, vllm_names=config.server.metrics_compat == "vllm")
        self.live = Live()
        endpoint = config.server.otlp_traces_endpoint
        self._traces = None if endpoint is None else _traces(endpoint, self.model_name)
        traces = () if self._traces is None else (self._traces,)
        self.engine = AsyncEngine(lambda: self._load(load), self.metrics, self.live, *traces)
        self.created = int(time.time())
        self._seeds = random.Random(config.engine.seed)

    def _load(self, load: Callable[[Config], Loaded]) -> EngineLike:
        engine, self.tokenizer = load(self.config)
        return engine

    async def stop(self) -> None:
        """End every request and the engine; send the last spans."""
        await self.engine.stop()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    @property
    def info(self) -> EngineInfo:
        """Facts of the engine; EngineBusy while it is loading."""
        if self.engine.info is None:
            raise EngineBusy("the model is still loading")
        return self.engine.info

    @property
    def report(self) -> Literal["none", "summary", "detailed"]:
        """How much an answer tells of speculation."""
        return self.config.speculation.per_request_spec_decode_metrics

    @property
    def can_chat(self) -> bool:
        return self.tokenizer is not None and self.tokenizer.chat_template is not None

    async def live_stats(self, after: int) -> LiveStats:
        """What the live page draws; steps beyond the first `after`. Answered while the engine loads, too."""
        state, curve = self.engine.state, None
        if state in ("ready", "draining"):
            curve = await self.engine.call(lambda engine: engine.cost_curve())
        return self.live.show(state, self.engine.stats or EngineStats(0, 0, 0, 0, 0, 0, 0), curve, after)

    def check_model(self, name: str | None) -> None:
        """404 unless the request names the served model, or none."""
        if name is not None and name not in (self.model_name, self.config.model.model):
            message = f"the model {name[:200]!r} does not exist here; this server serves {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    # ---- text to tokens, off the event loop

    def need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            _ = self.info  # EngineBusy while the engine is loading: the tokenizer comes with it
            raise InvalidRequest(f"this model has no tokenizer: {what}", "prompt", "no_tokenizer")
        return self.tokenizer

    async def encode(self, prompt: str | list[int], add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, which may be token ids already."""
        if not isinstance(prompt, str):
            return prompt
        tokenizer = self.need_tokenizer("send the prompt as a list of token ids")
        return await to_thread.run_sync(tokenizer.encode, prompt, add_special_tokens)

    async def encode_chat(self, body: ChatBody | TokenizeBody) -> list[int]:
        """Token ids of a conversation, through the model's chat template."""
        tokenizer = self.need_tokenizer("chat needs one; send token ids to /v1/completions")
        continued = bool(body.continue_final_message)
        if continued and body.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other"
            raise InvalidRequest(message, "continue_final_message", "invalid_value")
        messages = [message.model_dump(exclude_unset=True) for message in body.messages or ()]
        generate = not continued if body.add_generation_prompt is None else body.add_generation_prompt

        def encode() -> list[int]:
            return tokenizer.encode_chat(
                messages,
                add_generation_prompt=generate,
                continue_final_message=continued,
                template_kwargs=body.chat_template_kwargs,
            )

        return await to_thread.run_sync(encode)

    async def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        tokenizer = self.need_tokenizer("there is no text to give")
        bad = next((token for token in token_ids if not 0 <= token < self.info.vocab_size), None)
        if bad is not None:
            message = f"token id {bad} is outside the vocabulary of {self.info.vocab_size}"
            raise InvalidRequest(message, "tokens", "invalid_value")
        return await to_thread.run_sync(tokenizer.decode, token_ids, False)

    def echo(self, prompt: str | list[int]) -> str:
        """The prompt as text."""
        if isinstance(prompt, str):
            return prompt
        return "" if self.tokenizer is None else self.tokenizer.decode(prompt)

    # ---- tokens to a running answer

    def requests(self, body: GenerationBody, prompts: list[list[int]]) -> list[Request]:
        """The engine's requests for `n` choices of every prompt, in the order of the choices' indices."""
        params = body.sampling()
        n = body.n or 1
        if len(prompts) * n > self.config.engine.max_queue:
            message = f"{len(prompts) * n} sequences at once are more than the queue of {self.config.engine.max_queue}"
            raise InvalidRequest(message, "n", "invalid_value")
        if params.stop:
            self.need_tokenizer("stop strings cannot be matched")
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        stem, eos = uuid.uuid4().hex, frozenset(self.info.eos_token_ids)
        speculation, priority = body.speculation_params(), body.priority or 0
        return [
            Request(
                request_id=f"{stem}-{index}",
                prompt_token_ids=tuple(prompt),
                params=params if n == 1 else replace(params, seed=choice_seed),
                seed=choice_seed,
                eos_token_ids=eos,
                speculation=speculation,
                priority=priority,
            )
            for index, (prompt, choice_seed) in enumerate(product(prompts, choice_seeds(seed, n)))
        ]

    async def start(self, body: GenerationBody, prompts: list[list[int]]) -> Answer:
        """Submit a generation; it is running, or queued, when this returns. Always close the answer."""
        requests = self.requests(body, prompts)
        if self.config.server.log_prompts:
            log.info("prompts", prompts=[prompt if self.tokenizer is None else self.echo(prompt) for prompt in prompts])
        skip = True if body.skip_special_tokens is None else body.skip_special_tokens
        choices = [Choice(request, self.tokenizer, skip, body.marks_tokens()) for request in requests]
        return Answer(await self.engine.submit(*requests), choices, body.n or 1)


class Answer:
    """A running generation: iterate for (choice index, piece) until all choices have ended, then close."""

    def __init__(self, stream: TokenStream, choices: list[Choice], n: int) -> None:
        self.choices = choices
        self.n = n
        self._stream = stream
        self._began_s: float | None = time.monotonic()  # None once it is closed
        self._index = {choice.request.request_id: index for index, choice in enumerate(choices)}

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces as they come. RequestFailed or EngineBusy when the server has to give up."""
        async for delta in self._stream:
            if delta.finish_reason == "error":
                raise RequestFailed(delta.error or "the engine gave up on this request")
            index = self._index[delta.request_id]
            choice = self.choices[index]
            piece = choice.feed(delta)
            if choice.stopped_by_text and delta.finish_reason is None:
                self._stream.end(delta.request_id, "stop")
            yield index, piece

    async def complete(self) -> None:
        """Run to the end."""
        async for _ in self.pieces():
            pass

    def close(self) -> None:
        """Cancel what still runs; the pages come back before the engine's next step. Says once what came of it."""
        self._stream.close()
        if self._began_s is None:
            return
        seconds, self._began_s = time.monotonic() - self._began_s, None
        stats = [choice.request.stats for choice in self.choices]
        log.info(
            "generated",
            seconds=round(seconds, 4),
            prompt_tokens=sum(choice.request.num_prompt for choice in self.choices[:: self.n]),
            tokens=sum(len(choice.token_ids) for choice in self.choices),
            finish_reasons=[choice.finish_reason or "abort" for choice in self.choices],
            drafted=sum(one.num_draft_tokens for one in stats),
            accepted=sum(one.num_accepted_tokens for one in stats),
        )


def _traces(endpoint: str, model_name: str) -> Traces:
    try:
        from dspark_serve.server.tracing import Traces
    except ModuleNotFoundError as error:
        message = (
            f"--otlp-traces-endpoint needs the extra [otel] ({error.name} is missing): pip install 'dspark-serve[otel]'"
        )
        raise ConfigError(message) from None
    return Traces(endpoint, model_name)
