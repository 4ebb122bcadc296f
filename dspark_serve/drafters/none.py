"""The drafter that never drafts: plain decoding through the same step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark_serve.tensors import Proposal, StepBatch, Verdict
from dspark_serve.types import Row


class NoDrafter:
    taps: tuple[int, ...] = ()
    width = 0

    def propose(self, rows: Sequence[Row]) -> Proposal:
        return Proposal.empty(len(rows))

    def observe(self, batch: StepBatch, taps: Tensor | None, verdict: Verdict) -> None:
        pass

    def release(self, request_id: str) -> None:
        pass
