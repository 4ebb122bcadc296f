"""Plan and proposal to tensors: the one place where requests become a StepBatch.

Built in numpy and moved once. Must not know: models, attention, what the drafter or the verifier do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_serve.tensors import DraftLogits, DraftProbs, Penalties, Proposal, SamplingBatch, StepBatch
from dspark_serve.types import Plan, Row, signed_seed

_NEVER = float("-inf")


class Batcher:
    """Builds StepBatches for a pool of pages of `page_size` tokens, on `device`."""

    def __init__(self, page_size: int, device: torch.device | str = "cpu") -> None:
        self.page_size = page_size
        self.device = torch.device(device)

    def build(self, plan: Plan, proposal: Proposal) -> StepBatch:
        """proposal: the kept drafts of plan.drafting, already trimmed."""
        rows = plan.rows
        kept = _spread(plan, proposal.n_draft)
        lens = np.array([row.length + k for row, k in zip(rows, kept, strict=True)], dtype=np.int64)
        ends = np.cumsum(lens)
        table = _page_table(rows)
        tokens: list[int] = []
        for row, k in zip(rows, kept, strict=True):
            tokens += _row_tokens(row, k)
        starts = np.array([row.start for row in rows], dtype=np.int64)
        owner = np.repeat(np.arange(len(rows)), lens)
        positions = np.arange(len(tokens)) + (starts - ends + lens)[owner]
        slots = table[owner, positions // self.page_size] * self.page_size + positions % self.page_size
        sample_lens = tuple(k + 1 if row.samples else 0 for row, k in zip(rows, kept, strict=True))
        within = _within(sample_lens)
        sample_index = np.repeat(ends - np.array(sample_lens), sample_lens) + within
        token_ids = self._move(np.array(tokens, dtype=np.int64))
        drafts = self._spread_drafts(plan, proposal, token_ids, ends, kept)
        score_lens = tuple(_num_scores(row) for row in rows)
        score_index, score_targets = self._scores(rows, ends - lens, score_lens)
        return StepBatch(
            token_ids=token_ids,
            positions=self._move(positions),
            slots=self._move(slots),
            page_table=self._move(table),
            spans=self._move(np.stack([ends - lens, lens, starts + lens])),
            query_lens=tuple(lens.tolist()),
            context_lens=tuple(row.start + n for row, n in zip(rows, lens.tolist(), strict=True)),
            sample_index=self._move(sample_index),
            sample_lens=sample_lens,
            drafts=drafts,
            draft_probs=self._spread_probs(plan, proposal, drafts),
            sampling=self._sampling(rows, sample_lens, within, drafts),
            logprobs=tuple(row.request.params.logprobs for row in rows),
            score_index=score_index,
            score_targets=score_targets,
            score_lens=score_lens,
            score_top=tuple(row.request.params.prompt_logprobs or 0 for row in rows),
        )

    def _move(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _spread_drafts(
        self, plan: Plan, proposal: Proposal, token_ids: Tensor, ends: npt.NDArray[np.int64], kept: Sequence[int]
    ) -> Tensor:
        """Drafts of all rows [rows, max_kept], -1 where there is none; also puts them behind their anchors."""
        width = max(kept, default=0)
        drafts = torch.full((len(plan.rows), width), -1, dtype=torch.int64, device=self.device)
        if not width:
            return drafts
        carrying = [index for index, row in enumerate(plan.rows) if row.max_drafts > 0]
        tokens = proposal.tokens.to(self.device)  # a lookup's are on the host
        drafts[torch.tensor(carrying, device=self.device), : tokens.shape[1]] = tokens
        places = self._move(_last_of_each(ends, kept))
        token_ids[places] = drafts[drafts >= 0]  # both in row order, then slot order
        return drafts

    def _spread_probs(self, plan: Plan, proposal: Proposal, drafts: Tensor) -> DraftProbs | None:
        given = proposal.draft_probs
        if given is None or not drafts.shape[1]:
            return None
        carrying = [index for index, row in enumerate(plan.rows) if row.max_drafts > 0]
        if len(carrying) == len(plan.rows):
            return given
        index = torch.tensor(carrying, device=self.device)
        if isinstance(given, DraftLogits):
            return given.placed(index, len(plan.rows))
        return given.new_zeros((*drafts.shape, given.shape[-1])).index_copy_(0, index, given)

    def _scores(
        self, rows: Sequence[Row], starts: npt.NDArray[np.int64], score_lens: tuple[int, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Indices of the prompt positions to score and the prompt tokens that follow them."""
        if not any(score_lens):
            return None, None
        index: list[int] = []
        targets: list[int] = []
        for row, start, count in zip(rows, starts.tolist(), score_lens, strict=True):
            first = row.request.num_scored - row.start
            index.extend(range(start + first, start + first + count))
            targets.extend(row.request.prompt_token_ids[row.request.num_scored + 1 :][:count])
        return self._move(np.array(index, dtype=np.int64)), self._move(np.array(targets, dtype=np.int64))

    def _sampling(
        self, rows: Sequence[Row], sample_lens: tuple[int, ...], within: npt.NDArray[np.int64], drafts: Tensor
    ) -> SamplingBatch:
        params = [row.request.params for row in rows]
        repeat = np.array(sample_lens)
        # One matrix per type: building and moving arrays is what a step's host time goes into.
        numbers = np.array([(p.temperature, p.top_p, p.min_p) for p in params], dtype=np.float32).repeat(repeat, axis=0)
        whole = np.array(
            [(max(row.request.params.top_k, 0), signed_seed(row.request.seed), row.start + row.length) for row in rows],
            dtype=np.int64,
        ).repeat(repeat, axis=0)
        whole[:, 2] += within
        temperature, top_p, min_p = self._move(numbers.T)
        top_k, seed, position = self._move(whole.T)
        sampling = [p for p, n in zip(params, sample_lens, strict=True) if n]
        bias = self._bias(rows, sample_lens)
        return SamplingBatch(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            position=position,
            all_greedy=all(p.greedy for p in sampling),
            any_filter=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in sampling),
            penalties=self._penalties(rows, sample_lens, drafts),
            bias_sample=None if bias is None else bias[0],
            bias_token=None if bias is None else bias[1],
            bias_value=None if bias is None else bias[2],
        )

    def _penalties(self, rows: Sequence[Row], sample_lens: tuple[int, ...], drafts: Tensor) -> Penalties | None:
        """Counts at every sample of the rows that have penalties, the drafts before the sample counted as generated."""
        if not any(n and row.request.params.has_penalties for row, n in zip(rows, sample_lens, strict=True)):
            return None
        drafted = drafts.tolist()
        columns: list[list[npt.NDArray[np.generic]]] = []
        sample = 0
        for index, (row, count) in enumerate(zip(rows, sample_lens, strict=True)):
            params = row.request.params
            for slot in range(count if params.has_penalties else 0):
                seen = np.array([*row.request.token_ids, *drafted[index][:slot]])
                unique, inverse = np.unique(seen, return_inverse=True)
                generated = np.bincount(inverse[row.request.num_prompt :], minlength=len(unique))
                constants = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
                columns.append(
                    [np.full(len(unique), sample + slot), unique, generated.astype(np.float32)]
                    + [np.full(len(unique), value, dtype=np.float32) for value in constants]
                )
            sample += count
        return Penalties(*(self._move(np.concatenate(parts)) for parts in zip(*columns, strict=True)))

    def _bias(self, rows: Sequence[Row], sample_lens: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor] | None:
        """logit_bias, and -inf on everything that would stop a request before its min_tokens."""
        samples: list[int] = []
        tokens: list[int] = []
        values: list[float] = []
        sample = 0
        for row, count in zip(rows, sample_lens, strict=True):
            request, params = row.request, row.request.params
            if not params.logit_bias and request.num_generated >= params.min_tokens:
                sample += count
                continue
            stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(request.eos_token_ids))
            for slot in range(count):
                entries = list(params.logit_bias)
                if request.num_generated + slot < params.min_tokens:
                    entries += [(token, _NEVER) for token in sorted(stops)]
                samples += [sample + slot] * len(entries)
                tokens += [token for token, _ in entries]
                values += [value for _, value in entries]
            sample += count
        if not samples:
            return None
        ids = np.array(samples, dtype=np.int64), np.array(tokens, dtype=np.int64)
        return self._move(ids[0]), self._move(ids[1]), self._move(np.array(values, dtype=np.float32))


