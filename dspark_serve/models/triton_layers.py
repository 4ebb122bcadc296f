"""Linears with what surrounds them where tensors are on a GPU: torch's products, and Triton kernels between them.

Must not know: which model they are part of, attention, the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_kernels.blocks import BlockWeight
from dspark_kernels.triton import backend, norms
from dspark_serve.models.layers import Affine, Finish, Linear, PlainLinear, RMSNorm, Weight


class TritonOperations:
    """Norms, with the sum before them, and SwiGLU are one kernel each; products are torch's."""

    choice = "triton"
    library = None

    def __init__(self, dtype: torch.dtype) -> None:
        self.attention = backend.Kernels()
        self.name = f"triton {str(dtype).removeprefix('torch.')}"

    def linear(self, weight: Weight, bias: Tensor | None = None, norm: RMSNorm | None = None) -> Linear:
        linear = _plain(weight, bias)
        return linear if norm is None else lambda x: linear(norms.rms_norm(x, norm.weight, norm.eps)[0])

    def finish(self, out: Affine, norm: RMSNorm, gate_up: Affine, down: Affine) -> Finish:
        first, inner, last = (_plain(*affine) for affine in (out, gate_up, down))

        def finish(attended: Tensor, hidden: Tensor) -> Tensor:
            normed, hidden = norms.rms_norm(first(attended), norm.weight, norm.eps, hidden)
            return hidden + last(norms.swiglu(inner(normed)))

        return finish


def _plain(weight: Weight, bias: Tensor | None) -> PlainLinear:
    return PlainLinear(weight.dequantize() if isinstance(weight, BlockWeight) else weight, bias)
