"""Steps about which nothing needs to be decided: they are like the one before, in which nobody drafted.

A step's weights turn everything out of the caches, so that the fifty small things a budget looks at cost it two percent
of a short step. Between looks it rests; what those steps took is learned together, so that none is left out.
Must not know: torch, what a look is for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark_serve.speculation.admission import HOLD, Load
from dspark_serve.types import BudgetReport, Plan, Request

_STEPS = HOLD - 1  # between two looks: for as long as what was decided at the last one


@dataclass
class Rest:
    """After a step of these requests, all of them decoding, in which nobody drafted with a pass of a model. What they
    copy is looked up and verified meanwhile."""

    requests: list[Request]
    load: Load  # that step's
    report: BudgetReport  # on that step
    steps: int = 0  # since then
    plain_ms: list[float] = field(default_factory=list)  # what each of those took in which nothing was drafted

    @staticmethod
    def after(plan: Plan, load: Load, report: BudgetReport) -> Rest | None:
        """None if the step with `plan`, as it was admitted, is not one to rest after."""
        if plan.ahead or load.tokens != load.rows or not load.rows:
            return None
        if not all([row.lookup_only for row in plan.drafting]):
            return None
        return Rest([row.request for row in plan.rows], load, report)

    def goes_on(self, plan: Plan) -> bool:
        """Whether a step with `plan` is like the one that this began with."""
        return (
            self.steps < _STEPS
            and [row.request for row in plan.rows] == self.requests
            and all([row.length == 1 for row in plan.rows])
        )

    def add(self, ms: float | None) -> BudgetReport:
        """One more step, which took so long; None of one with drafts."""
        self.steps += 1
        if ms is not None:
            self.plain_ms.append(ms)
        return self.report
