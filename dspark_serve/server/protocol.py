"""The request and response bodies of the HTTP API: OpenAI's fields, vLLM's additions, ours.

Turns a request body into SamplingParams; names what is not supported. Must not know: the engine, tokens' texts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import structlog
from openai.types import Completion, CompletionChoice, CompletionUsage, Model
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice as OpenAIChatChoice
from pydantic import BaseModel, ConfigDict, Field

from dspark_serve.choice import Source
from dspark_serve.types import FinishReason, InvalidRequest, SamplingParams, SpeculationParams, SpeculationStats

log = structlog.get_logger(__name__)
MAX_CHOICES = 128
MAX_STOP_STRINGS = 64
MAX_STOP_TOKENS = 1024
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chat goes up to the model's length

# Fields whose meaning we do not implement, and the values that ask for nothing. Anything else is refused by name.
_NOTHING: tuple[object, ...] = (None, False, [], {})
# fmt: off
_UNSUPPORTED_PLAIN = (
    "audio", "prediction", "web_search_options", "reasoning_effort", "verbosity", "moderation", "documents",
    "use_beam_search", "prompt_logprobs", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar", "allowed_token_ids", "bad_words", "truncate_prompt_tokens", "logits_processors", "echo",
    "include_stop_str_in_output", "chat_template", "mm_processor_kwargs", "kv_transfer_params", "cache_salt",
    "thinking_token_budget", "typical_p",
)
# fmt: on
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "tools": _NOTHING,
    "tool_choice": (None, "none", "auto"),
    "functions": _NOTHING,
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
    "length_penalty": (None, 1, 1.0),
    "spaces_between_special_tokens": (None, True),
    **dict.fromkeys(_UNSUPPORTED_PLAIN, _NOTHING),
}
# fmt: off
# Fields that change nothing about the answer; accepted without a word.
HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "parallel_tool_calls", "request_id",
})
# fmt: on
_warned: set[str] = set()


class Body(BaseModel):
    """Strict: "5" is no number and 1 no boolean. Fields we do not know are kept, for `check_extra` to judge."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    def check_extra(self) -> None:
        """Refuse what we know but do not support; warn, once per field, of what we do not know."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED:
                if not any(value == nothing and type(value) is type(nothing) for nothing in UNSUPPORTED[name]):
                    raise InvalidRequest(f"{name} is not supported", param=name, code="unsupported_parameter")
            elif name not in HARMLESS and name not in _warned and len(_warned) < 100:
                _warned.add(name)
                log.warning("unknown request field ignored", field=ascii(name[:100]))


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage so far on every chunk


class SpeculationControl(Body):
    enabled: bool = True
    max_draft_tokens: int | None = None
    mark_tokens: bool = False  # tell of every token how it came to be

    model_config = ConfigDict(strict=True, extra="forbid")


class GenerationBody(Body):
    """What chat and plain completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    return_token_ids: bool | None = None
    speculation: SpeculationControl | None = None

    def limit(self) -> int | None:
        """Most tokens to generate; None: up to the model's length."""
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        """Alternatives per token; None: no logprobs at all."""
        return None

    def wants_prompt_logprobs(self) -> bool:
        return False

    def stops(self) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings", "stop", "invalid_value")
        return stop

    def sampling(self) -> SamplingParams:
        """The sampling parameters, fields left out or null at their defaults. InvalidRequest names what is wrong."""
        self.check_extra()
        if self.stream_options is not None:
            self.stream_options.check_extra()
            if not self.stream:
                raise InvalidRequest("stream_options needs stream: true", "stream_options", "invalid_value")
        if len(self.stop_token_ids or ()) > MAX_STOP_TOKENS:
            raise InvalidRequest(f"stop_token_ids takes at most {MAX_STOP_TOKENS}", "stop_token_ids", "invalid_value")
        logprobs = self.num_logprobs()
        given = {
            name: getattr(self, name)
            for name in _PLAIN_SAMPLING
            if getattr(self, name) is not None  # null means the default, as in OpenAI's clients
        }
        return SamplingParams(
            **given,
            max_tokens=self.limit(),
            stop=self.stops(),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_logit_bias(self.logit_bias),
            logprobs=logprobs,
            prompt_logprobs=logprobs if self.wants_prompt_logprobs() else None,
        )

    def speculation_params(self) -> SpeculationParams:
        if self.speculation is None:
            return SpeculationParams()
        return SpeculationParams(self.speculation.enabled, self.speculation.max_draft_tokens)

    def marks_tokens(self) -> bool:
        return self.speculation is not None and self.speculation.mark_tokens


# fmt: off
_PLAIN_SAMPLING = (  # fields that SamplingParams has under the same name
    "seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "min_tokens", "ignore_eos",
)
# fmt: on


