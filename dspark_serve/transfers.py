"""Host arrays to the device that computes, many in one copy, which the host does not wait for; and the way back.

A copy from ordinary memory would make it wait until the device has done all that it was given before. The way back is
always waited for, so it is taken once per step: tests/engine/test_transfers.py counts. Must not know: what it copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNED = 16  # bytes, which kernels may load at once: every array begins at a multiple


def to_device(device: torch.device, *arrays: npt.NDArray[Any]) -> list[Tensor]:
    """The arrays as tensors on `device`, contiguous, of the same shapes and types; on a CPU they share memory."""
    sources = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type == "cpu":
        return sources
    firsts = [0]
    for source in sources:
        firsts.append(firsts[-1] + -(-source.nbytes // _ALIGNED) * _ALIGNED)
    places = [slice(first, first + source.nbytes) for first, source in zip(firsts, sources, strict=False)]
    # The device reads from pinned memory when it gets there; torch keeps that from being used again before.
    packed = torch.empty(firsts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    memory = packed.numpy()
    for source, place in zip(sources, places, strict=True):
        memory[place] = source.numpy().reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return [there[place].view(s.dtype).view(s.shape) for s, place in zip(sources, places, strict=True)]


def to_host(*tensors: Tensor) -> list[npt.NDArray[Any]]:
    """Tensors of one device as arrays, of the same shapes and types, in one copy; on a CPU they share memory."""
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    packed = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]).cpu()
    found, first = [], 0
    for tensor in tensors:
        piece = packed[first : first + tensor.nbytes].clone()  # which begins where its type may, not at any byte
        found.append(piece.view(tensor.dtype).view(tensor.shape).numpy())
        first += tensor.nbytes
    return found
