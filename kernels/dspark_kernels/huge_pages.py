"""Memory in huge pages where the system has them. A step reads every weight once, in order, and with pages of 4 KiB a
thirtieth of that time goes into finding out where the next one lies; keys and values lie in thousands of places."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE = 2 << 20  # bytes of a huge page
_CHUNK = 32 << 20  # bytes taken at a time; what is not written to is not resident
_ALIGNED = 64  # bytes of a cache line

_lock = threading.Lock()
_rest = torch.empty(0, dtype=torch.uint8)  # of the last chunk


def empty(num_bytes: int) -> Tensor:
    """Uninitialised [num_bytes] uint8, at a cache line's start. Given back when no tensor of its chunk is left."""
    global _rest
    with _lock:
        if len(_rest) < num_bytes:
            _rest = _chunk(num_bytes)
        found, _rest = _rest[:num_bytes], _rest[-(-num_bytes // _ALIGNED) * _ALIGNED :]
    return found


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As torch.zeros: all of it is resident from the start."""
    return empty(math.prod(shape) * dtype.itemsize).view(dtype).view(*shape).zero_()


def _chunk(num_bytes: int) -> Tensor:
    size = -(-max(num_bytes, _CHUNK) // _PAGE) * _PAGE
    # Private: shared memory, which is Python's default, gets huge pages by another setting, and mostly none.
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, size + _PAGE, **private)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone
    if advice is not None:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(advice)
    block = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`
    first = -block.data_ptr() % _PAGE
    return block[first : first + size]
