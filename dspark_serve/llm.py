"""Offline generation: LLM(...).generate(prompts). The server's engine, driven in the caller's own thread.

Must not know: HTTP, the event loop, tensors.
"""

from __future__ import annotations

import random
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from dspark_serve import types
from dspark_serve.choice import Choice, choice_seeds
from dspark_serve.config import load_config
from dspark_serve.reports import EngineInfo
from dspark_serve.text import Tokenizer
from dspark_serve.types import (
    EngineBusy,
    FinishReason,
    InvalidRequest,
    Request,
    SpeculationParams,
    SpeculationStats,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from dspark_serve.engine.engine import Engine

Prompt = str | Mapping[str, Sequence[int]] | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
MAX_CHOICES = 128


@dataclass(frozen=True, kw_only=True)
class SamplingParams(types.SamplingParams):
    """The engine's sampling parameters, and what belongs to a whole prompt: `n` choices, each with a seed of its own,
    and how it may be sped up (`speculation`), which never changes the text.

    `stop`, `stop_token_ids` and `logit_bias` also come as a string, lists and a mapping, as vLLM's users write them.
    """

    n: int = 1
    skip_special_tokens: bool = True
    speculation: SpeculationParams | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # frozen; this is still construction
        set_(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        set_(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        bias: Any = self.logit_bias or ()
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        set_(self, "logit_bias", tuple((int(token), float(value)) for token, value in pairs))
        if not 1 <= self.n <= MAX_CHOICES:
            raise InvalidRequest(f"n must be between 1 and {MAX_CHOICES}", "n", "invalid_value")
        super().__post_init__()


@dataclass(frozen=True)
class RequestMetrics:
    """What speculation did for a choice; per_request_spec_decode_metrics says how much of it is told."""

    speculative_decoding: SpeculationStats | None


@dataclass(frozen=True)
class CompletionOutput:
    """One choice."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[TokenLogprobs] | None
    metrics: RequestMetrics


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its choices. `prompt` is None when the prompt came as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    finished: bool = field(default=True)


class LLM:
    """A model in this process. Options are the configuration's leaves: `LLM("llama", max_model_len=2048)`.

    Use from one thread. Raises ValueError, or the loader's error, with one sentence when the model cannot be had.
    """

    def __init__(
        self, model: str | None = None, *, speculative_config: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        from dspark_serve.engine.build import build_engine  # brings torch

        self.config = load_config({"model": model, **options}, speculative_config=speculative_config)
        self._engine: Engine | None = build_engine(self.config)
        self.info: EngineInfo = self._engine.info
        self.tokenizer = Tokenizer.load(
            self.info.model_dir, self.config.model.chat_template, self.config.model.trust_remote_code
        )
        self._seeds = random.Random(self.config.engine.seed)

    def close(self) -> None:
        """Give the memory back; the object is of no use afterwards."""
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: types.SamplingParams | Sequence[types.SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        speculation: SpeculationParams | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all of them batched together; outputs come in the order of the prompts.

        A prompt is a string or {"prompt_token_ids": [...]}; `sampling_params` one for all, or one per prompt.
        Raises InvalidRequest, naming the prompt, before anything is generated for a later one.
        """
        single = isinstance(prompts, str | Mapping) or (bool(prompts) and isinstance(prompts[0], int))
        many = cast(Sequence[Prompt], [prompts] if single else prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in many]
        token_ids = [self._token_ids(prompt) for prompt in many]
        return self._run(texts, token_ids, self._per_prompt(sampling_params, len(token_ids)), use_tqdm, speculation)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: types.SamplingParams | Sequence[types.SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        speculation: SpeculationParams | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several at once, through the model's chat template."""
        tokenizer = self._need_tokenizer("chat needs one")
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        texts = [
            tokenizer.render_chat(
                conversation,
                chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        token_ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self._run(texts, token_ids, self._per_prompt(sampling_params, len(texts)), use_tqdm, speculation)

    # ---- prompts to requests

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(f"this model has no tokenizer: {what}", "prompt", "no_tokenizer")
        return self.tokenizer

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._need_tokenizer('send {"prompt_token_ids": [...]}').encode(prompt)
        return list(prompt["prompt_token_ids"] if isinstance(prompt, Mapping) else prompt)

    @staticmethod
    def _per_prompt(
        params: types.SamplingParams | Sequence[types.SamplingParams] | None, count: int
    ) -> list[types.SamplingParams]:
        if params is None or isinstance(params, types.SamplingParams):
            return [params or SamplingParams()] * count
        if len(params) != count:
            raise InvalidRequest(f"{len(params)} sampling_params for {count} prompts", "sampling_params")
        return list(params)

    def _choices(
        self, token_ids: Sequence[int], params: types.SamplingParams, speculation: SpeculationParams | None
    ) -> list[Choice]:
        n = params.n if isinstance(params, SamplingParams) else 1
        skip = params.skip_special_tokens if isinstance(params, SamplingParams) else True
        if speculation is None and isinstance(params, SamplingParams):
            speculation = params.speculation
        if params.stop:
            self._need_tokenizer("stop strings cannot be matched")
        base = self._seeds.getrandbits(63) if params.seed is None else params.seed
        return [
            Choice(
                Request(
                    request_id=uuid.uuid4().hex,
                    prompt_token_ids=tuple(token_ids),
                    params=params if n == 1 else replace(params, seed=seed),
                    seed=seed,
                    eos_token_ids=frozenset(self.info.eos_token_ids),
                    speculation=speculation or SpeculationParams(),
                ),
                self.tokenizer,
                skip,
            )
            for seed in choice_seeds(base, n)
        ]

    # ---- requests to outputs

    def _run(
        self,
        texts: Sequence[str | None],
        token_ids: Sequence[Sequence[int]],
        params: Sequence[types.SamplingParams],
        use_tqdm: bool,
        speculation: SpeculationParams | None,
    ) -> list[RequestOutput]:
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        groups = [self._choices(ids, each, speculation) for ids, each in zip(token_ids, params, strict=True)]
        with tqdm(total=len(groups), desc="Processed prompts", disable=not use_tqdm, unit="prompt") as bar:
            self._drive(self._engine, groups, bar)
        level = self.config.speculation.per_request_spec_decode_metrics
        return [_output(text, choices, level) for text, choices in zip(texts, groups, strict=True)]

    def _drive(self, engine: Engine, groups: Sequence[Sequence[Choice]], bar: tqdm[Any]) -> None:
        """Step the engine until every choice has ended; whatever stops us, nothing of ours stays in it."""
        waiting = deque((index, choice) for index, choices in enumerate(groups) for choice in choices)
        running: dict[str, tuple[int, Choice]] = {}
        left = [len(choices) for choices in groups]
        try:
            while waiting or running:
                _fill(engine, waiting, running)
                for delta in engine.step().deltas:
                    index, choice = running[delta.request_id]
                    choice.feed(delta)
                    if choice.finish_reason is None:
                        continue
                    del running[delta.request_id]
                    if delta.finish_reason is None:
                        engine.cancel(delta.request_id)  # a stop string, which the engine cannot see
                    left[index] -= 1
                    if not left[index]:
                        bar.update()
        finally:
            for request_id in running:
                engine.cancel(request_id)


def _fill(engine: Engine, waiting: deque[tuple[int, Choice]], running: dict[str, tuple[int, Choice]]) -> None:
    """Hand over as many requests as the engine's queue takes."""
    while waiting:
        index, choice = waiting[0]
        try:
            engine.add(choice.request)
        except EngineBusy:
            return
        except InvalidRequest as error:
            raise InvalidRequest(f"prompt {index}: {error}", error.param, error.code) from None
        running[choice.request.request_id] = waiting.popleft()


def _metrics(stats: SpeculationStats, level: str) -> RequestMetrics:
    shown = {"none": None, "summary": stats.summary(), "detailed": stats}
    return RequestMetrics(shown[level])


def _output(prompt: str | None, choices: Iterable[Choice], level: str) -> RequestOutput:
    choices = list(choices)
    first = choices[0]
    return RequestOutput(
        request_id=first.request.request_id,
        prompt=prompt,
        prompt_token_ids=list(first.request.prompt_token_ids),
        outputs=[
            CompletionOutput(
                index=index,
                text=choice.text,
                token_ids=choice.token_ids,
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                logprobs=None if choice.request.params.logprobs is None else choice.logprobs,
                metrics=_metrics(choice.request.stats, level),
            )
            for index, choice in enumerate(choices)
        ],
        prompt_logprobs=None if first.request.params.prompt_logprobs is None else first.prompt_logprobs,
        num_cached_tokens=first.num_cached,
    )
