"""Weights as the C++ kernels hold them: packed into panels, stored as they came, read as the float32 they stand for."""

from __future__ import annotations

import copy
import ctypes
from ctypes import c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dspark_kernels import huge_pages
from dspark_kernels.blocks import BlockWeight

if TYPE_CHECKING:
    from dspark_kernels.native import Kernels

# How a packed weight is stored, weights.h.
FLOAT32, BFLOAT16, FLOAT16, CODES4, CODES8, HALF_CODES4, HALF_CODES8 = range(7)
_STORAGE = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
STORED = tuple(_STORAGE)  # types of numbers that are read as they are


class _Source(ctypes.Structure):  # mirrors pack.cpp
    _fields_ = (
        *((name, c_void_p) for name in ("values", "scales", "minima")),
        *((name, c_int64) for name in ("storage", "group", "outputs", "inputs", "gated")),
    )


class Packed(ctypes.Structure):  # mirrors product.h
    _fields_ = (
        *((name, c_void_p) for name in ("panels", "bias")),
        *((name, c_int64) for name in ("storage", "group", "outputs", "inputs")),
    )


class PackedWeight:
    """A weight [outputs, inputs] laid out for the kernels, with its bias; `gated`: half gates, half their ups.

    float32, bfloat16, float16 or blocks: it is stored as it came, and read as the float32 it stands for.
    """

    def __init__(self, kernels: Kernels, weight: Tensor | BlockWeight, bias: Tensor | None, gated: bool) -> None:
        source, kept = _source(weight, gated)
        rows, self.inputs = weight.shape
        self.outputs = rows // 2 if gated else rows
        self.gated, self.storage, self.group = gated, source.storage, source.group
        self._lanes = kernels.lanes
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()
        self.panels = huge_pages.empty(kernels.library.dspark_packed_size(ctypes.byref(source)))
        self.panels_at, self.bias_at = self.panels.data_ptr(), pointer(self.bias)
        kernels.library.dspark_pack(ctypes.byref(source), self.panels_at)
        del kept

    def part(self, start: int, stop: int) -> PackedWeight | None:
        """Outputs from start to before stop as a weight that shares this one's memory, or None where panels are cut."""
        panel = 2 * self._lanes
        if self.gated or start % panel or (stop % panel and stop != self.outputs):
            return None
        part = copy.copy(self)
        part.outputs = stop - start
        part.panels_at += self.panels.nbytes // -(-self.outputs // panel) * (start // panel)
        part.bias_at = None if self.bias is None else self.bias.data_ptr() + 4 * start
        return part

    def rows(self, ids: Tensor) -> BlockWeight | None:
        """Outputs `ids` [n] as they were before packing; None unless they are blocks of 8-bit codes."""
        if self.storage not in (CODES8, HALF_CODES8) or self.gated:
            return None
        panel, group, dtype = 2 * self._lanes, self.group, torch.float32 if self.storage == CODES8 else torch.float16
        groups, both = self.inputs // group, 2 * panel * dtype.itemsize  # bytes of scales and minima
        stored = self.panels.view(-1, groups, both + panel * group)  # scales, minima, then codes input by input
        numbers = stored[:, :, :both].view(dtype).view(-1, groups, 2, panel)
        codes = stored[:, :, both:].view(torch.int8).view(-1, groups, group, panel)
        at, lane = ids // panel, ids % panel
        scales, minima = numbers[at, :, 0, lane].float(), numbers[at, :, 1, lane].float()
        return BlockWeight(codes[at, :, :, lane].flatten(1), scales, minima)

    @property
    def structure(self) -> Packed:
        """For the kernels; valid as long as this weight lives."""
        return Packed(self.panels_at, self.bias_at, self.storage, self.group, self.outputs, self.inputs)


def _source(weight: Tensor | BlockWeight, gated: bool) -> tuple[_Source, list[Tensor]]:
    """For pack.cpp, and the tensors whose memory it points into."""
    if isinstance(weight, BlockWeight):
        scales, minima = weight.scales, weight.minima
        halves = scales.half(), minima.half()
        small = torch.equal(halves[0].float(), scales) and torch.equal(halves[1].float(), minima)
        kept = [part.contiguous() for part in (weight.codes, *(halves if small else (scales, minima)))]
        storage = {(4, False): CODES4, (8, False): CODES8, (4, True): HALF_CODES4, (8, True): HALF_CODES8}[
            weight.bits, small
        ]
        group = weight.group
    elif weight.dtype in _STORAGE and weight.dim() == 2:
        kept = [weight.contiguous()]
        storage, group = _STORAGE[weight.dtype], weight.shape[1]
    else:
        raise ValueError(f"only matrices of float32, bfloat16, float16 or blocks can be packed, not {weight.dtype}")
    if not weight.shape[0] or not weight.shape[1]:
        raise ValueError(f"a weight without numbers cannot be packed: {list(weight.shape)}")
    if kept[0].device.type != "cpu":
        raise ValueError(f"only matrices in main memory can be packed, not on {kept[0].device}")
    pointers = [*(tensor.data_ptr() for tensor in kept), None, None][:3]
    return _Source(*pointers, storage, group, *weight.shape, gated), kept


def pointer(tensor: Tensor | None) -> int | None:
    """Of its first number, for the kernels."""
    return None if tensor is None else tensor.data_ptr()
