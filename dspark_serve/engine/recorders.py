"""Who records a call and plays it again: CUDA graphs, or, where there are none, nobody: the call is made again.

Must not know: what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")
_WARM_UPS = 2  # calls before the recorded one: kernels are compiled, libraries choose algorithms and get workspaces


class Recorder(Protocol):
    def record(self, call: Callable[[], Result]) -> Callable[[], Result]:
        """Makes the call, and returns what makes it again: on the memory that it read this time, whatever is in it.

        The result is the same object each time, good until anything of this recorder is played.
        """
        ...

    @property
    def used_bytes(self) -> int:
        """Device memory in use, by whomever."""
        ...


class EagerRecorder:
    """Calls again. With it everything around a recording is tested where there is no GPU."""

    used_bytes = 0

    def record(self, call: Callable[[], Result]) -> Callable[[], Result]:
        call()
        return call


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they are played one at a time, in any order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self, call: Callable[[], Result]) -> Callable[[], Result]:
        """Raises what `call` raises, and torch's RuntimeError where it does what no graph can hold."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):  # what is set up on first use must not be set up within the graph
            for _ in range(_WARM_UPS):
                call()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = call()

        def play() -> Result:
            graph.replay()
            return result

        return play

    @property
    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free
