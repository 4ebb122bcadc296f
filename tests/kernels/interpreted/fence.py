"""Tensors that end, or begin, at a page of memory nobody may touch: one element too far is a crash, not a wrong number.

Must not know: the kernels.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_no_access = 0
_maps: list[mmap.mmap] = []  # a tensor does not keep its map alive


def fenced(tensor: Tensor, at_start: bool = False) -> Tensor:
    """A contiguous copy that ends (or begins) where a forbidden page begins (or ends)."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    room = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    _maps.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for forbidden in (address, address + page + room):
        if _libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), _no_access):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    if not size:
        return tensor.clone()
    start = page if at_start else page + room - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)
