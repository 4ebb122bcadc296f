"""Norms, SwiGLU, rotation and the one call that joins them with attention, on the device against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gpu_device import ON_KERNELS, there
from test_interpreted_attention import RAGGED, Case, Heads
from test_interpreted_layers import DTYPES, ROPE_POSITIONS, close, randoms, table_of, turned

from dspark_kernels.triton import backend, norms, rope

pytestmark = ON_KERNELS
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Qwen3's


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 576, 1000, 2560, norms.MAX_WIDTH])
def test_rms_norm(dtype: torch.dtype, width: int) -> None:
    x, residual, weight = randoms(dtype, (5, width), (5, width), (width,))
    got, total = norms.rms_norm(there(x), there(weight), 1e-5, there(residual))
    assert torch.equal(total.cpu(), x + residual)  # rounded once, as the sum of two numbers is
    want = F.rms_norm((x + residual).double(), (width,), weight.double(), 1e-5)
    close(got.cpu(), want, DTYPES[dtype])
    for row in range(5):
        some = slice(row, row + 1)
        alone, _ = norms.rms_norm(there(x[some]), there(weight), 1e-5, there(residual[some]))
        assert torch.equal(alone, got[some])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 1000, 9728])
def test_swiglu(dtype: torch.dtype, width: int) -> None:
    (gate_up,) = randoms(dtype, (3, 2 * width))
    got = norms.swiglu(there(gate_up))
    close(got.cpu(), F.silu(gate_up[:, :width].double()) * gate_up[:, width:].double(), DTYPES[dtype])
    for row in range(3):
        assert torch.equal(norms.swiglu(there(gate_up[row : row + 1])), got[row : row + 1])


def test_gates_of_any_size() -> None:
    gates = torch.cat([torch.linspace(-80, 120, 801), torch.tensor([-1e30, 1e30, 0.0])])
    got = norms.swiglu(there(torch.cat([gates, torch.ones_like(gates)])[None])).cpu()
    torch.testing.assert_close(got[0], F.silu(gates.double()).float(), atol=1e-30, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_scatter(dtype: torch.dtype, normed: bool) -> None:
    tokens = 5
    q, k, v = randoms(dtype, (tokens, HEADS, HEAD_DIM), (tokens, KV_HEADS, HEAD_DIM), (tokens, KV_HEADS, HEAD_DIM))
    q_norm, k_norm = randoms(dtype, (HEAD_DIM,), (HEAD_DIM,))
    positions, slots = torch.tensor([0, 7, ROPE_POSITIONS - 1, 3, 3]), torch.tensor([17, 4, 31, 8, 16])
    table = table_of(HEAD_DIM, torch.float32)
    empty = torch.full((4, 8, KV_HEADS, HEAD_DIM), torch.nan, dtype=dtype)
    keys, values, new_q, new_k = there(empty), there(empty), there(q), there(k)
    rotary, store = there((positions, table)), (there(slots), keys, values)
    rope.rotate_and_keep(
        new_q, new_k, there(v), rotary, store, (there(q_norm), there(k_norm), 1e-6) if normed else None
    )
    close(new_q.cpu(), turned(q, positions, table, q_norm if normed else None), 2 * DTYPES[dtype])
    close(new_k.cpu(), turned(k, positions, table, k_norm if normed else None), 2 * DTYPES[dtype])
    flat_keys, flat_values = keys.cpu().view(32, KV_HEADS, HEAD_DIM), values.cpu().view(32, KV_HEADS, HEAD_DIM)
    assert torch.equal(flat_keys[slots], new_k.cpu())
    assert torch.equal(flat_values[slots], v)
    others = [slot for slot in range(32) if slot not in slots.tolist()]
    assert bool(flat_keys[others].isnan().all())
    assert bool(flat_values[others].isnan().all())


@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 3.0}, {"block": True}])
def test_one_call_does_what_its_parts_do(options: dict[str, object]) -> None:
    """Keys and values are written by one launch and read by the next: what is read has arrived."""
    block = bool(options.get("block"))
    shape = Heads(6, 2, 64, 64)
    rows = tuple((count, min(context, ROPE_POSITIONS - 1)) for count, context in RAGGED[:3])
    case = Case.make(shape, rows, torch.float32, block=block)
    positions = torch.cat([torch.arange(context - count, context) for _, count, context in case.rows.T.tolist()])
    row = torch.repeat_interleave(torch.arange(len(rows)), case.rows[1])
    slots = case.pages[row, positions // 16] * 16 + positions % 16
    keys, values = case.keys.clone(), case.values.clone()
    if not block:  # what the call is to write is not there before
        keys.view(-1, 2, 64)[slots], values.view(-1, 2, 64)[slots] = torch.nan, torch.nan
    table, weights = table_of(64, torch.float32), [torch.linspace(0.5, 2.0, 64), torch.linspace(2.0, 0.5, 64)]
    arguments = there([case.q, case.k, case.v, keys, values, slots, case.pages, case.rows])
    rotary, scaled = there((positions, table)), (*there(weights), 1e-6)
    got = backend.Kernels().attention(*arguments, scale=0.2, rotary=rotary, norms=scaled, **options)
    want_q, want_k = (turned(x, positions, table, w).float() for x, w in zip((case.q, case.k), weights, strict=True))
    wanted = replace(case, q=want_q, k=want_k)
    if not block:
        wanted.keys.view(-1, 2, 64)[slots], wanted.values.view(-1, 2, 64)[slots] = want_k, case.v
    want = wanted.want(scale=0.2, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got.cpu().double(), want, atol=5e-5, rtol=1e-5)


def test_argmax() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0], [torch.nan, 1.0, torch.nan], [-torch.inf] * 3])
    assert backend.Kernels().argmax(there(x)).tolist() == [1, 0, 0]
