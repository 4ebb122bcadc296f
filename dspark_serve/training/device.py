"""Where training runs: the device of this process, how host memory gets there, and how full it was.

Must not know: heads, data, files.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from dspark_serve.engine.build import choose_device

_GIB = 1 << 30


def training_device(name: str) -> torch.device:
    """What `name` (auto, cpu, cuda) means to this process: of several, each takes the GPU of its LOCAL_RANK.

    Raises ValueError where that device is not there, or where processes would share one.
    """
    device = choose_device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"training runs on cpu or cuda, not on {name}")
    if device.index is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"several processes take a GPU each: say device cuda, not {name}")
        return device
    rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= count:
        raise ValueError(
            f"process {rank} has no GPU of its own, as torch sees {count}: start no more than {count} here"
        )
    return torch.device("cuda", rank)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in main memory on `device`; towards a GPU the copy runs beside what the host does next."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def peak_gib(device: torch.device) -> float | None:
    """The most GPU memory that this process's tensors have held at once; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else None


def in_use(gib: float | None) -> str:
    """peak_gib in words, to end a line with; nothing where there is none."""
    return "" if gib is None else f", peak {gib:.2f} GiB of its memory"
