"""A start-up self-check: are a token's bits the same however it is batched? Also the batches such probes are made of.

Must not know: requests, schedulers, drafters; how a model computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_serve.cache.store import KVStore
from dspark_serve.models.base import TargetModel
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

    count, contexts = len(tokens), tuple(chunk.start + len(chunk.tokens) for chunk in chunks)
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
        spans=whole([[0, *itertools.accumulate(lens)][:-1], lens, contexts]),
        query_lens=lens,
        context_lens=contexts,
        sample_index=torch.arange(count, device=device),
        sample_lens=lens,
        sample_spans=whole([[0, *itertools.accumulate(lens)][:-1], lens]),
        drafts=whole(drafts).reshape(len(chunks), kept),
        draft_probs=None,
        sampling=sampling,
        logprobs=(None,) * len(chunks),
    )


@dataclass(frozen=True)
class _Sequence:
    """A run of tokens deep inside a context whose K/V is random: what matters is that it is there, not what it says."""

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]

    def chunk(self, begin: int, end: int) -> Chunk:
        return Chunk(self.tokens[begin:end], self.start + begin, self.pages)


# (first position, tokens): from an empty context, and across the key counts where sums are split differently
_PROBES = ((0, 12), (248, 12), (505, 16), (30, 70))
# How the probes are fed: each step maps a probe to its next tokens. Every token must have the same bits in all of them.
_ALONE: tuple[tuple[dict[int, int], ...], ...] = tuple(({probe: count},) for probe, (_, count) in enumerate(_PROBES))
_VARIANTS: tuple[tuple[str, tuple[dict[int, int], ...]], ...] = (
    ("token by token", ({2: 1}, {2: 1}, {0: 1}, {0: 1})),
    ("in odd chunks beside other rows", ({2: 7, 0: 1, 1: 5}, {1: 3, 2: 1}, {0: 2, 1: 2, 2: 3})),
    ("in one step with many others", ({0: 12, 1: 12, 2: 16, 3: 70},)),
)


@torch.inference_mode()
def row_variance(model: TargetModel, page_size: int) -> str | None:
    """None if a token's logits and taps have the same bits however it is batched; else a sentence saying what differed.

    About a dozen forwards of a few tokens over 0.5k tokens of context; allocates a small KVStore of its own.
    """
    sequences, num_pages = _sequences(model.info.vocab_size, page_size)
    store = KVStore(model.info.kv_layers, num_pages, page_size, model.info.dtype, model.device)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*store.keys, *store.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    layers = model.info.num_layers
    taps = tuple(sorted({0, layers // 2, layers - 1}))
    try:
        expected = {probe: _feed(model, store, sequences, steps, taps)[probe] for probe, steps in enumerate(_ALONE)}
    except ValueError:  # a model whose layers cannot be tapped
        taps = ()
        expected = {probe: _feed(model, store, sequences, steps, taps)[probe] for probe, steps in enumerate(_ALONE)}
    for name, steps in _VARIANTS:
        for probe, got in _feed(model, store, sequences, steps, taps).items():
            for what, a, b in zip(("logits", "taps"), expected[probe], got, strict=True):
                a = a[: b.shape[0]]
                if not torch.equal(a, b):
                    token = int((a != b).any(dim=1).nonzero()[0])
                    distance = float((a.float() - b.float()).abs().max())
                    position = sequences[probe].start + token
                    return f"{what} at position {position} differ by up to {distance:.1e} when tokens are fed {name}"
    return None


def _sequences(vocab_size: int, page_size: int) -> tuple[list[_Sequence], int]:
    """The probes' tokens and pages, and the number of pages. Neighbouring pages of a sequence are far apart."""
    counts = [-(-(start + length) // page_size) for start, length in _PROBES]
    free = list(range(1, sum(counts) + 1))
    free = free[::2] + free[1::2]
    sequences = []
    for (start, length), count in zip(_PROBES, counts, strict=True):
        tokens = tuple((start + 7 + 131 * i * i) % vocab_size for i in range(length))
        sequences.append(_Sequence(tokens, start, tuple(free[:count])))
        free = free[count:]
    return sequences, sum(counts) + 1


def _feed(
    model: TargetModel,
    store: KVStore,
    sequences: Sequence[_Sequence],
    steps: Sequence[dict[int, int]],
    taps: tuple[int, ...],
) -> dict[int, tuple[Tensor, Tensor]]:
    """Logits and taps of the tokens fed, per probe."""
    done = dict.fromkeys(range(len(sequences)), 0)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for step in steps:
        chunks = [sequences[probe].chunk(done[probe], done[probe] + count) for probe, count in step.items()]
        out = model.forward(probe_batch(chunks, store.page_size, model.device), store, taps)
        tapped = out.logits[:, :0] if out.taps is None else out.taps
        counts = list(step.values())
        rows = zip(step, torch.split(out.logits, counts), torch.split(tapped, counts), strict=True)
        for probe, logits, states in rows:
            found.setdefault(probe, []).append((logits, states))
            done[probe] += step[probe]
    return {
        probe: (torch.cat([logits for logits, _ in parts]), torch.cat([states for _, states in parts]))
        for probe, parts in found.items()
    }