def _spread(plan: Plan, kept: Sequence[int]) -> list[int]:
    """Kept drafts of every row of the plan; rows that do not draft keep none."""
    counts = iter(kept)
    return [next(counts) if row.max_drafts > 0 else 0 for row in plan.rows]


def _row_tokens(row: Row, kept: int) -> list[int]:
    """The row's known tokens, then room for its drafts."""
    return row.request.token_ids[row.start : row.start + row.length] + [0] * kept


def _page_table(rows: Sequence[Row]) -> npt.NDArray[np.int64]:
    table = np.zeros((len(rows), max(len(row.request.pages) for row in rows)), dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row.request.pages)] = row.request.pages
    return table


def _within(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """0..counts[0]-1, 0..counts[1]-1, ... in one array."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) - np.repeat(ends - counts, counts)


def _last_of_each(ends: npt.NDArray[np.int64], counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Indices of the last counts[r] tokens of each row r, rows in order."""
    return np.repeat(ends - np.array(counts), counts) + _within(counts)


def _num_scores(row: Row) -> int:
    """Prompt positions of this row whose next prompt token is still to be scored."""
    request = row.request
    if request.params.prompt_logprobs is None:
        return 0
    return max(0, min(row.start + row.length, request.num_prompt - 1) - request.num_scored)
