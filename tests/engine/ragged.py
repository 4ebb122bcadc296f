"""Ragged steps over scrambled pages, and a store to run them in, for tests of padding and recording."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dspark_serve.cache.store import KVStore
from dspark_serve.models.base import ModelInfo
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.tensors import StepBatch

PAGE = 4


def ragged_step(
    rows: Sequence[tuple[int, int]], num_pages: int, vocab: int, seed: int = 0, page: int = PAGE, device: str = "cpu"
) -> StepBatch:
    """rows: (tokens, context before them) each, on pages of their own in any order, none of them page 0."""
    generator = torch.Generator().manual_seed(seed)
    free = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    chunks = []
    for tokens, context in rows:
        pages = -(-(tokens + context) // page)
        ids = torch.randint(0, vocab, (tokens,), generator=generator).tolist()
        chunks.append(Chunk(tuple(ids), context, tuple(free[:pages])))
        free = free[pages:]
    return probe_batch(chunks, page, device)


def written_store(info: ModelInfo, num_pages: int, page: int = PAGE, device: str = "cpu", seed: int = 0) -> KVStore:
    """Every page holds something, so that whatever is read or written makes a difference; the same for a seed."""
    store = KVStore(info.kv_layers, num_pages, page, info.dtype, device)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*store.keys, *store.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return store
