"""Prompt lookup: where the last few tokens occurred before, propose what followed them then (Saxena 2023).

Costs a dictionary look-up per token and no model. Must not know: verification, budget, pages.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark_serve.drafters.copies import Copies
from dspark_serve.tensors import Proposal, StepBatch, Verdict
from dspark_serve.types import Row


class NgramDrafter:
    """Drafts what each text copies from itself; see `Copies` for `shortest` and `longest`.

    Drafts are certain (one-hot), so `draft_probs` is None; `confidence` says how often such copies were right.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, width: int, shortest: int = 2, longest: int = 5) -> None:
        self.width = width
        self.copies = Copies(shortest, longest)

    def propose(self, rows: Sequence[Row]) -> Proposal:
        return Proposal.from_lists([self.look_up(row) for row in rows], confidence=[self.chances(row) for row in rows])

    def look_up(self, row: Row) -> list[int]:
        """A row's drafts; [] where its text copies nothing."""
        return self.copies.tokens(row.request, min(self.width, row.max_drafts))

    def chances(self, row: Row) -> list[float]:
        """That each of these drafts is right, given that those before it are."""
        return self.copies.chances(row.request, min(self.width, row.max_drafts))

    def observe(self, batch: StepBatch, taps: Tensor | None, verdict: Verdict) -> None:
        """Nothing to learn: the text tells all, when it is looked at next."""

    def release(self, request_id: str) -> None:
        self.copies.release(request_id)
