"""What crosses between scheduler, drafter, target and verifier as tensors: StepBatch, Proposal, Verdict.

Frozen, complete at construction, shapes in the comments. Must not know: requests, pages' owners, models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_serve.transfers import to_device, to_host
from dspark_serve.types import GREEDY_TEMPERATURE, RowResult, TokenLogprobs

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DraftLogits:
    """Draft distributions that nobody has written out: softmax(logits / temperature), one-hot for greedy rows."""

    logits: Tensor  # [rows, width, vocab] float32
    log_mass: Tensor  # [rows, width] float32: logsumexp of logits / temperature
    temperature: Tensor  # [rows] float32

    def probs(self) -> Tensor:
        """[rows, width, vocab] float32."""
        greedy = self.temperature <= GREEDY_TEMPERATURE
        divisor = self.temperature.masked_fill(greedy, 1.0)[:, None, None]
        probs = (self.logits / divisor).sub_(self.log_mass.unsqueeze(-1)).exp_()
        best = torch.zeros_like(probs).scatter_(-1, self.logits.argmax(-1, keepdim=True), 1.0)
        return torch.where(greedy[:, None, None], best, probs)

    def first(self, width: int) -> DraftLogits:
        """Those of the first `width` slots."""
        return DraftLogits(self.logits[:, :width], self.log_mass[:, :width], self.temperature)

    def placed(self, index: Tensor, rows: int) -> DraftLogits:
        """As rows `index` [n] int64 of more; the others are of no use."""
        parts = self.logits, self.log_mass, self.temperature
        return DraftLogits(*(x.new_zeros((rows, *x.shape[1:])).index_copy_(0, index, x) for x in parts))

    def pick(self, index: Tensor) -> DraftLogits:
        """Those of rows `index` [n] int64, in that order."""
        return DraftLogits(*(x.index_select(0, index) for x in (self.logits, self.log_mass, self.temperature)))


DraftProbs = Tensor | DraftLogits  # [rows, width, vocab] float32, written out or not


@dataclass(frozen=True)
class Penalties:
    """Token counts for the samples that have penalties, as coordinate lists (drafts before the position included)."""

    sample: Tensor  # [entries] int64, index into the samples
    token: Tensor  # [entries] int64; of a sample's entries of one token, all say the same
    generated: Tensor  # [entries] float32, times the token was generated (0: it is in the prompt only)
    presence: Tensor  # [entries] float32, the sample's presence penalty; likewise the next two
    frequency: Tensor  # [entries] float32
    repetition: Tensor  # [entries] float32


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of every sample of a step: one sample per position whose next token is wanted."""

    temperature: Tensor  # [samples] float32; <= GREEDY_TEMPERATURE means greedy
    top_k: Tensor  # [samples] int64; 0 is off
    top_p: Tensor  # [samples] float32; 1 is off
    min_p: Tensor  # [samples] float32; 0 is off
    seed: Tensor  # [samples] int64, two's complement of the 64-bit seed
    position: Tensor  # [samples] int64, absolute position of the token to be drawn
    all_greedy: bool
    any_filter: bool  # some sample has top-k, top-p or min-p
    penalties: Penalties | None = None
    bias_sample: Tensor | None = None  # [entries] int64: logit_bias and min_tokens masks, as coordinates
    bias_token: Tensor | None = None  # [entries] int64
    bias_value: Tensor | None = None  # [entries] float32, added to the logits; -inf forbids the token

    @staticmethod
    def none(device: torch.device) -> SamplingBatch:
        """Of no samples."""
        numbers, whole = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        return SamplingBatch(numbers, whole, numbers, numbers, whole, whole, all_greedy=True, any_filter=False)


@dataclass(frozen=True)
class StepBatch:
    """One ragged target forward. Tokens of all rows are concatenated in row order; row r holds query_lens[r] tokens.

    The samples are the positions whose logits decide a token: for a row that samples, its anchor and each kept draft.
    """

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    slots: Tensor  # [tokens] int64, page * page_size + offset: where the token's K/V goes
    page_table: Tensor  # [rows, max_pages] int64, padded with page 0
    spans: Tensor  # [3, rows] int64 contiguous: each row's first token, and the next two for the device
    query_lens: tuple[int, ...]  # [rows]
    context_lens: tuple[int, ...]  # [rows] keys visible to the row's last token (its own included)
    sample_index: Tensor  # [samples] int64, index into tokens
    sample_lens: tuple[int, ...]  # [rows] 0, or 1 + kept drafts
    sample_spans: Tensor  # [2, rows] int64 contiguous: each row's first sample, and sample_lens for the device
    drafts: Tensor  # [rows, max_kept] int64, padded with -1
    draft_probs: DraftProbs | None  # [rows, max_kept, vocab]; None: every draft was certain (one-hot)
    sampling: SamplingBatch
    logprobs: tuple[int | None, ...]  # [rows] alternatives asked for per row
    drafting: tuple[int, ...] = ()  # the rows that were to draft, in the proposal's order
    score_index: Tensor | None = None  # [scores] int64, index into tokens: prompt positions to score
    score_targets: Tensor | None = None  # [scores] int64, the prompt token that follows each
    score_lens: tuple[int, ...] = ()  # [rows] scores per row
    score_top: tuple[int, ...] = ()  # [rows] alternatives per score

    @property
    def num_samples(self) -> int:
        return sum(self.sample_lens)


