"""Runs one StepBatch through the target: recorded where the step fits a recording, else launch by launch.

Must not know: requests, drafters, sampling.
"""

from __future__ import annotations

import torch

from dspark_serve.cache.store import KVStore
from dspark_serve.engine.graphs import StepGraphs
from dspark_serve.models.base import TargetModel
from dspark_serve.tensors import StepBatch, TargetOutput


class Runner:
    def __init__(
        self, model: TargetModel, store: KVStore, taps: tuple[int, ...] = (), graphs: StepGraphs | None = None
    ) -> None:
        """graphs: of this very model, store and taps."""
        self.model = model
        self.store = store
        self.taps = taps
        self.graphs = graphs

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> TargetOutput:
        out = None if self.graphs is None else self.graphs.run(batch)
        return self.model.forward(batch, self.store, self.taps) if out is None else out
