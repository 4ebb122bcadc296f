"""Log-probabilities that requests ask for: made where the logits are, before it is known there what was accepted, so
that one copy brings them with the tokens. Must not know: how tokens were judged.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dspark_serve.sampling import logprob_table
from dspark_serve.tensors import StepBatch, Verdict, unpacked
from dspark_serve.transfers import to_device
from dspark_serve.types import RowResult


def asked(verdict: Verdict, batch: StepBatch, logits: Tensor) -> Verdict:
    """The verdict with what the rows want to know of their samples, then of their prompts, as `LogprobTable.packed`.

    logits: [samples + scores, vocab] float32.
    """
    rows, counts = [], []
    for row, (top, samples) in enumerate(zip(batch.logprobs, batch.sample_lens, strict=True)):
        if top is not None and samples:
            rows.append(row)
            counts.append(top)
    at: list[Tensor] = []
    chosen: list[Tensor] = []
    if rows:
        lens = np.array(batch.sample_lens)
        mine, first = lens[rows], (lens.cumsum() - lens)[rows]
        place = np.arange(mine.sum()) - (mine.cumsum() - mine).repeat(mine)  # 0, 1, ... of each row
        index, of_row, slot = to_device(logits.device, first.repeat(mine) + place, np.array(rows).repeat(mine), place)
        at.append(index)
        chosen.append(verdict.tokens[of_row, slot].clamp(min=0))  # nobody looks at those behind what was accepted
    if batch.score_targets is not None and batch.score_targets.shape[0]:
        scores = np.arange(batch.num_samples, batch.num_samples + batch.score_targets.shape[0])
        at += to_device(logits.device, scores)
        chosen.append(batch.score_targets)
        counts += [top for top, n in zip(batch.score_top, batch.score_lens, strict=True) if n]
    if not at:
        return verdict
    table = logprob_table(logits[torch.cat(at)], torch.cat(chosen), max(counts))
    return replace(verdict, also=(table.packed(),))


def added(results: list[RowResult], batch: StepBatch, verdict: Verdict) -> list[RowResult]:
    """Results with `logprobs`, an entry per token that came out, and `prompt_logprobs`, for the rows that asked."""
    if not verdict.also:
        return results
    (lines,), found, first = verdict.host_also, list(results), 0
    for row, (result, top, samples) in enumerate(zip(results, batch.logprobs, batch.sample_lens, strict=True)):
        if top is not None:
            if result.tokens:
                of_row = lines[first : first + len(result.tokens)]
                found[row] = replace(found[row], logprobs=unpacked(of_row, top))
            first += samples
    for row, (n, top) in enumerate(zip(batch.score_lens, batch.score_top, strict=True)):
        if n:
            found[row] = replace(found[row], prompt_logprobs=unpacked(lines[first : first + n], top))
            first += n
    return found