@dataclass(frozen=True)
class TargetOutput:
    """What the target's forward returns for a StepBatch: logits of the samples, then of the scores, and the taps."""

    logits: Tensor  # [samples + scores, vocab] float32
    taps: Tensor | None  # [tokens, len(taps) * hidden], layers concatenated in the order asked for; None: in the store


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens for the plan's drafting rows, in their order. Row r holds n_draft[r] tokens from slot 0 on."""

    tokens: Tensor  # [rows, width] int64, padded with -1
    n_draft: tuple[int, ...]  # [rows]
    draft_probs: DraftProbs | None = None  # [rows, width, vocab]; None: every draft is certain (one-hot)
    confidence: Tensor | None = None  # [rows, width] float32, probability of acceptance given the drafts before
    drafters: tuple[str, ...] | None = None  # [rows] who drafted a row; None: the engine's one drafter did
    largest: Tensor | None = None  # [rows, width] float32, largest draft probability, of the logits as they are

    @staticmethod
    def empty(rows: int, device: torch.device | str = "cpu") -> Proposal:
        return Proposal(torch.empty((rows, 0), dtype=torch.int64, device=device), (0,) * rows)

    @staticmethod
    def from_lists(
        drafts: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        confidence: Sequence[Sequence[float]] | None = None,
    ) -> Proposal:
        """Certain drafts from host lists; rows may differ in length and may be empty. confidence: of each draft."""
        width = max((len(d) for d in drafts), default=0)
        padded = [[*d, *([-1] * (width - len(d)))] for d in drafts]
        tables: list[npt.NDArray[Any]] = [np.array(padded, dtype=np.int64).reshape(len(drafts), width)]
        if confidence is not None:
            stated = [[*c, *([0.0] * (width - len(c)))] for c in confidence]
            tables.append(np.array(stated, dtype=np.float32).reshape(len(drafts), width))
        tokens, *said = to_device(torch.device(device), *tables)
        return Proposal(tokens, tuple(len(d) for d in drafts), confidence=said[0] if said else None)

    def spread(self, index: Sequence[int], rows: int) -> Proposal:
        """This proposal's rows as rows `index` of a larger one, whose other rows draft nothing."""
        (where,) = to_device(self.tokens.device, np.array(index))
        n_draft = [0] * rows
        for row, count in zip(index, self.n_draft, strict=True):
            n_draft[row] = count

        def place(part: Tensor | None, fill: float) -> Tensor | None:
            return None if part is None else part.new_full((rows, *part.shape[1:]), fill).index_copy_(0, where, part)

        tokens = place(self.tokens, -1)
        assert tokens is not None
        confidence, drawn = place(self.confidence, 0.0), self.draft_probs
        probs = drawn.placed(where, rows) if isinstance(drawn, DraftLogits) else place(drawn, 0.0)
        return Proposal(tokens, tuple(n_draft), probs, confidence, largest=place(self.largest, 0.0))

    def signals_to_host(self) -> tuple[Floats | None, Floats | None]:
        """`confidence` and `largest`, each [rows, width], slot by slot: in one copy from the device."""
        given = to_host(*[signal for signal in (self.confidence, self.largest) if signal is not None])
        values = iter([signal.astype(np.float64, order="F") for signal in given])
        return None if self.confidence is None else next(values), None if self.largest is None else next(values)

    def fetched_with(self, verdict: Verdict) -> Proposal:
        """The same with `confidence` and `largest` on the host, where one copy brings them and the verdict's tokens."""
        told = {"confidence": self.confidence, "largest": self.largest}
        given = {name: signal for name, signal in told.items() if signal is not None}
        here = dict(zip(given, map(torch.from_numpy, verdict.fetch(*given.values())), strict=True))
        return replace(self, confidence=here.get("confidence"), largest=here.get("largest"))

    def pick(self, index: Sequence[int]) -> Proposal:
        """Rows `index` of this proposal, in that order, as wide as the longest of them. Signals may be on the host
        while all else is on a device."""
        here, n_draft = np.array(index, dtype=np.int64), tuple([self.n_draft[row] for row in index])
        (there,) = to_device(self.tokens.device, here)
        width = max(n_draft, default=0)

        def chosen(part: Tensor) -> Tensor:
            where = there if part.device == there.device else torch.from_numpy(here)
            return part[:, :width].index_select(0, where)

        probs = self.draft_probs
        if probs is not None:
            probs = probs.first(width).pick(there) if isinstance(probs, DraftLogits) else chosen(probs)
        return Proposal(
            chosen(self.tokens),
            n_draft,
            probs,
            None if self.confidence is None else chosen(self.confidence),
            None if self.drafters is None else tuple([self.drafters[row] for row in index]),
            None if self.largest is None else chosen(self.largest),
        )

    def trim(self, kept: Sequence[int]) -> Proposal:
        """The first kept[r] drafts of each row; kept[r] <= n_draft[r]."""
        if len(kept) != len(self.n_draft) or any(not 0 <= k <= n for k, n in zip(kept, self.n_draft, strict=True)):
            raise ValueError(f"kept {list(kept)} must lie within the drafted {list(self.n_draft)}")
        if tuple(kept) == self.n_draft:
            return self
        width = max(kept, default=0)
        tokens = self.tokens[:, :width]
        if min(kept) < width:
            (cut,) = to_device(tokens.device, np.arange(width) >= np.array(kept)[:, None])  # [rows, width]
            tokens = tokens.masked_fill(cut, -1)
        probs = self.draft_probs
        if probs is not None:
            probs = probs.first(width) if isinstance(probs, DraftLogits) else probs[:, :width]
        return Proposal(
            tokens,
            tuple(kept),
            probs,
            None if self.confidence is None else self.confidence[:, :width],
            self.drafters,
            None if self.largest is None else self.largest[:, :width],
        )