def _logit_bias(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), value) for token, value in (bias or {}).items())
    except ValueError:
        raise InvalidRequest("logit_bias maps token ids to numbers", "logit_bias", "invalid_value") from None


class ContentPart(Body):
    type: str
    text: str | None = None


class Message(Body):
    """One chat message; names, tool calls and the like are passed to the chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None


class ChatBody(GenerationBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")
            return None
        return self.top_logprobs or 0


TokenIds = Annotated[list[int], Field(fail_fast=True)]


class CompletionBody(GenerationBody):
    prompt: (
        str | Annotated[list[str], Field(fail_fast=True)] | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    def limit(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def wants_prompt_logprobs(self) -> bool:
        return bool(self.echo)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or many; at least one, none of them empty."""
        prompt = self.prompt
        single = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        prompts: list[Any] = [prompt] if single else list(prompt)
        if not prompts or any(not each for each in prompts):
            raise InvalidRequest("the prompt is empty: send at least one token", "prompt", "invalid_value")
        return prompts


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: TokenIds


class DetokenizeResponse(BaseModel):
    prompt: str


class DrafterShare(BaseModel):
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0


class SpeculativeDecoding(BaseModel):
    """vLLM's report of what speculation did, plus ours: how many drafts the budget sent to verification."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: dict[str, int]  # accepted drafts -> speculative steps; zero counts left out
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_kept_draft_tokens: int
    by_drafter: dict[str, DrafterShare] | None = None
    per_step_drafted: list[int] | None = None  # per speculative step: drafts verified; the choices one after the other
    per_step_accepted: list[int] | None = None

    @staticmethod
    def of(all_stats: list[SpeculationStats], detailed: bool = False) -> SpeculativeDecoding:
        """One report over all choices of an answer; what is not reported stays unset."""
        steps = sum(s.num_spec_steps for s in all_stats)
        accepted = sum(s.num_accepted_tokens for s in all_stats)
        drafted = sum(s.num_draft_tokens for s in all_stats)
        histogram: dict[str, int] = {}
        for stats in all_stats:
            for number, count in enumerate(stats.histogram):
                if count:
                    histogram[str(number)] = histogram.get(str(number), 0) + count
        shares: dict[str, DrafterShare] = {}
        for stats in all_stats:
            for name, share in stats.by_drafter.items():
                before = shares.get(name, DrafterShare())
                shares[name] = DrafterShare(
                    num_spec_steps=before.num_spec_steps + share.num_spec_steps,
                    num_draft_tokens=before.num_draft_tokens + share.num_draft_tokens,
                    num_accepted_draft_tokens=before.num_accepted_draft_tokens + share.num_accepted_tokens,
                )
        extra: dict[str, Any] = {"by_drafter": shares} if shares else {}
        if detailed:
            extra["per_step_drafted"] = [n for s in all_stats for n in s.per_step_drafted]
            extra["per_step_accepted"] = [n for s in all_stats for n in s.per_step_accepted]
        return SpeculativeDecoding(
            **extra,
            mean_acceptance_length=1 + accepted / steps if steps else 1.0,
            draft_acceptance_rate=accepted / drafted if drafted else 0.0,
            acceptance_histogram=dict(sorted(histogram.items(), key=lambda item: int(item[0]))),
            num_spec_steps=steps,
            num_accepted_draft_tokens=accepted,
            num_draft_tokens=drafted,
            num_kept_draft_tokens=sum(s.num_kept_tokens for s in all_stats),
        )


class RequestMetrics(BaseModel):
    speculative_decoding: SpeculativeDecoding


class TokenMark(BaseModel):
    """How one token came to be; the texts of an answer's marks, joined, are its text.

    In a stream, text of a token that had to be held back follows in a mark of the same index that has no source.
    """

    index: int
    text: str
    source: Source | None = None
    position: int | None = None
    drafter: str | None = None


class ChatChoice(OpenAIChatChoice):
    """OpenAI's, vLLM's `stop_reason` (what stopped it) and `token_ids`, and our marks of the tokens."""

    finish_reason: FinishReason | None  # type: ignore[assignment]
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    tokens: list[TokenMark] | None = None


class ChatResponse(ChatCompletion):
    choices: list[ChatChoice]  # type: ignore[assignment]
    usage: CompletionUsage
    prompt_token_ids: list[int] | None = None
    metrics: RequestMetrics | None = None


class TextChoice(CompletionChoice):
    finish_reason: FinishReason | None  # type: ignore[assignment]
    logprobs: dict[str, list[Any]] | None = None  # type: ignore[assignment]  # echo's first token has no logprob: null
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    tokens: list[TokenMark] | None = None


class CompletionResponse(Completion):
    choices: list[TextChoice]  # type: ignore[assignment]
    usage: CompletionUsage
    metrics: RequestMetrics | None = None


class ModelCard(Model):
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
