"""The host-side vocabulary: requests, sampling parameters, plans, what a budget says. Plain Python.

Must not know: torch, text, HTTP. Everything here may be created and compared without a tensor in sight.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]
VerifyMode = Literal["coupled", "rejection"]
GREEDY_TEMPERATURE = 1e-5  # at or below this the target distribution is the one-hot of its argmax
TEMPERATURE_RANGES = (GREEDY_TEMPERATURE, 0.6, 0.9, 1.2)  # upper ends: drafts of like temperatures fare alike
LOOKUP = "ngram"  # the drafter that takes no pass of a model, in reports
MAX_LOGPROBS = 20


class InvalidRequest(ValueError):
    """A request that can never be served as asked; `param` names the offending field, `code` is machine-readable."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineBusy(RuntimeError):
    """The queue is full, or the engine is loading or draining; the client should retry later."""


class EngineDead(RuntimeError):
    """The engine thread ended on an error; nothing more will be served."""


def _check(ok: bool, param: str, message: str) -> None:
    if not ok:
        raise InvalidRequest(f"{param} {message}", param=param, code="invalid_value")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are drawn. Names and meanings follow OpenAI and vLLM.

    `top_k` 0 (or -1) means off. `seed` None lets the engine choose one. `logprobs` n returns the n most likely
    alternatives beside each chosen token (0: the chosen one only); `prompt_logprobs` does so for the prompt.
    `stop` strings are matched on text and therefore outside the engine. Raises InvalidRequest naming the field.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int | None = None  # None: up to the model's length
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        def finite(x: float) -> bool:
            return math.isfinite(x)

        _check(finite(self.temperature) and 0.0 <= self.temperature <= 100.0, "temperature", "must be in [0, 100]")
        _check(finite(self.top_p) and 0.0 < self.top_p <= 1.0, "top_p", "must be in (0, 1]")
        _check(self.top_k >= -1, "top_k", "must be -1, 0 (both: off) or positive")
        _check(finite(self.min_p) and 0.0 <= self.min_p <= 1.0, "min_p", "must be in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(finite(value) and -2.0 <= value <= 2.0, name, "must be in [-2, 2]")
        _check(
            finite(self.repetition_penalty) and 0.0 < self.repetition_penalty <= 100.0,
            "repetition_penalty",
            "must be in (0, 100]",
        )
        _check(
            all(finite(b) and -100.0 <= b <= 100.0 for _, b in self.logit_bias), "logit_bias", "must be in [-100, 100]"
        )
        _check(self.seed is None or -(1 << 63) <= self.seed < (1 << 64), "seed", "must fit 64 bits")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "must be at least 1")
        _check(self.min_tokens >= 0, "min_tokens", "must not be negative")
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})",
        )
        _check(all(self.stop), "stop", "must not hold an empty string")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or 0 <= value <= MAX_LOGPROBS, name, f"must be between 0 and {MAX_LOGPROBS}")

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: the token, its logprob and rank (1 = most likely), and the n most likely.

    Natural logarithm of the softmax of the model's raw logits, before temperature, penalties and filters.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first


@dataclass(frozen=True)
class SpeculationParams:
    """Per-request control of speculation: never the text, only how fast it comes."""

    enabled: bool = True
    max_draft_tokens: int | None = None  # None: the server's limit

    def __post_init__(self) -> None:
        _check(
            self.max_draft_tokens is None or self.max_draft_tokens >= 0,
            "speculation.max_draft_tokens",
            "must not be negative",
        )


@dataclass
class DrafterStats:
    """One drafter's share in a request's speculation."""

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass
class SpeculationStats:
    """What speculation did for one request, in the field's words (n_draft >= n_kept >= n_accepted)."""

    num_spec_steps: int = 0  # steps in which at least one draft was verified
    num_draft_tokens: int = 0  # proposed
    num_kept_tokens: int = 0  # sent to verification
    num_accepted_tokens: int = 0
    histogram: list[int] = field(default_factory=list)  # histogram[a]: speculative steps that accepted a drafts
    by_drafter: dict[str, DrafterStats] = field(default_factory=dict)
    per_step_drafted: list[int] = field(default_factory=list)  # per speculative step: drafts sent to verification
    per_step_accepted: list[int] = field(default_factory=list)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per speculative step, the bonus token included; 1 without any."""
        return 1 + self.num_accepted_tokens / self.num_spec_steps if self.num_spec_steps else 1.0

    def summary(self) -> SpeculationStats:
        """The same without the lists that hold an entry per step."""
        return replace(self, per_step_drafted=[], per_step_accepted=[])

    def record(self, n_draft: int, n_kept: int, n_accepted: int, drafter: str = "") -> None:
        self.num_draft_tokens += n_draft
        if drafter and n_draft:
            mine = self.by_drafter.setdefault(drafter, DrafterStats())
            mine.num_spec_steps += n_kept > 0
            mine.num_draft_tokens += n_draft
            mine.num_accepted_tokens += n_accepted
        if not n_kept:
            return
        self.num_spec_steps += 1
        self.num_kept_tokens += n_kept
        self.num_accepted_tokens += n_accepted
        self.per_step_drafted.append(n_kept)
        self.per_step_accepted.append(n_accepted)
        self.histogram.extend([0] * (n_accepted + 1 - len(self.histogram)))
        self.histogram[n_accepted] += 1


RequestStatus = Literal["waiting", "running", "finished"]


@dataclass(eq=False)
class Request:
    """One sequence being generated. The only mutable record of the engine; the scheduler alone changes it. Two of them
    are never equal: a list that holds one is searched without a look at its tokens.

    Invariant: 0 <= num_computed <= len(token_ids). Tokens [0, num_computed) have K/V in `pages`; the last element
    of token_ids is the anchor once the prompt is computed.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams  # never another's: drafters and budgets remember what they made of them
    seed: int  # the resolved seed; equals params.seed when that was given
    eos_token_ids: frozenset[int] = frozenset()
    speculation: SpeculationParams = SpeculationParams()
    priority: int = 0  # lower goes first, as in vLLM
    arrival: int = 0  # set by the scheduler, breaks ties in priority
    arrival_time_s: float = 0.0  # monotonic clock, for the report only
    status: RequestStatus = "waiting"
    token_ids: list[int] = field(default_factory=list)  # prompt + generated; filled by the scheduler on add
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens served from the prefix cache at first admission
    num_scored: int = 0  # prompt tokens whose logprobs have been reported
    max_new_tokens: int = 0  # params.max_tokens, or what the model length allows; set by the scheduler on add
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)  # prefix hash of each full page of token_ids, grown on demand
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)


