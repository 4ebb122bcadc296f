"""Runs one StepBatch through the target. The seam where captured graphs will go.

Must not know: requests, drafters, sampling.
"""

from __future__ import annotations

import torch

from dspark_serve.cache.store import KVStore
from dspark_serve.models.base import TargetModel
from dspark_serve.tensors import StepBatch, TargetOutput


class Runner:
    def __init__(self, model: TargetModel, store: KVStore, taps: tuple[int, ...] = ()) -> None:
        self.model = model
        self.store = store
        self.taps = taps

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> TargetOutput:
        return self.model.forward(batch, self.store, self.taps)
