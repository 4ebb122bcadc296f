"""The C++ kernels at their edges: any shape and alignment, nonsense in a row beside others, threads, nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dspark_kernels import noise
from dspark_kernels.native import Kernels
from dspark_kernels.packed import STORED, PackedWeight

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from helpers import INSTRUCTION_SETS, load_kernels

NONSENSE = [float("nan"), float("inf"), float("-inf"), 3e38]
THREADS = (1, 2, 3, 7, 64)
HEADS, KV_HEADS, DIM = 6, 2, 32
PAGE = 5


def shifted(x: Tensor, floats: int) -> Tensor:
    """The same numbers, `floats` behind the start of a block of memory."""
    room = x.new_empty(x.numel() + floats)
    room[floats:] = x.flatten()
    return room[floats:].view(x.shape)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_product_of_any_shape_and_alignment(isa: str) -> None:
    """Against float64, and every row with the bits it has alone and in aligned memory."""
    kernels = load_kernels(isa)

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(
        outputs=st.integers(1, 70),
        inputs=st.integers(1, 70),
        rows=st.integers(0, 20),
        offset=st.integers(0, 17),
        gated=st.booleans(),
        dtype=st.sampled_from(STORED),
        seed=st.integers(0, 1 << 30),
    )
    def check(outputs: int, inputs: int, rows: int, offset: int, gated: bool, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        whole = outputs * (2 if gated else 1)
        weight, x, bias = (torch.randn(s, generator=generator) for s in ((whole, inputs), (rows, inputs), (whole,)))
        weight = weight.to(dtype)
        packed = PackedWeight(kernels, weight, shifted(bias, offset), gated)
        assert packed.bias is not None
        residual = None if gated else torch.randn(rows, outputs, generator=generator)
        got = kernels.product(shifted(x, offset), packed, residual=None if residual is None else shifted(residual, 1))
        want = x.double() @ weight.double().T + bias
        gates, ups = want[:, :outputs], want[:, outputs:]
        want = torch.nn.functional.silu(gates) * ups if residual is None else want + residual
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
        for row in range(rows):
            own = None if residual is None else residual[row : row + 1]
            assert torch.equal(kernels.product(x[row : row + 1].clone(), packed, residual=own), got[row : row + 1])

    check()


def attend(
    kernels: Kernels,
    spans: list[tuple[int, int]],
    spoil: dict[int, float] | None = None,
    offset: int = 0,
    **options: object,
) -> list[Tensor]:
    """Attention of rows [(queries, keys)], normed and rotated, over scrambled pages; per row [queries, HEADS, DIM].

    spoil: by row, a number put into its first query and its newest key and value. A row holds what its place says.
    """
    needed = [-(-keys // PAGE) for _, keys in spans]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(len(spans))).tolist()
    keys, values = torch.zeros(2, len(order) + 1, PAGE, KV_HEADS, DIM)
    pages = torch.zeros(len(spans), max([1, *needed]), dtype=torch.int64)
    parts = [torch.empty(0, HEADS + 2 * KV_HEADS, DIM)]
    slots, positions = [], []
    for row, (queries, context) in enumerate(spans):
        pages[row, : needed[row]] = torch.tensor([order.pop() + 1 for _ in range(needed[row])])
        generator = torch.Generator().manual_seed(row)
        slot = [int(pages[row, at // PAGE]) * PAGE + at % PAGE for at in range(context)]
        past = torch.randn(2, context, KV_HEADS, DIM, generator=generator)
        keys.view(-1, KV_HEADS, DIM)[slot], values.view(-1, KV_HEADS, DIM)[slot] = past
        new = torch.randn(queries, HEADS + 2 * KV_HEADS, DIM, generator=generator)
        if spoil and row in spoil:
            new[0, 0, 3] = new[-1, HEADS, 1] = new[-1, -1, 7] = spoil[row]
        parts.append(new)
        slots += slot[context - queries :]
        positions += range(context - queries, context)
    together = shifted(torch.cat(parts), offset)
    counts = torch.tensor(spans, dtype=torch.int64).view(-1, 2)
    rows = torch.stack([counts[:, 0].cumsum(0) - counts[:, 0], counts[:, 0], counts[:, 1]])
    table = torch.randn(128, 2, DIM, generator=torch.Generator().manual_seed(9))
    norms = (shifted(torch.linspace(0.5, 1.5, DIM), offset), torch.linspace(1.5, 0.5, DIM), 1e-5)
    q, k, v = together.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    at = (torch.tensor(slots, dtype=torch.int64), pages, rows)
    rotary = (torch.tensor(positions, dtype=torch.int64), shifted(table, offset))
    out = kernels.attention(
        q, k, v, shifted(keys, offset), shifted(values, offset), *at, scale=0.2, rotary=rotary, norms=norms, **options
    )  # type: ignore[arg-type]
    return list(out.split(counts[:, 0].tolist()))


SPANS = [(1, 1), (3, 40), (17, 17), (1, 33), (20, 61)]
OPTIONS = [{}, {"window": 7}, {"block": True}, {"softcap": 3.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window", "block", "softcap"])
def test_nonsense_in_a_row_of_attention_stays_there(kernels: Kernels, options: dict[str, object]) -> None:
    clean = attend(kernels, SPANS, **options)
    assert all(bool(row.isfinite().all()) for row in clean)
    for what in NONSENSE:
        for row in range(len(SPANS)):
            dirty = attend(kernels, SPANS, {row: what}, **options)
            assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(clean, dirty, strict=True)) if i != row)
            assert not torch.equal(clean[row], dirty[row])


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window", "block", "softcap"])
@pytest.mark.usefixtures("threads")
def test_attention_has_the_same_bits_for_any_threads_and_alignment(
    kernels: Kernels, options: dict[str, object]
) -> None:
    torch.set_num_threads(1)
    want = attend(kernels, SPANS, **options)
    for count in THREADS:
        torch.set_num_threads(count)
        for offset in (0, 1, 7):
            got = attend(kernels, SPANS, offset=offset, **options)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (count, offset)


@pytest.mark.usefixtures("threads")
def test_draws_of_rows_of_nonsense_are_tokens_and_leave_the_others_alone(kernels: Kernels) -> None:
    rows, width = 12, 300
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor([0.0, 1.0, 0.3, 2.0] * 3)
    seed, position = torch.arange(rows) * 31, torch.arange(rows) + 5

    def draw(x: Tensor) -> Tensor:
        return kernels.draw(x, temperature, seed, position, noise.GUMBEL, 1e-5)

    clean = draw(logits)
    for what in NONSENSE:
        dirty = logits.clone()
        dirty[3], dirty[6, 70:] = what, what
        for count in THREADS:
            torch.set_num_threads(count)
            got = draw(shifted(dirty, 1))
            others = [row for row in range(rows) if row not in (3, 6)]
            assert torch.equal(got[others], clean[others])
            assert 0 <= int(got.min()) <= int(got.max()) < width
            assert torch.equal(kernels.argmax(dirty), dirty.argmax(-1))


def test_denormals_are_kept_through_norm_and_attention(kernels: Kernels) -> None:
    """Not flushed to zero: sums of them have the bits of the same sums a power of two larger."""
    tiny, x = torch.full((1, 16), 2.0**-140), torch.arange(1.0, 17.0)[None]
    got = kernels.product(x, PackedWeight(kernels, tiny, None, False))
    assert got.item() == 136 * 2.0**-140
    normed = kernels.product(
        x * 2.0**-140, PackedWeight(kernels, torch.eye(16), None, False), torch.ones(16), 2.0**-149
    )
    assert 0 < float(normed.min()) < float(normed.max())


def test_nothing_gives_nothing(kernels: Kernels) -> None:
    packed = PackedWeight(kernels, torch.ones(5, 16), None, False)
    assert kernels.product(torch.ones(0, 16), packed, torch.ones(16), 1e-5).shape == (0, 5)
    assert kernels.argmax(torch.ones(0, 9)).shape == (0,)
    none = torch.zeros(0, dtype=torch.int64)
    assert kernels.draw(torch.ones(0, 9), torch.ones(0), none, none, noise.GUMBEL, 1e-5).shape == (0,)
    assert attend(kernels, []) == []
    with_empty = attend(kernels, [(3, 40), (0, 7), (2, 2)])  # a row of keys nobody asks about
    assert [len(row) for row in with_empty] == [3, 0, 2]
    assert torch.equal(with_empty[0], attend(kernels, [(3, 40)])[0])


def test_what_the_kernels_cannot_hold_is_refused(kernels: Kernels) -> None:
    for shape in ((0, 8), (8, 0)):
        with pytest.raises(ValueError, match="without numbers"):
            PackedWeight(kernels, torch.ones(shape), None, False)
    odd = PackedWeight(kernels, torch.ones(4, 9), None, False)
    with pytest.raises(ValueError, match="norm of 9 does not fill vectors"):
        kernels.product(torch.ones(2, 9), odd, torch.ones(9), 1e-5)
    x, store, at = torch.ones(1, 1, 9), torch.ones(1, 4, 1, 9), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="heads of 9 and 9 do not fill vectors"):
        kernels.attention(x, x, x, store, store, at, at[None], torch.tensor([[0], [1], [1]]), scale=1.0)
    with pytest.raises(ValueError, match="no tokens to choose from"):
        kernels.argmax(torch.ones(2, 0))
    with pytest.raises(ValueError, match="no tokens to choose from"):
        kernels.draw(torch.ones(1, 0), torch.ones(1), at, at, noise.GUMBEL, 1e-5)
