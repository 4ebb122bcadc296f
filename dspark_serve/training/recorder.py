"""A runner that keeps the hidden states of what it runs, until the caller collects them by request.

The states come from the very forwards that write the text: nothing is computed twice. Must not know: files, heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from dspark_serve.engine.runner import Runner
from dspark_serve.tensors import StepBatch, TargetOutput
from dspark_serve.training.records import States, as_half


@dataclass
class _Trace:
    states: list[States] = field(default_factory=list)  # each [tokens of a step, width]
    log_totals: list[float] = field(default_factory=list)


class RecordingRunner(Runner):
    """Knows a request by its first page, which it holds alone while it runs (prefix caching must be off)."""

    def __init__(self, plain: Runner, layers: tuple[int, ...]) -> None:
        super().__init__(plain.model, plain.store, layers)
        self._traces: dict[int, _Trace] = {}

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> TargetOutput:
        out = super().run(batch)
        assert out.taps is not None
        states = as_half(out.taps.float().cpu().numpy())
        log_totals = iter(out.logits.logsumexp(-1).tolist())
        start = 0
        first_pages = batch.page_table[:, 0].tolist()
        lens = zip(first_pages, batch.query_lens, batch.context_lens, batch.sample_lens, strict=True)
        for page, queries, context, samples in lens:
            if queries == context:  # from the beginning: a new request, or one that lost its pages
                self._traces[page] = _Trace()
            trace = self._traces[page]
            trace.states.append(states[start : start + queries].copy())
            trace.log_totals.extend(next(log_totals) for _ in range(samples))
            start += queries
        return out

    def collect(self, first_page: int) -> tuple[States, tuple[float, ...]]:
        """States [tokens read, width] and the log of the sum of exp(logits) before each token drawn; then forgotten."""
        trace = self._traces.pop(first_page)
        return np.concatenate(trace.states), tuple(trace.log_totals)
