"""Weights in blocks, bfloat16 or float16 have, in the kernels, the bits of the float32 numbers they stand for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dspark_kernels.blocks import BlockWeight
from dspark_kernels.native import Kernels
from dspark_kernels.packed import PackedWeight

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

SHAPES = [(5, 32), (33, 64), (100, 576), (70, 1536)]  # [outputs, inputs]
ROWS = (1, 2, 3, 4, 5, 8, 12, 13, 25, 48, 73, 90)  # beyond 72 every instruction set decodes panels first


def block_weight(rows: int, columns: int, bits: int, group: int, factor: float = 1.0) -> BlockWeight:
    """Random codes over their whole range; scales are float16 numbers as in files, some of them negative or zero, times
    a factor as in K-quants."""
    torch.manual_seed(rows * columns + bits + group)
    codes = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8)
    scales = (torch.randn(rows, columns // group) * 0.01).half().float() * factor
    scales[0] = 0
    minima = torch.randn(rows, columns // group).half().float()
    return BlockWeight(codes if bits == 4 else codes.view(torch.int8), scales, minima)


@pytest.mark.parametrize("factor", [1.0, 5.0])  # scales that are float16, and some that are not
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_have_the_bits_of_their_floats(
    kernels: Kernels, shape: tuple[int, int], bits: int, group: int, factor: float
) -> None:
    check(kernels, block_weight(*shape, bits, group, factor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), *SHAPES])
def test_half_the_bits_have_the_bits_of_their_floats(
    kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    check(kernels, torch.randn(shape).to(dtype))


def test_every_float16_is_widened_exactly(kernels: Kernels) -> None:
    """All of them, zeros, denormals, infinities and NaN with their signs, as outputs of one input of 1."""
    halves = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16)
    got = kernels.product(torch.ones(1, 1), PackedWeight(kernels, halves[:, None], None, False))[0]
    want = halves.float() + 0.0  # the sum begins at 0, which takes a zero's sign
    assert torch.equal(got.isnan(), want.isnan())
    numbers = ~want.isnan()
    assert torch.equal(got[numbers].view(torch.int32), want[numbers].view(torch.int32))


def check(kernels: Kernels, weight: BlockWeight | Tensor) -> None:
    floats = weight.dequantize() if isinstance(weight, BlockWeight) else weight.float()
    outputs, inputs = weight.shape
    bias, norm = torch.randn(outputs), torch.randn(inputs)
    for gated in {False, outputs % 2 == 0}:
        stored, plain = (PackedWeight(kernels, w, bias, gated) for w in (weight, floats))
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            assert torch.equal(kernels.product(x, stored), kernels.product(x, plain)), rows
            if inputs % kernels.lanes == 0:
                got = kernels.product(x, stored, norm, 1e-5)
                assert torch.equal(got, kernels.product(x, plain, norm, 1e-5)), rows


@pytest.mark.parametrize("bits", [4, 8])
def test_they_take_little_memory(kernels: Kernels, bits: int) -> None:
    """32 bits of scale and minimum per group, as in the file, and 64 where either is no float16 number."""
    weight = block_weight(64, 576, bits, 32)
    odd = weight.minima.clone()
    odd[-1, -1] = 1e6  # float16 ends at 65504
    for blocks, extra in ((weight, 1), (block_weight(64, 576, bits, 32, 5.0), 2), (replace(weight, minima=odd), 2)):
        assert PackedWeight(kernels, blocks, None, False).panels.nbytes == 64 * 576 * (bits + extra) // 8


def test_codes_lie_low_half_first() -> None:
    weight = BlockWeight(torch.tensor([[0x21, 0xF3]], dtype=torch.uint8), torch.ones(1, 2), torch.zeros(1, 2))
    assert weight.dequantize().tolist() == [[1, 2, 3, 15]]


def test_joining_changes_no_value() -> None:
    parts = [block_weight(6, 64, 4, 32), block_weight(10, 64, 8, 16), block_weight(4, 64, 4, 32)]
    joined = BlockWeight.cat(parts)
    assert (joined.bits, joined.group) == (8, 16)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    alike = BlockWeight.cat([parts[0], parts[2]])
    assert (alike.bits, alike.group) == (4, 32)


def test_eight_bits_are_off_by_half_a_step_at_most() -> None:
    """Of a scale that is a float16 wherever one is good enough, in groups of any size of number."""
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(3))
    weight *= torch.tensor([1.0, 1e-3, 0.0, 1e-9, 1e30, -5.0]).unsqueeze(1)
    blocks = BlockWeight.eight_bits(weight)
    assert (blocks.bits, blocks.group, blocks.shape) == (8, 32, weight.shape)
    assert int(blocks.codes.abs().max()) == 127
    groups = weight.view(6, 3, 32)
    off = (blocks.dequantize().view_as(groups) - groups).abs().amax(-1)
    step = groups.abs().amax(-1) / 127
    assert (off <= 0.51 * step + 127 * 2.0**-11 * step).all()
    assert (off[step > 0] > 0.2 * step[step > 0]).all()
    assert torch.equal(blocks.scales[[0, 5]], blocks.scales[[0, 5]].half().float())
    assert torch.equal(blocks.minima.signbit(), torch.ones_like(blocks.minima, dtype=torch.bool))
    # What is made of codes already loses nothing.
    again = BlockWeight.eight_bits(blocks.dequantize().bfloat16().float()[:1])
    assert torch.equal(again.codes.abs().amax(-1), torch.tensor([127], dtype=torch.int8))
    with pytest.raises(ValueError, match="groups of 32"):
        BlockWeight.eight_bits(torch.ones(2, 48))


@pytest.mark.parametrize("scales", [(3, 2), (4, 3), (4, 64)])
def test_parts_that_do_not_fit_are_refused(scales: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not fit a weight"):
        BlockWeight(torch.zeros(4, 64, dtype=torch.int8), torch.ones(scales), torch.ones(scales))


def test_other_types_are_refused(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match="scales and minima are float32"):
        BlockWeight(torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 2).half(), torch.ones(4, 2).half())
    with pytest.raises(ValueError, match="float32, bfloat16, float16 or blocks"):
        PackedWeight(kernels, torch.ones(4, 8, dtype=torch.float64), None, False)


@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_rows_come_back_out_of_the_panels(kernels: Kernels, factor: float) -> None:
    weight = block_weight(100, 64, 8, 32, factor)
    ids = torch.tensor([99, 0, 31, 32, 64, 7])
    rows = PackedWeight(kernels, weight, None, False).rows(ids)
    assert rows is not None
    for got, want in ((rows.codes, weight.codes), (rows.scales, weight.scales), (rows.minima, weight.minima)):
        assert torch.equal(got, want[ids])
    assert PackedWeight(kernels, block_weight(32, 64, 4, 32), None, False).rows(ids) is None


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "blocks"])
def test_a_part_of_a_weight_shares_its_memory(kernels: Kernels, storage: str) -> None:
    panel, generator = 2 * kernels.lanes, torch.Generator().manual_seed(1)
    outputs = 3 * panel + 5
    dense = torch.randn(outputs, 64, generator=generator)
    weight = block_weight(outputs, 64, 8, 32) if storage == "blocks" else dense.to(getattr(torch, storage))
    whole = PackedWeight(kernels, weight, torch.randn(outputs, generator=generator), False)
    x = torch.randn(3, 64, generator=generator)
    for start, stop in ((0, panel), (panel, 3 * panel), (2 * panel, outputs)):
        part = whole.part(start, stop)
        assert part is not None
        assert torch.equal(kernels.product(x, part), kernels.product(x, whole)[:, start:stop])
    assert whole.part(1, panel) is None
    assert whole.part(0, panel + 1) is None
