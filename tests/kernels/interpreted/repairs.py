"""What Triton 3.9's interpreter gets wrong, put right for these tests.

It holds bfloat16 as raw uint16: casts to it cut instead of rounding to even, and products multiply the raw bits.
Arithmetic on bfloat16 is wrong too, and stays so: kernels compute in float32. And its products are a BLAS library's,
whose bits depend on where in a tile a row lies (seen on AMD processors); a tensor core's do not. Must not know: the
kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def apply() -> None:
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and to.scalar != tl.bfloat16:
            return cast(self, _widened(source), to)
        if to.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        return cast(self, source, to)

    def create_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        left, right = (_widened(part).data.astype(total.data.dtype) for part in (a, b))
        return TensorHandle(_product(left, right) + total.data, total.dtype.scalar)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [m, k] @ b [k, n], every element a sum of its own."""
    return np.einsum("mk,kn->mn", a, b, optimize=False)


def _rounded(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    to_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, to_even).astype(np.uint16)
