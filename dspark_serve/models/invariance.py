"""A start-up self-check: are a token's bits the same however it is batched? Also the batches such probes are made of.

Must not know: requests, schedulers, drafters; how a model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark_serve.tensors import SamplingBatch, StepBatch


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence for one step, and the pages of the whole sequence."""

    tokens: tuple[int, ...]
    start: int  # position of the first
    pages: tuple[int, ...]


def probe_batch(chunks: Sequence[Chunk], page_size: int, device: torch.device | str = "cpu") -> StepBatch:
    """A greedy StepBatch with one row per chunk in which every position is a sample, its successor a draft."""
    tokens = [token for chunk in chunks for token in chunk.tokens]
    positions = [chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))]
    slots = [
        chunk.pages[position // page_size] * page_size + position % page_size
        for chunk in chunks
        for position in range(chunk.start, chunk.start + len(chunk.tokens))
    ]
    lens = tuple(len(chunk.tokens) for chunk in chunks)
    width, kept = max(len(chunk.pages) for chunk in chunks), max(lens) - 1
    table = [[*chunk.pages, *([0] * (width - len(chunk.pages)))] for chunk in chunks]
    drafts = [[*chunk.tokens[1:], *([-1] * (kept + 1 - len(chunk.tokens)))] for chunk in chunks]

    def whole(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    count = len(tokens)
    zeros = torch.zeros(count, device=device)
    sampling = SamplingBatch(
        temperature=zeros,
        top_k=torch.zeros(count, dtype=torch.int64, device=device),
        top_p=torch.ones(count, device=device),
        min_p=zeros,
        seed=torch.zeros(count, dtype=torch.int64, device=device),
        position=whole(positions) + 1,
        all_greedy=True,
        any_filter=False,
    )
    return StepBatch(
        token_ids=whole(tokens),
        positions=whole(positions),
        slots=whole(slots),
        page_table=whole(table),
        query_lens=lens,
        context_lens=tuple(chunk.start + len(chunk.tokens) for chunk in chunks),
        sample_index=torch.arange(count, device=device),
        sample_lens=lens,
        drafts=whole(drafts).reshape(len(chunks), kept),
        draft_probs=None,
        sampling=sampling,
        logprobs=(None,) * len(chunks),
    )
