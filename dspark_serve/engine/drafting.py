"""When drafts are made: at the start of the step that has them verified, or at the end of the one before.

How many drafts are verified fixes the shape of the target's forward, so a budget that goes by what a head says of its
drafts has to wait for a device twice: for that, and for the tokens. Made at the end of a step, from anchors that are
still on the device, drafts cost no wait of their own: what is said of them comes in one copy with the step's tokens.
Must not know: how drafts are made or judged, what a budget goes by.
"""

from __future__ import annotations

from typing import Protocol

import torch

from dspark_serve.drafters.base import AheadDrafter, Drafter
from dspark_serve.drafters.ready import Ready
from dspark_serve.engine.clock import Span
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.speculation.fixed import Budget
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.tensors import Proposal, StepBatch, Verdict
from dspark_serve.types import Plan, Row


class Drafting(Protocol):
    def admit(self, plan: Plan, budget: Budget) -> Plan:
        """The plan in which rows carry the drafts that `propose` will have for them."""
        ...

    def propose(self, plan: Plan) -> Proposal:
        """Drafts for plan.drafting, aligned with it."""
        ...

    def after(self, plan: Plan, batch: StepBatch, verdict: Verdict) -> float:
        """Called when the drafter has observed the step. Milliseconds that drafting took."""
        ...


class DraftFirst:
    """At the start: nobody is drafted for who has just ended, and each row can be asked whether it is worth it."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    def admit(self, plan: Plan, budget: Budget) -> Plan:
        return budget.admit(plan)

    def propose(self, plan: Plan) -> Proposal:
        return self._drafter.propose(plan.drafting) if plan.drafting else Proposal.empty(0)

    def after(self, plan: Plan, batch: StepBatch, verdict: Verdict) -> float:
        return 0.0


class DraftAhead:
    """At the end, for the rows that the budget lets draft. So it decides a step ahead: rows that have drafts carry
    them, whatever it says by then, and those that it lets draft anew go without for a step.

    None of that depends on what was drafted, only on which requests there are: it is legal in every mode.
    """

    def __init__(self, drafter: AheadDrafter, scheduler: Scheduler, device: torch.device) -> None:
        self._drafter, self._scheduler, self._device = drafter, scheduler, device
        self._ready = Ready.nothing()
        self._anyone = True  # drafts, by the last decision there was

    def admit(self, plan: Plan, budget: Budget) -> Plan:
        admitted = budget.admit(plan)
        wanted = [row.max_drafts > 0 and not row.lookup_only for row in admitted.rows]
        if plan.drafting:
            self._anyone = any(wanted)
        rows: list[Row] = []
        ahead: list[int] = []
        for index, (row, mine) in enumerate(zip(plan.rows, admitted.rows, strict=True)):
            # Rows that the budget was not asked about, most of them at the end of their prompts, go with the others.
            goes_on = wanted[index] if row.max_drafts > 0 else self._anyone
            if goes_on and row.samples and self._scheduler.next_drafts(row.request) > 0:
                ahead.append(index)
            if self._ready.has(row):
                mine = row
            elif wanted[index]:
                mine = Row(row.request, row.start, row.length, row.samples)
            rows.append(mine)
        return Plan(tuple(rows), plan.num_preempted, plan.admitted, plan.known_bare, tuple(ahead))

    def propose(self, plan: Plan) -> Proposal:
        return self._drafter.propose(plan.drafting, self._ready) if plan.drafting else Proposal.empty(0)

    def after(self, plan: Plan, batch: StepBatch, verdict: Verdict) -> float:
        """Launches the pass for the next step, and waits for it and for the verdict at once."""
        self._ready = Ready.nothing()
        if not plan.ahead:
            return 0.0
        requests = [plan.rows[index].request for index in plan.ahead]
        ends = [plan.rows[index].start + plan.rows[index].length for index in plan.ahead]
        rows = [
            Row(request, batch.context_lens[index], 1, True, self._scheduler.next_drafts(request))
            for index, request in zip(plan.ahead, requests, strict=True)
        ]
        span = Span(self._device)
        drafted = self._drafter.ahead(rows, verdict.newest(plan.ahead, ends))
        span.end()
        drafted = drafted.fetched_with(verdict)
        starts = [end + len(verdict.host_tokens[index]) - 1 for end, index in zip(ends, plan.ahead, strict=True)]
        places = enumerate(zip(requests, starts, strict=True))
        self._ready = Ready(drafted, {request: (place, start) for place, (request, start) in places})
        return span.ms()


def drafting_for(drafter: Drafter, budget: Budget, scheduler: Scheduler, device: torch.device) -> Drafting:
    """Ahead only where something is gained by it: a budget waits for what is said of drafts, and for a device."""
    if device.type != "cpu" and isinstance(budget, AutoBudget) and isinstance(drafter, AheadDrafter):
        return DraftAhead(drafter, scheduler, device)
    return DraftFirst(drafter)
