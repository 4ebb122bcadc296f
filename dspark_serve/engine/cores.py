"""A core for each of the threads that compute a step.

They wait for each other a few hundred times per step, spinning first and sleeping then. A scheduler that finds a core
busy with another process puts two of them on one core, where each has to sleep for the other to go on: a step then
takes four times as long, and goes on doing so for about a second (seen with Linux 6.18 on two cores).

Must not know: models, requests, what is computed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Set as AbstractSet
from types import TracebackType

import torch

from dspark_kernels import native


class Cores:
    """A context in which the calling thread and those that compute with it keep to a core each.

    Does nothing where they are not as many as the process has cores: with cores to spare the scheduler knows better.
    The calling thread may go where it likes again afterwards; the others have nothing else to do.
    """

    def __init__(self, device: torch.device) -> None:
        self._kernels = native.load() if device.type == "cpu" and hasattr(os, "sched_setaffinity") else None
        self._bound: tuple[int, frozenset[int]] | None = None  # by which thread, to which cores
        self._before: frozenset[int] | None = None

    def __enter__(self) -> None:
        if self._kernels is None or (threads := torch.get_num_threads()) < 2:
            return
        cores = frozenset(os.sched_getaffinity(0))
        if len(cores) != threads:
            return
        self._before, mine = cores, (threading.get_ident(), cores)
        if self._bound == mine:
            _go_to({min(cores)})
        elif self._kernels.bind(sorted(cores)):
            self._bound = mine
        else:  # a sandbox that forbids it: there is no use in asking again at every step
            self._kernels = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            _go_to(self._before)
            self._before = None


def _go_to(cores: AbstractSet[int]) -> None:
    """The calling thread. Where it may not, or a core has gone meanwhile, the step is computed all the same."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cores)
