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


class Reused:
    """Memory of one large result after the other: handed out again as soon as no tensor lies in it any more.

    From malloc a step's logits come from another place whenever something small has been put where the last ones
    were, and 1,500 pages that nobody has touched yet take longer than the product they are for (6 MB, 32 rows).
    """

    smallest = 1 << 20  # bytes of a result for which this pays
    largest = 256 << 20  # bytes kept for good: a prompt that is scored needs more, once

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = None

    def floats(self, rows: int, columns: int) -> Tensor:
        """Uninitialised [rows, columns] float32; of its own where a former result is still in use."""
        wanted = 4 * rows * columns
        if not self.smallest <= wanted <= self.largest:
            return torch.empty(rows, columns)
        with self._lock:
            if self._memory is not None and sys.getrefcount(self._memory) > 2:  # ours, the argument, and tensors'
                return torch.empty(rows, columns)
            if self._memory is None or len(self._memory) < wanted + _PAGE:
                self._memory = None  # given back before more is taken
                self._memory = _mapped(wanted)
            return _block(self._memory)[:wanted].view(torch.float32).view(rows, columns)


def _chunk(num_bytes: int) -> Tensor:
    return _block(_mapped(max(num_bytes, _CHUNK)))


def _mapped(num_bytes: int) -> mmap.mmap:
    """At least `num_bytes` from a huge page's start on."""
    # Private: shared memory, which is Python's default, gets huge pages by another setting, and mostly none.
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, (-(-num_bytes // _PAGE) + 1) * _PAGE, **private)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone
    if advice is not None:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(advice)
    return memory


def _block(memory: mmap.mmap) -> Tensor:
    block = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory`
    first = -block.data_ptr() % _PAGE
    return block[first : first + len(memory) - _PAGE]
