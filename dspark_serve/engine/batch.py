"""Plan and proposal to tensors: the one place where requests become a StepBatch.

Built in numpy and moved at once. Must not know: models, attention, what the drafter or the verifier do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_serve.engine import penalties
from dspark_serve.tensors import DraftLogits, DraftProbs, Proposal, SamplingBatch, StepBatch
from dspark_serve.transfers import to_device
from dspark_serve.types import Plan, Row, signed_seed

Ints = npt.NDArray[np.int64]
Moved = dict[str, Tensor]

_NEVER = float("-inf")


class Batcher:
    """Builds StepBatches for a pool of pages of `page_size` tokens, on `device`."""

    def __init__(self, page_size: int, device: torch.device | str = "cpu") -> None:
        self.page_size = page_size
        self.device = torch.device(device)

    def build(self, plan: Plan, proposal: Proposal) -> StepBatch:
        """proposal: the kept drafts of plan.drafting, already trimmed."""
        rows = plan.rows
        drafting = tuple(index for index, row in enumerate(rows) if row.max_drafts > 0)
        kept = [0] * len(rows)
        for index, count in zip(drafting, proposal.n_draft, strict=True):
            kept[index] = count
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
        samples, within = np.array(sample_lens), _within(sample_lens)
        moved = self._move(
            token_ids=np.array(tokens, dtype=np.int64),
            positions=positions,
            slots=slots,
            page_table=table,
            spans=np.stack([ends - lens, lens, starts + lens]),
            sample_index=np.repeat(ends - samples, samples) + within,
            sample_spans=np.stack([samples.cumsum() - samples, samples]),
            **_parameters(rows, samples, within),
            **(_draft_places(drafting, ends, kept) if any(kept) else {}),
        )
        drafts = self._spread_drafts(proposal, moved, (len(rows), max(kept)))
        score_lens = tuple(_num_scores(row) for row in rows)
        scores = self._scores(rows, ends - lens, score_lens)
        return StepBatch(
            token_ids=moved["token_ids"],
            positions=moved["positions"],
            slots=moved["slots"],
            page_table=moved["page_table"],
            spans=moved["spans"],
            query_lens=tuple(lens.tolist()),
            context_lens=tuple(row.start + n for row, n in zip(rows, lens.tolist(), strict=True)),
            sample_index=moved["sample_index"],
            sample_lens=sample_lens,
            sample_spans=moved["sample_spans"],
            drafts=drafts,
            draft_probs=_spread_probs(proposal.draft_probs, drafts, moved),
            sampling=self._sampling(rows, sample_lens, moved, drafts),
            logprobs=tuple(row.request.params.logprobs for row in rows),
            drafting=drafting,
            score_index=scores.get("index"),
            score_targets=scores.get("targets"),
            score_lens=score_lens,
            score_top=tuple(row.request.params.prompt_logprobs or 0 for row in rows),
        )

    def _move(self, **arrays: npt.NDArray[Any]) -> Moved:
        return dict(zip(arrays, to_device(self.device, *arrays.values()), strict=True))

    def _spread_drafts(self, proposal: Proposal, moved: Moved, shape: tuple[int, int]) -> Tensor:
        """Drafts of all rows [rows, max_kept], -1 where there is none; also puts them behind their anchors."""
        drafts = torch.full(shape, -1, dtype=torch.int64, device=self.device)
        if drafts.shape[1]:
            tokens = proposal.tokens.to(self.device, non_blocking=True)  # a lookup's are on the host
            drafts[moved["drafting"], : tokens.shape[1]] = tokens
            moved["token_ids"][moved["behind"]] = drafts.flatten()[moved["kept"]]
        return drafts

    def _scores(self, rows: Sequence[Row], starts: Ints, score_lens: tuple[int, ...]) -> Moved:
        """Indices of the prompt positions to score, and the prompt tokens that follow them; may be nothing."""
        if not any(score_lens):
            return {}
        index: list[int] = []
        targets: list[int] = []
        for row, start, count in zip(rows, starts.tolist(), score_lens, strict=True):
            first = row.request.num_scored - row.start
            index.extend(range(start + first, start + first + count))
            targets.extend(row.request.prompt_token_ids[row.request.num_scored + 1 :][:count])
        return self._move(index=np.array(index, dtype=np.int64), targets=np.array(targets, dtype=np.int64))

    def _sampling(
        self, rows: Sequence[Row], sample_lens: tuple[int, ...], moved: Moved, drafts: Tensor
    ) -> SamplingBatch:
        temperature, top_p, min_p = moved["numbers"]
        top_k, seed, position = moved["whole"]
        sampling = [row.request.params for row, n in zip(rows, sample_lens, strict=True) if n]
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
            penalties=penalties.count(rows, sample_lens, drafts),
            bias_sample=bias.get("sample"),
            bias_token=bias.get("token"),
            bias_value=bias.get("value"),
        )

    def _bias(self, rows: Sequence[Row], sample_lens: tuple[int, ...]) -> Moved:
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
            return {}
        return self._move(
            sample=np.array(samples, dtype=np.int64),
            token=np.array(tokens, dtype=np.int64),
            value=np.array(values, dtype=np.float32),
        )


def _spread_probs(given: DraftProbs | None, drafts: Tensor, moved: Moved) -> DraftProbs | None:
    if given is None or not drafts.shape[1] or len(moved["drafting"]) == len(drafts):
        return given if drafts.shape[1] else None
    if isinstance(given, DraftLogits):
        return given.placed(moved["drafting"], len(drafts))
    return given.new_zeros((*drafts.shape, given.shape[-1])).index_copy_(0, moved["drafting"], given)


def _parameters(rows: Sequence[Row], samples: Ints, within: Ints) -> dict[str, npt.NDArray[Any]]:
    """Sampling parameters of every sample, a matrix per type: arrays are what a step's host time goes into."""
    params = [row.request.params for row in rows]
    numbers = np.array([(p.temperature, p.top_p, p.min_p) for p in params], dtype=np.float32).repeat(samples, axis=0)
    whole = np.array(
        [(max(row.request.params.top_k, 0), signed_seed(row.request.seed), row.start + row.length) for row in rows],
        dtype=np.int64,
    ).repeat(samples, axis=0)
    whole[:, 2] += within
    return {"numbers": numbers.T, "whole": whole.T}


def _draft_places(drafting: Sequence[int], ends: Ints, kept: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """Which rows were to draft; where those that are kept lie in [rows, max_kept]; and their places among the tokens.

    All of that is known here: asking the drafts which of them are none would make the device wait.
    """
    counts, within = np.array(kept), _within(kept)
    return {
        "drafting": np.array(drafting, dtype=np.int64),
        "kept": np.repeat(np.arange(len(kept)) * max(kept), counts) + within,
        "behind": np.repeat(ends - counts, counts) + within,
    }


def _row_tokens(row: Row, kept: int) -> list[int]:
    """The row's known tokens, then room for its drafts."""
    return row.request.token_ids[row.start : row.start + row.length] + [0] * kept


def _page_table(rows: Sequence[Row]) -> Ints:
    table = np.zeros((len(rows), max(len(row.request.pages) for row in rows)), dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row.request.pages)] = row.request.pages
    return table


def _within(counts: Sequence[int]) -> Ints:
    """0..counts[0]-1, 0..counts[1]-1, ... in one array."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) - np.repeat(ends - counts, counts)


def _num_scores(row: Row) -> int:
    """Prompt positions of this row whose next prompt token is still to be scored."""
    request = row.request
    if request.params.prompt_logprobs is None:
        return 0
    return max(0, min(row.start + row.length, request.num_prompt - 1) - request.num_scored)
