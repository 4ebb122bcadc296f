"""What a budget is, and those that weigh nothing: every draft is verified, or a fixed number per row.

Must not know: torch operations, drafters, costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from dspark_serve.tensors import Proposal
from dspark_serve.types import BudgetReport, CostCurve, Plan, Row, RowResult


class Budget(Protocol):
    def quiet(self, rows: Sequence[Row]) -> bool:
        """Whether nothing is drafted in the next step if these are its rows; asked before `admit`."""
        ...

    def admit(self, plan: Plan) -> Plan:
        """Before drafting: the plan with drafts taken from the rows that would not earn them. Where drafts are made
        ahead this is about those of the next step, and `choose` gets those that were made in the last."""
        ...

    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        """Drafts to keep per row of plan.drafting, each at most the proposal's n_draft."""
        ...

    def learn(
        self,
        plan: Plan,
        proposal: Proposal,
        results: Sequence[RowResult],
        phase_ms: Mapping[str, float],
        before_ms: float = 0.0,
    ) -> BudgetReport | None:
        """After the step; results are of all the plan's rows, with n_kept filled in. before_ms: what this took after
        the step before."""
        ...

    def release(self, request_id: str) -> None:
        """The request is finished; forget it. Unknown ids are fine."""
        ...

    def curve(self, max_tokens: int) -> CostCurve | None:
        """What steps of up to so many tokens are expected to take; None from a budget that does not predict."""
        ...


class KeepAll:
    """Verify every draft."""

    def quiet(self, rows: Sequence[Row]) -> bool:
        return False

    def admit(self, plan: Plan) -> Plan:
        return plan

    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        return proposal.n_draft

    def learn(
        self,
        plan: Plan,
        proposal: Proposal,
        results: Sequence[RowResult],
        phase_ms: Mapping[str, float],
        before_ms: float = 0.0,
    ) -> BudgetReport | None:
        return None

    def release(self, request_id: str) -> None:
        pass

    def curve(self, max_tokens: int) -> CostCurve | None:
        return None


class FixedBudget(KeepAll):
    """Verify the first `count` drafts of every row, or as many as it has."""

    def __init__(self, count: int) -> None:
        self.count = count

    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        return [min(n, self.count) for n in proposal.n_draft]
