"""Several training processes as one: gradients averaged, sums and decisions shared. A process alone needs none of it.

torchrun and `accelerate launch` start the processes and say in the environment who is who. Gradients on GPUs go through
NCCL; what the host decides stays on the host, through gloo. Must not know: heads, data.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

_PATIENCE = timedelta(hours=12)  # the first process may wait for text, or evaluate, while the others wait for it


@dataclass(frozen=True)
class Group:
    """This process among `size`. Every method is called by all of them, in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean over processes, in place; the same bits in all of them."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over processes."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        found: list[float] = summed.tolist()
        return found

    def union(self, values: set[int]) -> set[int]:
        if self.size == 1:
            return values
        parts: list[set[int]] = [set() for _ in range(self.size)]
        dist.all_gather_object(parts, values)
        return set().union(*parts)

    def wait(self) -> None:
        """Until every process is here."""
        self.total([0.0])


ALONE = Group()


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that the environment speaks of, as long as the context lasts; this process trains on `device`."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    dist.init_process_group(backends(device), timeout=_PATIENCE)
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def backends(device: torch.device) -> str:
    """What carries tensors between processes that train on `device`, for each place a tensor may be in."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
