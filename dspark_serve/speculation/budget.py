"""How many drafts of each row deserve verification this step. Host side; must not know: torch operations, drafters.

Both policies look at counts only, so they are causal and legal in every mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dspark_serve.tensors import Proposal
from dspark_serve.types import Plan


class Budget(Protocol):
    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        """Drafts to keep per row of plan.drafting, each at most the proposal's n_draft."""
        ...


class KeepAll:
    """Verify every draft."""

    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        return proposal.n_draft


class FixedBudget:
    """Verify the first `count` drafts of every row, or as many as it has."""

    def __init__(self, count: int) -> None:
        self.count = count

    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        return [min(n, self.count) for n in proposal.n_draft]
