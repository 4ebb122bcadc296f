"""Ragged paged attention against float64 arithmetic; what no row may see is NaN, and memory ends where tensors do."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from fence import fenced
from torch import Tensor

from dspark_kernels.triton import attention, tiles

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
RAGGED = ((1, 1), (1, 70), (5, 69), (40, 40), (8, 8), (33, 100))  # (tokens, keys the last sees)


@dataclass(frozen=True)
class Heads:
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int = 64


@dataclass(frozen=True)
class Case:
    """Inputs of one launch. Pages that are nobody's, and slots beyond a row's context, hold NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    pages: Tensor
    rows: Tensor

    @staticmethod
    def make(
        shape: Heads, rows: tuple[tuple[int, int], ...], dtype: torch.dtype, page_size: int = 16, block: bool = False
    ) -> Case:
        generator = torch.Generator().manual_seed(len(rows) * page_size + shape.head_dim)
        needed = [-(-context // page_size) for _, context in rows]
        num_pages = sum(needed) + 2
        order = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()  # page 0 is never assigned
        keys = torch.full((num_pages, page_size, shape.kv_heads, shape.head_dim), torch.nan)
        values = torch.full((num_pages, page_size, shape.kv_heads, shape.value_dim), torch.nan)
        pages = torch.zeros(len(rows), max(needed), dtype=torch.int64)
        for row, (count, context) in enumerate(rows):
            mine = [order.pop() for _ in range(needed[row])]
            pages[row, : len(mine)] = torch.tensor(mine)
            for at in range(context - count if block else context):
                where = mine[at // page_size], at % page_size
                keys[where] = torch.randn(keys[where].shape, generator=generator)
                values[where] = torch.randn(values[where].shape, generator=generator)
        counts = [count for count, _ in rows]
        first = [0, *itertools.accumulate(counts)][:-1]
        tokens = sum(counts)
        q, k, v = (
            torch.randn(tokens, heads, width, generator=generator).to(dtype)
            for heads, width in (
                (shape.heads, shape.head_dim),
                (shape.kv_heads, shape.head_dim),
                (shape.kv_heads, shape.value_dim),
            )
        )
        spans = torch.tensor([first, counts, [context for _, context in rows]])
        return Case(q, k, v, keys.to(dtype), values.to(dtype), pages, spans)

    def run(self, block: bool = False, **options: object) -> Tensor:
        pages, rows = fenced(self.pages), fenced(self.rows)
        own = (fenced(self.k), fenced(self.v)) if block else None
        q, keys, values = fenced(self.q), fenced(self.keys), fenced(self.values)
        return attention.attend(q, keys, values, pages, rows, block=own, **{"scale": 0.125, **options})  # type: ignore[arg-type]

    def want(
        self,
        block: bool = False,
        scale: float = 0.125,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Row by row and head by head, in float64."""
        heads, kv_heads = self.q.shape[1], self.keys.shape[2]
        results = []
        for row, (first, count, context) in enumerate(self.rows.T.tolist()):
            at = torch.arange(context - count if block else context)
            page = self.pages[row, at // self.keys.shape[1]]
            k, v = (store[page, at % self.keys.shape[1]].double() for store in (self.keys, self.values))
            some = slice(first, first + count)
            if block:
                k, v = torch.cat([k, self.k[some].double()]), torch.cat([v, self.v[some].double()])
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for x in (k, v))
            scores = self.q[some].double().transpose(0, 1) @ k.transpose(1, 2) * scale  # [heads, count, context]
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            query, key = torch.arange(context - count, context)[:, None], torch.arange(context)
            if not block:
                scores.masked_fill_(key > query, -torch.inf)
            if window:
                scores.masked_fill_(key <= query - window, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], dim=2)
            results.append((scores.softmax(-1)[..., :context] @ v).transpose(0, 1))
        return torch.cat(results)


def check(case: Case, **options: object) -> None:
    got = case.run(**options)  # type: ignore[arg-type]
    assert got.dtype == case.q.dtype
    error = (got.double() - case.want(**options)).abs().max()  # type: ignore[arg-type]
    assert error <= TOLERANCE[case.q.dtype], float(error)  # a NaN fails too


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_rows(dtype: torch.dtype) -> None:
    check(Case.make(Heads(), RAGGED, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_block_sees_itself_in_both_directions(dtype: torch.dtype) -> None:
    rows = ((7, 7), (7, 8), (7, 71), (1, 20), (3, 20), (7, 100))
    check(Case.make(Heads(8, 2), rows, dtype, block=True), block=True)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 9}, {"window": 70}, {"softcap": 2.0}])
def test_windows_and_caps(options: dict[str, float]) -> None:
    check(Case.make(Heads(), RAGGED, torch.float32), **options)


def test_a_capped_block_with_sinks() -> None:
    case = Case.make(Heads(), ((7, 50), (7, 7)), torch.float32, block=True)
    check(case, block=True, softcap=1.5, sinks=torch.tensor([-3.0, 0.0, 0.5, 1.0, 2.0, 9.0]))


def test_sinks_take_probability() -> None:
    check(Case.make(Heads(), RAGGED[:3], torch.float32), sinks=torch.linspace(-2, 4, 6), window=9)


@pytest.mark.parametrize(
    "shape",
    [
        Heads(1, 1, 16, 16),
        Heads(4, 1, 80, 48),  # neither is a power of two
        Heads(5, 5, 8, 24),  # narrower than a product may be
        Heads(32, 1, 128, 128),  # every query head reads the same keys
        Heads(4, 2, 256, 256),
        Heads(4, 4, 512, 512),
    ],
)
def test_heads_of_many_shapes(shape: Heads) -> None:
    check(Case.make(shape, ((3, 37), (1, 5)), torch.float32))


@pytest.mark.parametrize("page_size", [1, 24, 128])
def test_pages_of_any_size(page_size: int) -> None:
    check(Case.make(Heads(), RAGGED[:4], torch.float32, page_size))


@pytest.mark.parametrize("options", [{}, {"window": 33}, {"block": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row_are_its_own(options: dict[str, object], dtype: torch.dtype) -> None:
    """A row alone has the bits it has among others; causal tokens also one by one, as decoding sees them."""
    block = bool(options.get("block"))
    case = Case.make(Heads(), ((7, 100), (1, 70), (7, 66), (7, 7)), dtype, block=block)
    together = case.run(**options)  # type: ignore[arg-type]
    for row, (first, count, context) in enumerate(case.rows.T.tolist()):
        for start, stop in [(0, count)] if block else [(0, count), (0, 1), (count // 2, count)]:
            some = slice(first + start, first + stop)
            span = torch.tensor([[0], [stop - start], [context - count + stop]])
            q, k, v = (x[some] for x in (case.q, case.k, case.v))
            alone = Case(q, k, v, case.keys, case.values, case.pages[row : row + 1], span)
            assert torch.equal(alone.run(**options), together[some]), (row, start)  # type: ignore[arg-type]


def test_queries_may_lie_apart() -> None:
    case = Case.make(Heads(), RAGGED, torch.float32)
    wide = torch.full((len(case.q), 10, 64), torch.nan)
    wide[:, 2:8] = case.q
    got = attention.attend(wide[:, 2:8], case.keys, case.values, case.pages, case.rows, scale=0.125)
    assert torch.equal(got, case.run())


def test_what_does_not_fit_is_refused() -> None:
    case = Case.make(Heads(), RAGGED[:2], torch.float32)
    good = {"q": case.q, "keys": case.keys, "values": case.values, "pages": case.pages, "rows": case.rows}

    def attend(**other: object) -> None:
        attention.attend(**{**good, "scale": 1.0, **other})  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="do not fit keys"):
        attend(q=case.q[:, :5])
    with pytest.raises(ValueError, match="heads adjacent"):
        attend(q=case.q.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="contiguous int64"):
        attend(pages=case.pages.int())
    with pytest.raises(ValueError, match="do not fit a page table"):
        attend(rows=case.rows[:, :1].contiguous())
    with pytest.raises(ValueError, match="cannot be had"):
        attend(window=4, block=(case.k, case.v))
    with pytest.raises(ValueError, match="not the pages of one store"):
        attend(values=case.values[1:])
    with pytest.raises(ValueError, match="sinks must be 6"):
        attend(sinks=torch.zeros(5))
    with pytest.raises(ValueError, match="no attention tile"):
        tiles.attention_tile(121, 1024, 2)
    with pytest.raises(ValueError, match="and later, not 8"):
        tiles.attention_tile(80, 128, 2)
