"""The target's layers recorded for a few numbers of tokens, and played for every step that fits one of them.

The LM head stays outside, as do drawing and acceptance: it works on as many samples as there are, prompts' included.
Must not know: requests, sampling, how layers compute.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from dspark_serve.cache.store import KVStore
from dspark_serve.engine.padding import Limits, StepInputs, tiers
from dspark_serve.engine.recorders import Recorder
from dspark_serve.models.base import StagedModel
from dspark_serve.tensors import StepBatch, TargetOutput

_MIB = 1 << 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recorded:
    inputs: StepInputs
    play: Callable[[], tuple[Tensor, Tensor | None]]


class StepGraphs:
    """A StagedModel's trunk over `store`, recorded at construction, largest first: smaller ones fit its memory."""

    @torch.inference_mode()
    def __init__(
        self, model: StagedModel, store: KVStore, taps: Sequence[int], limits: Limits, recorder: Recorder
    ) -> None:
        """Raises ValueError where the model's trunk cannot be recorded, and what recording raises."""
        if not model.recordable(store):
            raise ValueError("attention in plain torch cannot be recorded: its launches depend on the step's lengths")
        self._model, self.sizes = model, tiers(limits.max_tokens)
        before, began = recorder.used_bytes, time.perf_counter()
        pages = -(-limits.max_model_len // store.page_size)
        most = max(limits.rows_of(size) for size in self.sizes)
        table = torch.zeros(most, pages, dtype=torch.int64, device=model.device)

        def record(size: int) -> _Recorded:
            inputs = StepInputs(size, table[: limits.rows_of(size)], store.page_size)
            return _Recorded(inputs, recorder.record(lambda: model.trunk(inputs.batch, store, taps)))

        order = tqdm(self.sizes[::-1], desc="recording graphs", unit="graph", disable=None, leave=False)
        self._recorded = [record(size) for size in order][::-1]
        self.mib = (recorder.used_bytes - before) / _MIB
        took = time.perf_counter() - began
        logger.info("%d graphs of up to %d tokens: %.1f s, %.0f MiB", len(self.sizes), self.sizes[-1], took, self.mib)

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> TargetOutput | None:
        """The target's forward; None for a step that fits nothing recorded. Taps are good until the next call."""
        count = batch.token_ids.shape[0]
        tier = bisect_left(self.sizes, count)
        if tier == len(self.sizes) or not self._recorded[tier].inputs.takes(batch):
            return None
        recorded = self._recorded[tier]
        recorded.inputs.fill(batch)
        hidden, taps = recorded.play()
        return TargetOutput(self._model.logits(hidden[:count], batch), None if taps is None else taps[:count])