class Row(NamedTuple):
    """One request's share of a step: tokens [start, start + length) of the request, then up to `max_drafts` drafts.

    `samples` is true when the row reaches the request's last known token (the anchor), so a token comes out of it.
    Only a row of one token that samples may carry drafts. `lookup_only`: drafts that cost a pass of a model would not
    earn it. A tuple: every step makes two or three per request, and a frozen dataclass takes three times as long.
    """

    request: Request
    start: int
    length: int
    samples: bool
    max_drafts: int = 0
    lookup_only: bool = False


@dataclass(frozen=True)
class Plan:
    """The rows of one step, in arrival order; how many requests had to give up their pages for it; who is new in it."""

    rows: tuple[Row, ...]
    num_preempted: int = 0
    admitted: tuple[str, ...] = ()  # ids of the requests that run for the first time
    known_bare: tuple[Row, ...] = ()  # `bare`, of a plan whose maker has them: a row takes longer to make than to weigh
    ahead: tuple[int, ...] | None = None  # rows to draft for when the step is over; None: drafts are made before it

    @cached_property
    def bare(self) -> tuple[Row, ...]:
        """The same rows without drafts."""
        return self.known_bare or tuple([Row(row.request, row.start, row.length, row.samples) for row in self.rows])

    @cached_property
    def drafting(self) -> tuple[Row, ...]:
        """Rows that may carry drafts, in plan order; a Proposal's rows are aligned with these."""
        return tuple([row for row in self.rows if row.max_drafts > 0])


@dataclass(frozen=True)
class RowResult:
    """What verification said of one row, on the host: accepted drafts, then the bonus token; () for a partial prefill.

    `tokens` has n_accepted + 1 entries when the row samples. `logprobs` is aligned with `tokens` when asked for;
    `prompt_logprobs` covers the prompt tokens scored in this step.
    """

    tokens: tuple[int, ...] = ()
    n_draft: int = 0
    n_kept: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    drafter: str = ""  # who drafted, if anyone did


# "cost": no draft of the batch would earn its time; "acceptance": others would, the row's would not.
SKIP_REASONS = ("cost", "acceptance")


@dataclass(frozen=True)
class BudgetReport:
    """What the budget expected of a step, and how many rows it did not let draft, by reason (see SKIP_REASONS)."""

    predicted_step_ms: float  # without drafting
    predicted_draft_ms: float
    plain_step_ms: float  # the step had no draft been verified
    plain_token_ms: float  # a step of its decoding rows alone, likewise, per row: what a token more would have taken
    skipped: dict[str, int] = field(default_factory=dict)
    calibration_error: float = 0.0  # mean distance of stated probability and frequency of acceptance, of late


@dataclass(frozen=True)
class CostCurve:
    """What the cost model says that steps take now: one of as many rows and keys as the last, by its tokens."""

    rows: int
    context: int  # keys visible to all rows together
    tokens: tuple[int, ...]  # ascending, from `rows` on; drafts and prompt chunks included
    step_ms: tuple[float, ...]  # of each of these, drafting not included
    draft_ms: float  # drafts for all rows; 0 where drafting costs nothing
    slowdown: float  # of the machine, over when it was profiled


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading positions at which a and b agree."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def temperature_range(temperature: float) -> int:
    """Index of the range that it falls into; 0 is greedy, the last is above all ends."""
    return bisect_left(TEMPERATURE_RANGES, temperature)


def signed_seed(seed: int) -> int:
    """A 64-bit seed as the int64 with the same bits: what tensors hold."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed
