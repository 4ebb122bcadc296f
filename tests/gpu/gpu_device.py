"""Where these tests run, and how tensors get there: between margins of poison that nobody may read or write.

With TRITON_INTERPRET=1 the same tests run on CPU tensors, smaller: a rehearsal that shows that they can pass.
"""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
_HAS_GPU = torch.cuda.is_available()
_MODERN = REHEARSAL or (_HAS_GPU and torch.cuda.get_device_capability() >= (9, 0))
_MARGIN = 2048  # elements; a multiple of every alignment a kernel may count on
_POISON = 1 << 40  # as an index it leads far out of any allocation

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSAL or _HAS_GPU), reason="needs a CUDA GPU"),
]
ON_KERNELS = [
    *ON_GPU,
    pytest.mark.skipif(
        not _MODERN, reason="needs a CUDA GPU of compute capability 9.0 or later, which the kernels are made for"
    ),
]
_lent: list[tuple[Tensor, Tensor]] = []  # flat buffer with margins, and its middle


def there(x: Any) -> Any:
    """A copy on the device of a tensor, or of all tensors in a list, tuple, dict or dataclass."""
    if isinstance(x, Tensor):
        return _surrounded(x)
    if isinstance(x, dict):
        return {name: there(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(there(value) for value in x)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: there(getattr(x, field.name)) for field in fields(x)})
    return x


def _poison(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else min(_POISON, torch.iinfo(dtype).max)


def _surrounded(x: Tensor) -> Tensor:
    flat = torch.full((x.numel() + 2 * _MARGIN,), _poison(x.dtype), dtype=x.dtype, device=DEVICE)
    middle = flat[_MARGIN : _MARGIN + x.numel()]
    middle.copy_(x.flatten())
    _lent.append((flat, middle))
    return middle.view(x.shape)


def check_margins() -> None:
    """That nobody wrote beside a tensor lent by `there`; forgets them all."""
    while _lent:
        flat, middle = _lent.pop()
        for margin in (flat[:_MARGIN], flat[_MARGIN + middle.numel() :]):
            if flat.dtype.is_floating_point:
                assert bool(margin.isnan().all()), "a kernel wrote beside a tensor"
            else:
                assert bool((margin == int(_poison(flat.dtype))).all()), "a kernel wrote beside a tensor"
