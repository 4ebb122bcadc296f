"""attend() against plain attention written out per token, and its bits across chunkings, neighbours and paddings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from helpers import INSTRUCTION_SETS, chunked, load_kernels, scrambled_pages
from torch import Tensor

from dspark_kernels.native import Kernels
from dspark_serve.cache.store import KVStore, LayerGeometry
from dspark_serve.models import attention
from dspark_serve.models.attention import AttnMeta, attend
from dspark_serve.models.invariance import Chunk, probe_batch

PAGE = 16


@pytest.fixture(params=["torch", *INSTRUCTION_SETS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the torch reference and with the kernels of every instruction set."""
    if request.param != "torch":
        monkeypatch.setattr(Bench, "kernels", load_kernels(request.param))


class Bench:
    """Sequences of random q, k, v, attended in any steps through a scrambled store."""

    kernels: Kernels | None = None

    def __init__(
        self, lengths: Sequence[int], heads: int = 3, kv_heads: int = 1, dim: int = 64, value_dim: int | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths) + heads)
        value_dim = dim if value_dim is None else value_dim
        self.lengths = lengths
        self.scale = dim**-0.5

        def make(count: int, width: int) -> list[Tensor]:
            return [torch.randn(n, count, width, generator=generator) for n in lengths]

        self.q, self.k, self.v = make(heads, dim), make(kv_heads, dim), make(kv_heads, value_dim)
        self.geometry = LayerGeometry(kv_heads, dim, value_dim)

    def run(
        self, steps: Sequence[Mapping[int, int]], seed: int = 0, extra_pages: int = 0, **options: object
    ) -> list[Tensor]:
        tables = scrambled_pages([n + extra_pages * PAGE for n in self.lengths], PAGE, seed)
        store = KVStore([self.geometry], 1 + sum(map(len, tables)), PAGE)
        for tensor in (store.keys[0], store.values[0]):
            tensor.fill_(1e4)  # stale contents must not matter
        done = [0] * len(self.lengths)
        out: list[list[Tensor]] = [[] for _ in self.lengths]
        for step in steps:
            spans = {i: (done[i], done[i] + size) for i, size in step.items()}
            batch = probe_batch([Chunk((0,) * (b - a), a, tuple(tables[i])) for i, (a, b) in spans.items()], PAGE)
            parts = [torch.cat([x[i][a:b] for i, (a, b) in spans.items()]) for x in (self.q, self.k, self.v)]
            meta = AttnMeta.build(batch, PAGE, self.kernels)
            result = attend(*parts, 0, meta, store, scale=self.scale, **options)  # type: ignore[arg-type]
            for i, rows in zip(step, result.split(list(step.values())), strict=True):
                out[i].append(rows)
            for i, (_, b) in spans.items():
                done[i] = b
        return [torch.cat(rows) for rows in out if rows]

    def expected(
        self,
        i: int,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """One head at a time, one formula a line, in float64."""
        q, k, v = (x[i].double() for x in (self.q, self.k, self.v))
        out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
        key = torch.arange(k.shape[0])
        for head in range(q.shape[1]):
            kv = head // (q.shape[1] // k.shape[1])
            scores = q[:, head] @ k[:, kv].T * self.scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            visible = key[None, :] <= key[:, None]
            if sliding_window is not None:
                visible &= key[None, :] > key[:, None] - sliding_window
            weights = scores.masked_fill(~visible, -math.inf).exp()
            total = weights.sum(-1) + (0 if sinks is None else sinks[head].double().exp())
            out[:, head] = weights @ v[:, kv] / total[:, None]
        return out.float()


SHAPES = [(1, 1, 16), (3, 1, 64), (4, 4, 32), (9, 3, 64), (8, 2, 80), (8, 1, 96), (4, 2, 128), (2, 1, 256)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_matches_plain_attention(heads: int, kv_heads: int, dim: int) -> None:
    bench = Bench([70, 5, 33], heads, kv_heads, dim)
    steps = [{0: 40, 2: 1}, {1: 5, 0: 30, 2: 3}, *[{2: 1}] * 29]
    for i, got in enumerate(bench.run(steps)):
        torch.testing.assert_close(got, bench.expected(i), atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 8},
        {"softcap": 2.0},
        {"sinks": torch.tensor([0.5, -1.0, 3.0])},
        {"sliding_window": 100, "softcap": 5.0, "sinks": torch.tensor([0.5, -1.0, 3.0])},
    ],
)
def test_options_match_plain_attention(options: dict[str, object]) -> None:
    bench = Bench([300, 20])
    for i, got in enumerate(bench.run([{0: 290, 1: 20}, {0: 7}, {0: 3}], **options)):
        torch.testing.assert_close(got, bench.expected(i, **options), atol=2e-5, rtol=1e-4)  # type: ignore[arg-type]