@dataclass(frozen=True)
class LogprobTable:
    """Log-softmax of raw logits at some positions: the given token's entry and the most likely ones."""

    token: Tensor  # [positions] int64, the given ones
    chosen: Tensor  # [positions] float32
    rank: Tensor  # [positions] int64, 1 is the most likely
    top_ids: Tensor  # [positions, n] int64
    top_values: Tensor  # [positions, n] float32

    def packed(self) -> Tensor:
        """All of it side by side [positions, 3 + 2 * n] float64, which holds every entry exactly."""
        columns = [self.token.unsqueeze(1), self.chosen.unsqueeze(1), self.rank.unsqueeze(1), self.top_values]
        return torch.cat([column.double() for column in (*columns, self.top_ids)], dim=1)


def unpacked(lines: Floats, count: int) -> tuple[TokenLogprobs, ...]:
    """One per line of what `LogprobTable.packed` gave, with the first `count` alternatives."""
    found, width = [], (lines.shape[1] - 3) // 2
    for token, chosen, rank, *rest in lines.tolist():
        top = zip(map(int, rest[width:]), rest[:width], strict=True)
        found.append(TokenLogprobs(int(token), chosen, int(rank), tuple(top)[:count]))
    return tuple(found)


@dataclass(frozen=True)
class Newest:
    """How texts go on that were just verified, before the host knows: their new anchors."""

    anchors: Tensor  # [rows] int64
    start: Tensor  # [rows] int64, absolute positions of these


@dataclass(frozen=True)
class Verdict:
    """Outcome of verification: per row the number of accepted drafts and the tokens that follow the anchor."""

    n_accepted: Tensor  # [rows] int64; 0 for rows that do not sample
    tokens: Tensor  # [rows, max_kept + 1] int64: accepted drafts, then the bonus token, then -1; all -1 if no sample
    also: tuple[Tensor, ...] = ()  # whatever else of the step the host is to know

    def to_host(self) -> list[RowResult]:
        """Draft counts and logprobs are the engine's to add."""
        return [RowResult(tokens=tokens) for tokens in self.host_tokens]

    @property
    def host_tokens(self) -> list[tuple[int, ...]]:
        """Per row the tokens that came out, all but the last of them accepted drafts."""
        return self._there[0]

    @property
    def host_also(self) -> list[npt.NDArray[Any]]:
        return self._there[1]

    @cached_property
    def _there(self) -> tuple[list[tuple[int, ...]], list[npt.NDArray[Any]]]:
        return self._fetched()[0]

    def fetch(self, *others: Tensor) -> list[npt.NDArray[Any]]:
        """`others`, on the host: the one copy that brings them brings all that the verdict has."""
        self.__dict__["_there"], rest = self._fetched(*others)  # where cached_property looks
        return rest

    def _fetched(
        self, *others: Tensor
    ) -> tuple[tuple[list[tuple[int, ...]], list[npt.NDArray[Any]]], list[npt.NDArray[Any]]]:
        """In one copy from the device."""
        tokens, *rest = to_host(self.tokens, *self.also, *others)
        count = len(self.also)
        return (_without_padding(tokens.tolist()), rest[:count]), rest[count:]

    def newest(self, rows: Sequence[int], known: Sequence[int]) -> Newest:
        """The anchors of `rows`, which all sample; known: how many of each row's tokens were known before the step."""
        index, ends = to_device(self.tokens.device, np.array(rows), np.array(known))
        accepted = self.n_accepted[index]
        return Newest(self.tokens[index, accepted], ends + accepted)


def _without_padding(rows: list[list[int]]) -> list[tuple[int, ...]]:
    return [tuple([token for token in row if token >= 0]) for row in rows]
