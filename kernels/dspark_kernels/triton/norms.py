"""RMSNorm with the residual that comes before it, and SwiGLU: one program per row or piece of one, float32 inside.

Zhang and Sennrich 2019 (RMSNorm), Shazeer 2020 (SwiGLU). Must not know: what the rows are for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 16384  # a row is held in registers
SWIGLU_BLOCK = 1024


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [rows, width], rows x_stride apart
    residual_ptr,  # [rows, width] contiguous; not read without HAS_RESIDUAL
    weight_ptr,  # [width]
    sum_ptr,  # [rows, width] contiguous, written with HAS_RESIDUAL
    out_ptr,  # [rows, width] contiguous, written
    width,
    x_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + column, rounded, mask=mask)
        x = rounded.to(tl.float32)  # the norm is that of the sum as it is kept
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_kernel(
    gate_up_ptr,  # [rows, 2 * width], rows `stride` apart: gates, then ups
    out_ptr,  # [rows, width] contiguous, written
    width,
    stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + width + column, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up  # exp overflows to infinity for gates far below 0, which gives 0
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Norm of h = x + residual over the last dimension, times weight -> (norm, h), both [rows, width] in x's dtype.

    x [rows, width], columns adjacent; residual likewise, contiguous; weight [width]. Without a residual h is x itself.
    float32, bfloat16 or float16. Raises ValueError for shapes that do not fit and rows wider than MAX_WIDTH.
    """
    rows, width = x.shape
    if x.stride(1) != 1 or weight.shape != (width,) or width > MAX_WIDTH:
        raise ValueError(
            f"x {list(x.shape)} does not fit a weight {list(weight.shape)}, or is too wide or not row-major"
        )
    if residual is not None and (residual.shape != x.shape or not residual.is_contiguous()):
        raise ValueError(f"a residual must be {list(x.shape)} and contiguous, not {list(residual.shape)}")
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    if rows:
        block = triton.next_power_of_2(width)
        rms_norm_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight,
            total,
            out,
            width,
            x.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            enable_fp_fusion=True,
        )
    return out, total


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [rows, 2 * width], gates first, columns adjacent -> [rows, width] in its dtype.

    float32, bfloat16 or float16. Raises ValueError for an odd width.
    """
    rows, both = gate_up.shape
    if both % 2 or gate_up.stride(1) != 1:
        raise ValueError(f"gates and ups must be row-major and equally many, not {list(gate_up.shape)}")
    width = both // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows and width:
        swiglu_kernel[(rows, triton.cdiv(width, SWIGLU_BLOCK))](
            gate_up, out, width, gate_up.stride(0), BLOCK=SWIGLU_BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return out
