"""What Triton 3.9's interpreter gets wrong with bfloat16, put right for these tests: it holds bfloat16 as raw uint16.

Casts to it cut instead of rounding to even, and products multiply the raw bits. Arithmetic on bfloat16 is wrong too,
and stays so: kernels compute in float32. Must not know: the kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def apply() -> None:
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and to.scalar != tl.bfloat16:
            return cast(self, _widened(source), to)
        if to.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        return cast(self, source, to)

    def create_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        return dot(self, _widened(a), _widened(b), total, precision, imprecise)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    to_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, to_even).astype(np.uint16)
