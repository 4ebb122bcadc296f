"""Drives a TargetModel without an engine: sequences with scrambled pages, fed in any chunking, in any company.

Must not know: which model it drives.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dspark_kernels import native
from dspark_serve.cache.store import KVStore
from dspark_serve.models.base import TargetModel
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.tensors import StepBatch

_CAPABILITY = torch.backends.cpu.get_cpu_capability()
INSTRUCTION_SETS = [
    "base",
    *(["avx2"] if _CAPABILITY.startswith(("AVX2", "AVX512")) else []),
    *(["avx512"] if _CAPABILITY.startswith("AVX512") else []),
]  # that this machine runs


def load_kernels(name: str) -> native.Kernels:
    """The C++ kernels of one instruction set; skips the test where no compiler built them."""
    kernels = native.load(name)
    if kernels is None:
        pytest.skip(f"the {name} kernels are not built: this needs a C++ compiler when the package is installed")
    return kernels


@dataclass(frozen=True)
class Trace:
    """Everything a sequence got out of the model, in token order."""

    logits: Tensor  # [tokens, vocab] float32
    taps: Tensor | None  # [tokens, len(taps) * hidden]


def scrambled_pages(lengths: Sequence[int], page_size: int, seed: int = 0) -> list[list[int]]:
    """A page table per sequence of the given length in tokens, ids shuffled over one pool; page 0 is never used."""
    needed = [-(-length // page_size) for length in lengths]
    ids = list(range(1, sum(needed) + 1))
    random.Random(seed).shuffle(ids)
    return [[ids.pop() for _ in range(count)] for count in needed]


def step_batch(
    tokens: Sequence[int], chunking: Sequence[int], page_size: int = 16, pages: Sequence[int] | None = None
) -> list[StepBatch]:
    """One sequence as steps of chunking[i] tokens each (together all of them); every position is a sample."""
    assert sum(chunking) == len(tokens)
    pages = scrambled_pages([len(tokens)], page_size)[0] if pages is None else pages
    batches, start = [], 0
    for size in chunking:
        batches.append(probe_batch([Chunk(tuple(tokens[start : start + size]), start, tuple(pages))], page_size))
        start += size
    return batches


def chunked(length: int, size: int) -> list[int]:
    """`length` tokens in chunks of `size`, the last one shorter."""
    return [min(size, length - start) for start in range(0, length, size)]


def run_steps(
    model: TargetModel,
    sequences: Sequence[Sequence[int]],
    steps: Sequence[Mapping[int, int]],
    *,
    taps: Sequence[int] = (),
    page_size: int = 16,
    seed: int = 0,
    fill: float | None = None,
) -> list[Trace]:
    """Run `steps`: each maps sequence -> number of its next tokens (rows in the mapping's order). Returns a trace per
    sequence of the tokens that were fed. `fill` pre-fills the store, to show that stale K/V is never seen."""
    tables = scrambled_pages([len(s) for s in sequences], page_size, seed)
    store = KVStore(
        model.info.kv_layers, 1 + sum(map(len, tables)), page_size, dtype=model.info.dtype, device=model.device
    )
    if fill is not None:
        for tensor in (*store.keys, *store.values):
            tensor.fill_(fill)
    done = [0] * len(sequences)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    tapped: list[list[Tensor]] = [[] for _ in sequences]
    for step in steps:
        chunks = [
            Chunk(tuple(sequences[i][done[i] : done[i] + size]), done[i], tuple(tables[i])) for i, size in step.items()
        ]
        out = model.forward(probe_batch(chunks, page_size, model.device), store, taps)
        sizes = list(step.values())
        for i, rows in zip(step, out.logits.split(sizes), strict=True):
            logits[i].append(rows)
        if out.taps is not None:
            for i, rows in zip(step, out.taps.split(sizes), strict=True):
                tapped[i].append(rows)
        for i, size in step.items():
            done[i] += size
    return [
        Trace(torch.cat(rows), torch.cat(states) if states else None)
        for rows, states in zip(logits, tapped, strict=True)
        if rows
    ]


def run_one(
    model: TargetModel,
    tokens: Sequence[int],
    chunking: Sequence[int] | None = None,
    *,
    taps: Sequence[int] = (),
    page_size: int = 16,
    seed: int = 0,
) -> Trace:
    """One sequence alone, in chunks (default: all at once)."""
    sizes = [len(tokens)] if chunking is None else chunking
    return run_steps(model, [tokens], [{0: n} for n in sizes], taps=taps, page_size=page_size, seed=seed)[0]
