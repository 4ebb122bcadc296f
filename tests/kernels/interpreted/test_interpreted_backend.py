"""The kernels behind the C++ interface: norms, rotation, scatter and attention in one call, against float64."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from fence import fenced
from test_interpreted_attention import RAGGED, Case, Heads
from test_interpreted_layers import table_of, turned

from dspark_kernels import native
from dspark_kernels.triton import backend

SHAPE = Heads(6, 2, 32, 48)
KERNELS = backend.Kernels()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 3.0}, {"block": True}])
def test_one_call_does_what_its_parts_do(prepared: bool, options: dict[str, object]) -> None:
    block = bool(options.get("block"))
    rows = tuple((count, min(context, 39)) for count, context in RAGGED[:3])
    case = Case.make(SHAPE, rows, torch.float32, block=block)
    spans = case.rows.T.tolist()
    positions = torch.cat([torch.arange(context - count, context) for _, count, context in spans])
    row = torch.repeat_interleave(torch.arange(len(rows)), case.rows[1])
    slots = case.pages[row, positions // 16] * 16 + positions % 16
    keys, values = case.keys.clone(), case.values.clone()
    if not block:  # what the call is to write is not there before
        keys.view(-1, 2, 32)[slots], values.view(-1, 2, 48)[slots] = torch.nan, torch.nan
    keys, values = fenced(keys), fenced(values)
    table, weights = table_of(32, torch.float32), [torch.linspace(0.5, 2.0, 32), torch.linspace(2.0, 0.5, 32)]
    q, k = case.q.clone(), case.k.clone()
    got = KERNELS.attention(
        q,
        k,
        case.v,
        keys,
        values,
        slots,
        case.pages,
        case.rows,
        scale=0.2,
        rotary=None if prepared else (positions, table),
        norms=None if prepared else (*weights, 1e-6),
        **options,  # type: ignore[arg-type]
    )
    if prepared:
        assert torch.equal(q, case.q)
        want_q, want_k = case.q, case.k
    else:
        want_q, want_k = (
            turned(x, positions, table, w).float() for x, w in ((case.q, weights[0]), (case.k, weights[1]))
        )
    wanted = replace(case, q=want_q, k=want_k)
    if not block:
        wanted.keys.view(-1, 2, 32)[slots], wanted.values.view(-1, 2, 48)[slots] = want_k, case.v
        torch.testing.assert_close(keys, wanted.keys, equal_nan=True, atol=1e-5, rtol=1e-5)
    want = wanted.want(scale=0.2, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


def test_it_is_called_as_the_native_kernels_are() -> None:
    for name in ("attention", "attends", "argmax"):
        ours, theirs = (inspect.signature(getattr(owner, name)) for owner in (backend.Kernels, native.Kernels))
        assert ours == theirs, name


def test_argmax_and_widths() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0], [torch.nan, 1.0, torch.nan], [-torch.inf] * 3])
    assert KERNELS.argmax(x).tolist() == [1, 0, 0]
    assert KERNELS.attends(80, 512)
    assert not KERNELS.attends(81, 81)
    assert not KERNELS.attends(576, 512)
