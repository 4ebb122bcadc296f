"""Forwards recorded for a few sizes, and played for every step that fits one: the target's layers, a head's block.

LM head, drawing and acceptance stay outside: there are as many samples as there are, and prompts may be scored.
Must not know: requests, sampling, how layers compute.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dspark_serve.cache.store import KVStore
from dspark_serve.drafters.base import BlockPass
from dspark_serve.drafters.rows import DraftRows
from dspark_serve.engine.padding import BlockInputs, Limits, StepInputs, tiers
from dspark_serve.engine.recorders import Recorder
from dspark_serve.models.base import StagedModel
from dspark_serve.tensors import StepBatch, TargetOutput

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")
Each = TypeVar("Each")
_MIB = 1 << 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recorded(Generic[Inputs, Result]):
    inputs: Inputs
    play: Callable[[], Result]


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
        pages = -(-limits.max_model_len // store.page_size)
        most = max(limits.rows_of(size) for size in self.sizes)
        table = torch.zeros(most, pages, dtype=torch.int64, device=model.device)

        def record(size: int) -> _Recorded[StepInputs, tuple[Tensor, Tensor | None]]:
            inputs = StepInputs(size, table[: limits.rows_of(size)], store.page_size)
            return _Recorded(inputs, recorder.record(lambda: model.trunk(inputs.batch, store, taps)))

        self._recorded = _record_all(record, self.sizes, "tokens", recorder)

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


class BlockGraphs:
    """A drafter's pass over rows whose context is in `store`, likewise; itself such a pass, for rows of any number."""

    @torch.inference_mode()
    def __init__(self, block: BlockPass, store: KVStore, limits: Limits, recorder: Recorder) -> None:
        """Raises what recording raises."""
        self._block, self.sizes = block, tiers(limits.max_num_seqs)
        pages = DraftRows.width(limits.max_model_len, store.page_size)
        table = torch.zeros(self.sizes[-1], pages, dtype=torch.int64, device=store.keys[0].device)

        def record(size: int) -> _Recorded[BlockInputs, Tensor]:
            inputs = BlockInputs(table[:size], store.page_size, limits.max_model_len)
            return _Recorded(inputs, recorder.record(lambda: block(inputs.rows)))

        self._recorded = _record_all(record, self.sizes, "drafting rows", recorder)

    @torch.inference_mode()
    def __call__(self, rows: DraftRows) -> Tensor:
        """Good until the next call."""
        count = rows.anchors.shape[0]
        tier = bisect_left(self.sizes, count)
        if tier == len(self.sizes) or not self._recorded[tier].inputs.takes(rows):
            return self._block(rows)
        recorded = self._recorded[tier]
        recorded.inputs.fill(rows)
        return recorded.play()[:count]


def _record_all(record: Callable[[int], Each], sizes: Sequence[int], what: str, recorder: Recorder) -> list[Each]:
    """One recording per size, in the order of `sizes`, which ascend."""
    before, began = recorder.used_bytes, time.perf_counter()
    order = tqdm(sizes[::-1], desc=f"recording graphs of {what}", unit="graph", disable=None, leave=False)
    found = [record(size) for size in order][::-1]
    took, mib = time.perf_counter() - began, (recorder.used_bytes - before) / _MIB
    logger.info("%d graphs of up to %d %s: %.1f s, %.0f MiB", len(sizes), sizes[-1], what, took, mib)
    return found
