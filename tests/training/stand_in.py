"""A pretended device with real numbers: tensors that say they are on "meta", and compute in main memory.

Inside `stand_in()` whatever is made on or moved to DEVICE is there, and an operation on tensors of both places fails as
it would with a GPU, for which this stands: only copies, and single numbers beside arrays, may cross. It is stricter in
one thing, indices in main memory, which CUDA copies silently at every use.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class ThereTensor(Tensor):
    """A tensor on the pretended device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> ThereTensor:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        out.inner = inner
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:  # torch has none for subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """DEVICE, usable as long as the context lasts."""
    # The fused optimiser has a list of devices; its operation itself comes through here.
    optimizer = importlib.import_module("torch.optim.optimizer")
    known = optimizer._get_fused_kernels_supported_devices
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*known(), DEVICE.type])
    # torch.tensor alone knows "meta" by itself and would make a tensor without numbers.
    made = torch.tensor
    monkeypatch.setattr(
        torch, "tensor", lambda *data, device=None, **options: made(*data, **options).to(device or "cpu")
    )
    # Under inference_mode operations come whole, and views of such tensors are refused: no_grad computes the same.
    monkeypatch.setattr(torch.inference_mode, "__enter__", _enter)
    loaded = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *file, map_location=None, **options: _to(map_location, loaded(*file, **options))
    )
    with _Mode():
        yield DEVICE


def _enter(mode: Any) -> None:
    mode._inference_mode_context = torch.no_grad()  # what __exit__ leaves
    mode._inference_mode_context.__enter__()


def _to(place: Any, loaded: Any) -> Any:
    """What was saved on DEVICE comes back there, as torch.load has it, unless a place is given."""
    return tree_map(lambda x: x.to(place) if isinstance(x, Tensor) and place is not None else x, loaded)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, ThereTensor)]
    here = [x for x in tensors if not isinstance(x, ThereTensor)]
    assert all(x.device.type == "cpu" for x in here), f"{func} meets a tensor without numbers"
    if there and func not in _COPIES:
        strangers = [tuple(x.shape) for x in here if x.dim()]
        assert not strangers, (
            f"{func} mixes devices: {strangers} in main memory beside {[tuple(x.shape) for x in there]}"
        )
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else torch.device(device).type == DEVICE.type
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, ThereTensor) else x, (args, kwargs))
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if not goes_there:
        return out
    out = tree_map(lambda x: ThereTensor(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out
