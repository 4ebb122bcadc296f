"""How many drafts of each row deserve verification this step. Host side; must not know: torch operations, drafters.

One policy so far: verify everything drafted. It looks at counts only, so it is causal and legal in every mode.
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
