"""What one step frees, the next one asks for again: the process keeps it instead of handing it back in between.

glibc gives large blocks and the end of its heap back to the system as soon as they are free, and every page of 4 KiB
that comes anew is a fault of some microseconds: of 32 rows 90 a step without drafts, 155 beside a budget, all in the
forward pass (SmolLM2-135M, random words).
"""

from __future__ import annotations

import ctypes
import os

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt, malloc.h
_KEPT = 1 << 30  # bytes free at the heap's end before some go back
_PAD = 64 << 20  # bytes asked for at once; heaps of threads are of that size, and no free one goes back
_LARGEST = 32 << 20  # bytes of a block that still comes from the heap: the most glibc accepts


def keep_freed_memory(device: torch.device) -> bool:
    """Where steps compute in main memory and glibc hands it out, unless the environment sets malloc up; whether it did.

    What loading has left behind is given back first. For the whole process, and for as long as it runs.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if device.type != "cpu" or libc is None or not hasattr(libc, "gnu_get_libc_version") or _chosen():
        return False
    libc.malloc_trim(0)
    wanted = ((_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _PAD), (_MMAP_THRESHOLD, _LARGEST))
    return all([libc.mallopt(option, value) == 1 for option, value in wanted])


def _chosen() -> bool:
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
    return any(name in os.environ for name in names) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
