"""Steps that go as was decided before: nobody drafts with a pass of a model, and nothing is there to be weighed.

Where drafting does not pay, a budget that looks at every step all the same makes every step a percent longer, for
nothing. So it stays decided for a while, through requests that end and others that begin; and what steps of as many
decoding requests take is learned from all of them together. Must not know: drafters, what a look is for.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dspark_serve.speculation.admission import ALIKE, HOLD, Load, all_greedy, context_of
from dspark_serve.speculation.cost import CostModel
from dspark_serve.types import BudgetReport, Plan, Request, Row

_STEPS = HOLD - 1  # between two looks: for as long as what was decided at the last one


@dataclass
class Rest:
    """After a step of these requests in which nobody drafted with a pass of a model. What they copy is looked up and
    verified meanwhile."""

    known: frozenset[Request]  # who was decoding then: it was decided about them, or there is nothing to decide
    load: Load  # of the last step that was looked at, if there was one since in which all were decoding: of that
    report: BudgetReport  # on that step, had nothing been drafted
    whoever: bool = False  # it was decided so because the best of drafts would not pay
    requests: list[Request] = field(default_factory=list)  # of the last step
    steps: int = 0  # since it began
    alike: bool = True  # nothing about this step is new
    took_ms: dict[int, list[float]] = field(default_factory=dict)  # such steps, by drafts verified in them
    copied: int = 0  # such steps with drafts
    prompts: list[tuple[Load, float]] = field(default_factory=list)  # steps in which such were read, and what they took
    asleep: int = 0  # steps like the last in which nothing is going to be copied either
    _greedy: bool | None = None  # all of the last step; None: not asked yet

    @staticmethod
    def after(
        plan: Plan, decided: Sequence[Row], load: Load, report: BudgetReport, whoever: bool = False
    ) -> Rest | None:
        """None if the step with `plan`, as it was admitted, is not one to rest after. decided: its rows that might have
        drafted."""
        if not decided or plan.ahead or not all([row.lookup_only for row in plan.drafting]):
            return None
        known = frozenset([row.request for row in plan.rows if row.length == 1 and row.samples])
        return Rest(known, load, _without_drafts(report), whoever)

    def goes_on(self, plan: Plan) -> bool:
        """Whether what was decided goes for a step with `plan`: it is not long ago, and most are still the same.
        `alike` is that step's from now on."""
        if self.steps >= _STEPS:
            return False
        self.steps += 1
        rows, known = plan.rows, self.known
        requests = [row.request for row in rows]
        if requests != self.requests:
            strangers = 0 if self.whoever else len(rows) - sum([request in known for request in requests])
            if max(strangers, abs(len(rows) - len(known))) * ALIKE > len(known):
                return False
            self.requests, self._greedy = requests, None
        self.alike = self._is_alike(rows)
        return True

    def sleeps_on(self, rows: Sequence[Row]) -> bool:
        """Whether nothing is to be asked in a step of these rows, which then is one like the last: nobody has come or
        gone, and who decodes goes on to, or is left out for a step."""
        if self.asleep > 0 and self.steps < _STEPS and [row.request for row in rows] == self.requests:
            self.asleep -= 1
            self.steps += 1
            return True
        self.asleep = 0
        return False

    def _is_alike(self, rows: Sequence[Row]) -> bool:
        load = self.load
        if load.tokens != load.rows or len(rows) != load.rows or not all([row.length == 1 for row in rows]):
            return False
        if self._greedy is None:
            self._greedy = all_greedy(rows)
        return self._greedy == load.greedy

    def looked(self, load: Load, report: BudgetReport) -> None:
        """A step in between was looked at."""
        if load.tokens == load.rows or self.load.tokens != self.load.rows:
            self.load, self.report = load, _without_drafts(report)

    def lasted(self, cost: CostModel, kept: int, ms: float) -> BudgetReport:
        """A step like the others, with so many drafts verified, took `ms`; learned from later. The report on it."""
        self.took_ms.setdefault(kept, []).append(ms)
        if not kept:
            return self.report
        self.copied += 1
        return replace(self.report, predicted_step_ms=self.load.step_ms(cost, kept))

    def reads(self, load: Load) -> bool:
        """Whether such a step is one of these, but for prompts that are read in it."""
        return load.tokens > load.rows and self.load.tokens == self.load.rows

    def read(self, cost: CostModel, load: Load, skipped: dict[str, int], ms: float) -> BudgetReport:
        """Such a step without drafts took `ms`; learned from later. The report on it."""
        self.prompts.append((load, ms))
        step_ms = load.step_ms(cost)
        return replace(self.report, predicted_step_ms=step_ms, plain_step_ms=step_ms, skipped=skipped)

    def learn(self, cost: CostModel, rows: Sequence[Row]) -> float:
        """From such steps since the last time, from those with as many drafts as from one; what they were to take, all
        together. rows: of the step after them."""
        total_ms = 0.0
        for load, ms in self.prompts:
            step = load.tokens, load.rows, load.context, ms, load.greedy
            total_ms += cost.observe_step(*step, silent=load.silent)
        self.prompts.clear()
        if not self.took_ms:
            return total_ms
        load = self.load
        now = context_of(rows) * load.rows // len(rows)
        middle = (load.context + now) // 2
        for kept, each in sorted(self.took_ms.items()):
            step = load.rows + kept, load.rows, middle, statistics.median(each), load.greedy
            total_ms += len(each) * cost.observe_step(*step, kept * load.keys_per_draft, times=len(each))
        self.took_ms.clear()
        self.copied = 0
        return total_ms


def _without_drafts(report: BudgetReport) -> BudgetReport:
    plain_ms = report.plain_step_ms
    return report if report.predicted_step_ms == plain_ms else replace(report, predicted_step_ms=plain_ms)
