"""Step batches made by hand, and logits and drafts to fill them, for tests of the rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspark_serve.sampling import draw_target
from dspark_serve.tensors import SamplingBatch, StepBatch
from dspark_serve.types import GREEDY_TEMPERATURE, VerifyMode

MODES: tuple[VerifyMode, ...] = ("coupled", "rejection")


def step_batch(
    drafts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    samples: Sequence[bool] | None = None,
    draft_probs: Tensor | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    first_seed: int = 0,
) -> StepBatch:
    """Rows with the given drafts, one temperature per row; row r has seed first_seed + r and starts at position 7 r."""
    samples = samples or [True] * len(drafts)
    lens = tuple(len(d) + 1 if s else 0 for d, s in zip(drafts, samples, strict=True))
    width = max(len(d) for d in drafts)
    row = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))  # [samples]
    slot = torch.cat([torch.arange(n) for n in lens])
    temperature = torch.tensor(temperatures, dtype=torch.float32)[row]
    n = len(row)
    sampling = SamplingBatch(
        temperature=temperature,
        top_k=torch.full((n,), top_k),
        top_p=torch.full((n,), top_p),
        min_p=torch.zeros(n),
        seed=row + first_seed,
        position=7 * row + slot,
        all_greedy=bool((temperature <= GREEDY_TEMPERATURE).all()),
        any_filter=bool(top_k or top_p < 1),
    )
    empty = torch.empty(0, dtype=torch.int64)
    padded = [[*d, *([-1] * (width - len(d)))] for d in drafts]
    return StepBatch(
        token_ids=empty,
        positions=empty,
        slots=empty,
        page_table=empty,
        spans=empty,
        query_lens=tuple(len(d) + 1 for d in drafts),
        context_lens=tuple(len(d) + 9 for d in drafts),
        sample_index=torch.arange(n),
        sample_lens=lens,
        sample_spans=torch.tensor([[sum(lens[:row]) for row in range(len(lens))], lens]),
        drafts=torch.tensor(padded, dtype=torch.int64).reshape(len(drafts), width),
        draft_probs=draft_probs,
        sampling=sampling,
        logprobs=(None,) * len(drafts),
    )


def some_logits(samples: int, vocab: int, seed: int = 0, spread: float = 1.5) -> Tensor:
    return torch.randn(samples, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def plausible_drafts(logits: Tensor, lens: Sequence[int], temperature: float, seed: int) -> list[list[int]]:
    """Drafts that often match: the target's own draws, some of them replaced."""
    rng = np.random.default_rng(seed)
    shapes = step_batch([[0] * n for n in lens], [temperature] * len(lens))
    own = draw_target(logits[: shapes.num_samples], shapes.sampling).tolist()
    drafts = []
    for n in lens:
        row, own = own[:n], own[n + 1 :]
        drafts.append([t if rng.random() < 0.8 else int(rng.integers(logits.shape[1])) for t in row])
    return drafts


# Coupled.
