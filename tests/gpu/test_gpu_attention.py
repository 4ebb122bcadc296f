"""Ragged paged attention on the device, against float64 on the CPU; a row's bits are its own."""

from __future__ import annotations

import pytest
import torch
from gpu_device import ON_KERNELS, REHEARSAL
from test_interpreted_attention import (
    Case,
    Heads,
    check,
    # The interpreted tests themselves, with their tensors on the device: see conftest.py.
    test_a_block_sees_itself_in_both_directions,  # noqa: F401
    test_a_capped_block_with_sinks,  # noqa: F401
    test_bits_of_a_row_are_its_own,  # noqa: F401
    test_heads_of_many_shapes,  # noqa: F401
    test_pages_of_any_size,  # noqa: F401
    test_ragged_rows,  # noqa: F401
    test_sinks_take_probability,  # noqa: F401
    test_windows_and_caps,  # noqa: F401
)

pytestmark = ON_KERNELS
QWEN3_4B = Heads(heads=32, kv_heads=8, head_dim=128, value_dim=128)
LONG = 150 if REHEARSAL else 4000
ROWS = ((1, LONG), (8, LONG // 2 + 3), (1, 1), (LONG // 4, LONG // 4), (3, 17))


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_a_real_model(dtype: torch.dtype, block: bool) -> None:
    """Decoding, verification and prompts in one launch, as long as requests are."""
    rows = ROWS[:3] if block else ROWS
    check(Case.make(QWEN3_4B, rows, dtype, block=block), block=block)


def test_bits_of_a_row_are_its_own_at_real_lengths() -> None:
    case = Case.make(QWEN3_4B, ROWS, torch.bfloat16)
    together = case.run()
    for row, (first, count, context) in enumerate(case.rows.T.tolist()):
        for start, stop in ((0, count), (count - 1, count)):
            some = slice(first + start, first + stop)
            span = torch.tensor([[0], [stop - start], [context - count + stop]])
            q, k, v = (x[some] for x in (case.q, case.k, case.v))
            alone = Case(q, k, v, case.keys, case.values, case.pages[row : row + 1], span)
            assert torch.equal(alone.run(), together[some]), (row, start)


def test_the_same_launch_has_the_same_bits() -> None:
    """A race shows as a difference sooner or later."""
    case = Case.make(QWEN3_4B, ROWS, torch.bfloat16)
    first = case.run()
    for _ in range(2 if REHEARSAL else 20):
        assert torch.equal(case.run(), first)
