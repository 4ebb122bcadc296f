"""What the engine tells of itself: news of requests, of each step, totals, and what never changes. Plain Python.

Must not know: torch, text, HTTP, how anything said here came about.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark_serve.types import BudgetReport, FinishReason, SpeculationStats, TokenLogprobs, VerifyMode

PHASES = ("plan", "propose", "build", "forward", "verify", "commit", "learn")  # of a step, in order


@dataclass(frozen=True)
class RowReport:
    n_draft: int
    n_kept: int
    n_accepted: int
    drafter: str = ""


@dataclass(frozen=True)
class TokenDelta:
    """News of one request after a step. `finish_reason` is set on the last delta, which may carry no token.

    `row` says how the tokens came to be: the first `row.n_accepted` of them were drafted. A token that ends the
    request may leave fewer of them than were accepted.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop token id that ended it, when that is why it ended
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    num_cached: int = 0
    stats: SpeculationStats | None = None  # on the last delta
    error: str | None = None
    row: RowReport | None = None  # of a step that sampled


@dataclass(frozen=True)
class StepReport:
    """What one step did. Durations are milliseconds of wall clock per phase; deltas are in row order."""

    deltas: tuple[TokenDelta, ...] = ()
    rows: tuple[RowReport, ...] = ()  # rows that sampled
    num_tokens: int = 0  # tokens through the target, drafts included
    num_prefill_tokens: int = 0
    num_preempted: int = 0
    admitted: tuple[str, ...] = ()  # ids of the requests that ran for the first time
    phase_ms: dict[str, float] = field(default_factory=dict)  # by PHASES
    budget: BudgetReport | None = None  # of a budget that predicts

    @property
    def num_generated(self) -> int:
        """Tokens that came out, what follows a stop token left out."""
        return sum([len(delta.token_ids) for delta in self.deltas])

    @property
    def target_ms(self) -> float:
        """The step without what there is for speculation alone: what the budget predicts with `predicted_step_ms`."""
        return sum([ms for phase, ms in self.phase_ms.items() if phase not in ("propose", "learn")])

    @property
    def plain_ms(self) -> float | None:
        """Estimated time without speculation for the tokens that came out; None of a budget that does not predict.

        The step would have brought a token per row, in the time it took but for drafting and for what verifying was
        predicted to add; the other tokens would have taken decode steps at the same load. So what is predicted are
        differences: a slow moment or a long prompt counts alike on both sides.
        """
        if self.budget is None:
            return None
        added_ms = self.budget.predicted_step_ms - self.budget.plain_step_ms
        return max(0.0, self.target_ms - added_ms) + (self.num_generated - len(self.rows)) * self.budget.plain_token_ms


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics and the stats line; totals count since start."""

    num_running: int
    num_waiting: int
    pages_total: int
    pages_used: int
    prefix_queries: int  # prompt tokens looked up
    prefix_hits: int  # prompt tokens found
    num_preemptions: int


@dataclass(frozen=True)
class EngineInfo:
    """Facts about a built engine that never change while it runs; what /server_info and the start-up lines show."""

    model: str  # as the user named it
    model_dir: str  # local directory that holds config and tokenizer
    architecture: str
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str
    backend: str  # how the linears run
    page_size: int
    pool_tokens: int  # K/V slots that requests can use
    kv_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    drafter: str  # "ngram", "none", ...
    num_speculative_tokens: int
    verify_mode: VerifyMode
    row_invariant: bool  # the start-up check found the arithmetic bitwise row-invariant
    eos_token_ids: tuple[int, ...]
    budget: str = "full"  # how many drafts are verified: "auto", "full", "fixed:K", "off"
    objective: str = "throughput"  # what "auto" is after: "throughput", "per-user:X"
    head: str | None = None  # the draft head as the user named it
    head_bytes: int = 0  # its own weights; embedding and LM head are the target's
    separate_draft_bytes: int = 0  # weights of a separate draft model with as many layers, for comparison
    draft_kv_bytes: int = 0  # the drafter's share of kv_bytes
    graph_tokens: int = 0  # the most tokens of a step that is played from CUDA graphs; 0: none is
    warnings: tuple[str, ...] = ()  # what the operator should know, one sentence each
