"""Norms, SwiGLU, RoPE and the scatter of K/V against float64 arithmetic, with NaN wherever nothing may be read."""

from __future__ import annotations

import faulthandler
import os
import signal

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fence import fenced
from torch import Tensor

from dspark_kernels.triton import norms, rope

DTYPES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # half an ulp of the largest values and some
ROPE_POSITIONS = 40


def randoms(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), want, rtol=2 * tolerance, atol=tolerance)


def apart(x: Tensor) -> Tensor:
    """The same values in rows with NaN between them."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=x.dtype)
    wide[:, 2:-3] = x
    return wide[:, 2:-3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 576, 1000, 4096])
@pytest.mark.parametrize("rows", [1, 5])
def test_rms_norm(dtype: torch.dtype, width: int, rows: int) -> None:
    x, residual, weight = randoms(dtype, (rows, width), (rows, width), (width,))
    got, total = norms.rms_norm(fenced(x), fenced(weight), 1e-5, fenced(residual))
    assert torch.equal(total, x + residual)  # rounded once, as the sum of two numbers is
    close(got, F.rms_norm(total.double(), (width,), weight.double(), 1e-5), DTYPES[dtype])
    assert torch.equal(got, norms.rms_norm(total, weight, 1e-5)[0])  # the norm of what is kept, not of what was
    plain, same = norms.rms_norm(apart(x), weight, 1e-5)
    assert same.data_ptr() != plain.data_ptr()
    close(plain, F.rms_norm(x.double(), (width,), weight.double(), 1e-5), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 96, 1000, 2050])
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    (gate_up,) = randoms(dtype, (3, 2 * width))
    want = F.silu(gate_up[:, :width].double()) * gate_up[:, width:].double()
    close(norms.swiglu(fenced(gate_up)), want, DTYPES[dtype])
    assert torch.equal(norms.swiglu(apart(gate_up)), norms.swiglu(gate_up))


def test_gates_of_any_size() -> None:
    gates = torch.cat([torch.linspace(-120, 120, 801), torch.tensor([-1e30, 1e30, 0.0])])
    got = norms.swiglu(torch.cat([gates, torch.ones_like(gates)])[None])
    torch.testing.assert_close(got[0], F.silu(gates.double()).float(), atol=1e-34, rtol=1e-6)


def test_bits_of_a_row_are_its_own() -> None:
    x, residual, weight = randoms(torch.bfloat16, (6, 1000), (6, 1000), (1000,))
    together, _ = norms.rms_norm(x, weight, 1e-5, residual)
    gated = norms.swiglu(x)
    for row in range(6):
        some = slice(row, row + 1)
        assert torch.equal(norms.rms_norm(x[some], weight, 1e-5, residual[some])[0], together[some])
        assert torch.equal(norms.swiglu(x[some]), gated[some])


def table_of(head_dim: int, dtype: torch.dtype) -> Tensor:
    """Cosines and signed sines, [positions, 2, head_dim]."""
    speed = 1000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(ROPE_POSITIONS)[:, None] * speed
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], dim=1).to(dtype)


def turned(x: Tensor, positions: Tensor, table: Tensor, weight: Tensor | None) -> Tensor:
    x, angles = x.double(), table[positions].double()
    if weight is not None:
        x = F.rms_norm(x, weight.shape, weight.double(), 1e-6)
    return x * angles[:, :1] + x.roll(x.shape[2] // 2, -1) * angles[:, 1:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"), [(9, 3, 64, 64), (4, 4, 80, 48), (17, 1, 2, 6)]
)
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_scatter(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, value_dim: int, normed: bool
) -> None:
    tokens = 5
    q, k, v = randoms(dtype, (tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, value_dim))
    q_norm, k_norm = randoms(dtype, (head_dim,), (head_dim,))
    positions, slots = torch.tensor([0, 7, 39, 3, 3]), torch.tensor([17, 4, 31, 8, 16])
    table = fenced(table_of(head_dim, torch.float32))
    keys = fenced(torch.full((4, 8, kv_heads, head_dim), torch.nan, dtype=dtype))
    values = fenced(torch.full((4, 8, kv_heads, value_dim), torch.nan, dtype=dtype))
    new_q, new_k = fenced(q), fenced(k)
    rope.rotate_and_keep(
        new_q, new_k, fenced(v), (positions, table), (slots, keys, values), (q_norm, k_norm, 1e-6) if normed else None
    )
    close(new_q, turned(q, positions, table, q_norm if normed else None), 2 * DTYPES[dtype])
    close(new_k, turned(k, positions, table, k_norm if normed else None), 2 * DTYPES[dtype])
    flat_keys, flat_values = keys.view(32, kv_heads, head_dim), values.view(32, kv_heads, value_dim)
    assert torch.equal(flat_keys[slots], new_k)
    assert torch.equal(flat_values[slots], v)
    others = [slot for slot in range(32) if slot not in slots.tolist()]
    assert bool(flat_keys[others].isnan().all())
    assert bool(flat_values[others].isnan().all())


def test_parts_of_one_product_are_rotated_in_place() -> None:
    """Queries, keys and values as a fused projection lays them out; a block keeps nothing."""
    (qkv,) = randoms(torch.bfloat16, (3, 8 + 2 + 2, 64))
    positions, table = torch.tensor([5, 6, 7]), table_of(64, torch.bfloat16)
    before = qkv.clone()
    rope.rotate_and_keep(qkv[:, :8], qkv[:, 8:10], qkv[:, 10:], (positions, table), None)
    q, k = before[:, :8].contiguous(), before[:, 8:10].contiguous()
    rope.rotate_and_keep(q, k, before[:, 10:], (positions, table), None)
    assert torch.equal(qkv, torch.cat([q, k, before[:, 10:]], dim=1))
    assert not torch.equal(qkv, before)
    for row in range(3):  # and a token alone has the same bits
        some = slice(row, row + 1)
        one = before[some].clone()
        rope.rotate_and_keep(one[:, :8], one[:, 8:10], one[:, 10:], (positions[some], table), None)
        assert torch.equal(one, qkv[some])


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(ValueError, match="does not fit a weight"):
        norms.rms_norm(x, weight[:7], 1e-5)
    with pytest.raises(ValueError, match="too wide"):
        norms.rms_norm(torch.zeros(1, 20000), torch.zeros(20000), 1e-5)
    with pytest.raises(ValueError, match="a residual must be"):
        norms.rms_norm(x, weight, 1e-5, x[:1])
    with pytest.raises(ValueError, match="equally many"):
        norms.swiglu(torch.zeros(2, 7))
    assert norms.swiglu(torch.zeros(0, 8)).shape == (0, 4)
    q, k, v = torch.zeros(2, 4, 8), torch.zeros(2, 1, 8), torch.zeros(2, 1, 8)
    positions, table = torch.zeros(2, dtype=torch.int64), torch.zeros(4, 2, 8)
    pages = torch.zeros(2, 4, 1, 8)
    for arguments, message in (
        ((q, k[:1], v, (positions, table), None), "do not fit"),
        ((q, k.half(), v, (positions, table), None), "of one dtype"),
        ((q, k, v, (positions[:1], table), None), "positions must be 2"),
        ((q, k, v, (positions, table[:, :, :4]), None), "the table must be"),
        ((q, k, v, (positions, table), (positions[:1], pages, pages)), "slots must be 2"),
        ((q, k, v, (positions, table), (positions, pages[..., :4], pages)), "do not fit the pages"),
        ((q, k, v, None, None, (weight, weight[:4], 1e-6)), "norms of heads"),
    ):
        with pytest.raises(ValueError, match=message):
            rope.rotate_and_keep(*arguments)  # type: ignore[arg-type]


@triton.jit
def peek_kernel(x, out, at):
    tl.store(out, tl.load(x + at))


@pytest.mark.parametrize(
    ("at_start", "at", "signal_number"), [(False, 24, signal.SIGSEGV), (True, -1, signal.SIGSEGV), (False, 23, 0)]
)
def test_a_kernel_that_reads_past_a_fence_crashes(at_start: bool, at: int, signal_number: int) -> None:
    """What all these tests rely on: one number beyond a tensor ends the process."""
    x, out = fenced(torch.ones(3, 8), at_start), torch.zeros(1)
    child = os.fork()
    if not child:
        faulthandler.disable()
        peek_kernel[(1,)](x, out, at)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal_number
