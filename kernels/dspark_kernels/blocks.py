"""Weights kept as integer codes in groups with a scale and a minimum each: what GGUF's block formats come down to.

weight = code * scale + minimum, computed in float32. GGUF's scales have few enough bits for the product to be exact, so
that it does not matter whether the sum is fused. Must not know: files, models, how a product is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockWeight:
    """A matrix [outputs, inputs]. Raises ValueError where the parts do not fit each other."""

    codes: Tensor  # int8 [outputs, inputs], or uint8 [outputs, inputs / 2] with two below 16, the first in the low half
    scales: Tensor  # [outputs, inputs / group] float32
    minima: Tensor  # likewise; -0.0 where a format has none: adding it changes nothing, not even the sign of a zero

    def __post_init__(self) -> None:
        if self.codes.dtype not in (torch.int8, torch.uint8) or self.codes.dim() != 2:
            raise ValueError(f"codes are a matrix of bytes, not {self.codes.dtype} {list(self.codes.shape)}")
        for values in (self.scales, self.minima):
            if values.dtype != torch.float32 or values.shape != self.scales.shape or values.dim() != 2:
                raise ValueError(f"scales and minima are float32 matrices, not {values.dtype} {list(values.shape)}")
        groups = self.scales.shape[1]
        if self.scales.shape[0] != self.shape[0] or not groups or self.shape[1] % groups or self.group % 2:
            raise ValueError(f"scales {list(self.scales.shape)} do not fit a weight {list(self.shape)}")

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def shape(self) -> torch.Size:
        rows, columns = self.codes.shape
        return torch.Size((rows, columns * 8 // self.bits))

    @property
    def group(self) -> int:
        """Adjacent inputs that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.minima.nbytes

    def numbers(self) -> Tensor:
        """The codes as int8 [outputs, inputs]."""
        if self.bits == 8:
            return self.codes
        return torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(1).view(torch.int8)

    def dequantize(self) -> Tensor:
        """[outputs, inputs] float32."""
        grouped = self.numbers().float().view(*self.scales.shape, self.group)
        return grouped.mul_(self.scales.unsqueeze(2)).add_(self.minima.unsqueeze(2)).view(self.shape)

    def rows(self, index: Tensor | slice) -> BlockWeight:
        """The outputs `index` names, in that order."""
        return BlockWeight(self.codes[index], self.scales[index], self.minima[index])

    @staticmethod
    def eight_bits(weight: Tensor, group: int = 32) -> BlockWeight:
        """The nearest codes of 8 bits to a matrix [outputs, inputs] of floats, as Q8_0: off by half a scale, which
        is the group's largest magnitude / 127. ValueError where `group` does not divide the inputs."""
        if weight.shape[1] % group:
            raise ValueError(f"{weight.shape[1]} inputs cannot be cut into groups of {group}")
        grouped = weight.float().reshape(len(weight), -1, group)
        largest = grouped.abs().amax(-1) / 127
        halves = largest.half().float()  # where they are as good: half the bytes
        scales = torch.where((halves >= torch.finfo(torch.float16).tiny) & halves.isfinite(), halves, largest)
        codes = (grouped / scales.unsqueeze(-1)).nan_to_num_(0.0).round_().clamp_(-127, 127)  # of zeros: NaN
        return BlockWeight(codes.flatten(1).to(torch.int8), scales, torch.full_like(scales, -0.0))

    @staticmethod
    def cat(parts: Sequence[BlockWeight]) -> BlockWeight:
        """One weight of all outputs, in the widest codes and smallest groups among the parts; no value changes."""
        group, bits = min(part.group for part in parts), max(part.bits for part in parts)
        return BlockWeight(
            torch.cat([part.codes if part.bits == bits else part.numbers() for part in parts]),
            torch.cat([part.scales.repeat_interleave(part.group // group, dim=1) for part in parts]),
            torch.cat([part.minima.repeat_interleave(part.group // group, dim=1) for part in parts]),
        )