@pytest.mark.usefixtures("backend")
def test_value_width_may_differ() -> None:
    bench = Bench([40], heads=4, kv_heads=2, dim=48, value_dim=32)
    torch.testing.assert_close(bench.run([{0: 37}, {0: 3}])[0], bench.expected(0), atol=2e-5, rtol=1e-4)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("length", [255, 256, 257, 511, 513, 1030])
def test_context_around_key_blocks(length: int) -> None:
    bench = Bench([length])
    whole = bench.run([{0: length}])[0]
    torch.testing.assert_close(whole, bench.expected(0), atol=2e-5, rtol=1e-4)
    tail = bench.run([{0: length - 6}, *[{0: 1}] * 4, {0: 2}])[0]
    assert torch.equal(whole, tail)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_bits_do_not_depend_on_steps(heads: int, kv_heads: int, dim: int) -> None:
    bench = Bench([70], heads, kv_heads, dim)
    whole = bench.run([{0: 70}])[0]
    for size in (1, 2, 3, 5, 7, 33):
        assert torch.equal(whole, bench.run([{0: n} for n in chunked(70, size)])[0]), size


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"sinks": torch.tensor([0.5, -1.0, 3.0])}])
def test_bits_do_not_depend_on_neighbours_pages_or_padding(options: dict[str, object]) -> None:
    bench = Bench([300, 40, 600, 9, 31])
    alone = [bench.run([{i: n}], **options)[0] for i, n in enumerate(bench.lengths)]
    crowd = [
        {0: 100, 1: 39, 2: 300, 3: 8, 4: 1},
        {4: 6, 0: 199, 2: 299, 1: 1},
        {0: 1, 2: 1, 3: 1, 4: 2},
        {4: 22},
    ]
    for extra_pages in (0, 3):
        together = bench.run(crowd, seed=5, extra_pages=extra_pages, **options)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_long_chunks_are_attended_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench([400])
    whole = bench.run([{0: 400}])[0]
    monkeypatch.setattr(attention, "_MAX_SCORES", 3 * 20 * 416)
    batch = probe_batch([Chunk((0,) * 400, 0, tuple(range(1, 26)))], PAGE)
    (group,) = AttnMeta.build(batch, PAGE).plan(attention._Shape(3, 1, 64, 64)).groups
    assert len(group.pieces) == 20
    assert [piece.keys for piece in group.pieces[:3]] == [32, 64, 64]  # early pieces read only their own past
    assert torch.equal(whole, bench.run([{0: 400}])[0])


def test_one_long_row_does_not_stretch_the_short_ones() -> None:
    shape = attention._Shape(9, 3, 64, 64)
    groups = attention._group_rows([1] * 8, [8000, *[100] * 7], shape)
    assert sorted(len(group.rows) for group in groups) == [1, 7]
    assert len(attention._group_rows([1] * 16, list(range(100, 116)), shape)) == 1
    assert len(attention._group_rows([1, 2, 6, 1], [50, 60, 70, 80], shape)) == 1


def test_contradictory_lengths_are_refused() -> None:
    batch = probe_batch([Chunk((0,) * 20, 0, (1, 2))], PAGE)
    with pytest.raises(ValueError, match="do not fit a page table of 16 slots"):
        AttnMeta.build(dataclasses.replace(batch, page_table=batch.page_table[:, :1]), PAGE)
    with pytest.raises(ValueError, match="add up to 19, not 20 tokens"):
        AttnMeta.build(dataclasses.replace(batch, query_lens=(19,)), PAGE)
