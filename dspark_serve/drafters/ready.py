"""Drafts that were made at the end of a step, until the next one has them verified. Must not know: who made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspark_serve.tensors import Proposal
from dspark_serve.types import Request, Row


@dataclass(frozen=True)
class Ready:
    """A proposal for requests, not rows: by the time that rows are planned some may have ended or been cancelled."""

    proposal: Proposal
    where: Mapping[Request, tuple[int, int]]  # row of the proposal, position of the anchor that it follows

    @staticmethod
    def nothing() -> Ready:
        return Ready(Proposal.empty(0), {})

    def has(self, row: Row) -> bool:
        """Whether there are drafts after this row's very anchor, and it may carry some."""
        _, start = self.where.get(row.request, (-1, -1))
        return row.max_drafts > 0 and row.start == start

    def of(self, rows: Sequence[Row]) -> Proposal:
        """Theirs, each cut to what its row may carry; `has` says yes to all of them."""
        index, found = [self.where[row.request][0] for row in rows], self.proposal
        if index != list(range(len(found.n_draft))):
            found = found.pick(index)
        return found.trim([min(n, row.max_drafts) for n, row in zip(found.n_draft, rows, strict=True)])
