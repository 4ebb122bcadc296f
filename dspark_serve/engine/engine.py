"""The step: plan, propose, budget, one ragged target forward, verify, observe, commit. On a GPU the next step's drafts
are made before its tokens are waited for: see drafting.py.

Must not know: text, HTTP, threads. One thread owns an engine; nothing here blocks on anything but arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dspark_serve.drafters.base import Drafter
from dspark_serve.engine import logprobs
from dspark_serve.engine.batch import Batcher
from dspark_serve.engine.clock import Clock
from dspark_serve.engine.cores import Cores
from dspark_serve.engine.drafting import Drafting, drafting_for
from dspark_serve.engine.runner import Runner
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.reports import EngineInfo, EngineStats, StepReport
from dspark_serve.speculation.fixed import Budget
from dspark_serve.speculation.verify import Rule, verify
from dspark_serve.tensors import Proposal, StepBatch, Verdict
from dspark_serve.types import CostCurve, Plan, Request, RowResult


class Engine:
    """A target, a drafter, a budget and a scheduler, meeting once per step. `rule`: verify.verify, or its equal."""

    def __init__(
        self,
        info: EngineInfo,
        scheduler: Scheduler,
        drafter: Drafter,
        budget: Budget,
        batcher: Batcher,
        runner: Runner,
        rule: Rule = verify,
        drafting: Drafting | None = None,
    ) -> None:
        """drafting: None to choose what suits the device and the budget."""
        self._cores = Cores(batcher.device)
        self.info = info
        self.scheduler = scheduler
        self.drafter = drafter
        self.budget = budget
        self.batcher = batcher
        self.runner = runner
        self.rule = rule
        self._drafting = drafting or drafting_for(drafter, budget, scheduler, batcher.device)
        self._learning_ms = 0.0  # from the last step

    @torch.inference_mode()
    def step(self) -> StepReport:
        """Advance every planned row by one chunk or by one token plus its accepted drafts."""
        with self._cores:
            return self._step()

    def _step(self) -> StepReport:
        clock = Clock()
        plan = self._drafting.admit(self.scheduler.plan(self.budget.quiet), self.budget)
        if not plan.rows:
            return StepReport(num_preempted=plan.num_preempted)
        clock.lap("plan")
        proposal = self._drafting.propose(plan)
        kept = self.budget.choose(plan, proposal)
        clock.lap("propose")
        batch = self.batcher.build(plan, proposal.trim(kept))
        clock.lap("build")
        out = self.runner.run(batch)
        clock.lap("forward")
        verdict = logprobs.asked(self.rule(out.logits, batch, self.info.verify_mode), batch, out.logits)
        self.drafter.observe(batch, out.taps, verdict)
        clock.within("propose", self._drafting.after(plan, batch, verdict))
        results = _results(plan, proposal, batch, verdict, self.info.drafter)
        clock.lap("verify")
        report = self.scheduler.commit(plan, results)
        clock.lap("commit")
        learned = self.budget.learn(plan, proposal, results, clock.phase_ms, self._learning_ms)
        for delta in report.deltas:
            if delta.finish_reason is not None:
                self._release(delta.request_id)
        clock.lap("learn")
        self._learning_ms = clock.phase_ms["learn"]
        return replace(report, phase_ms=clock.phase_ms, budget=learned)

    def add(self, request: Request) -> None:
        """Queue a request; InvalidRequest if it can never be served, EngineBusy if the queue is full."""
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> bool:
        """Drop a request and give its pages back; False if it is not here any more."""
        self._release(request_id)
        return self.scheduler.cancel(request_id)

    def _release(self, request_id: str) -> None:
        self.drafter.release(request_id)
        self.budget.release(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def cost_curve(self) -> CostCurve | None:
        """What steps are expected to take, by their tokens; None where nothing is decided by it."""
        return self.budget.curve(self.info.max_num_batched_tokens)

    def check_integrity(self) -> None:
        """Raise AssertionError unless requests and pages agree."""
        self.scheduler.check_integrity()


def _results(plan: Plan, proposal: Proposal, batch: StepBatch, verdict: Verdict, drafter: str) -> list[RowResult]:
    """The verdict on the host, with draft counts, and logprobs where a request asked for them."""
    results = verdict.to_host()
    names = proposal.drafters or (drafter,) * len(proposal.n_draft)
    drafted = iter(zip(proposal.n_draft, names, strict=True))
    for index, (row, result) in enumerate(zip(plan.rows, results, strict=True)):
        if row.max_drafts > 0:
            kept = batch.sample_lens[index] - 1
            n_draft, name = next(drafted)
            results[index] = RowResult(result.tokens, n_draft, kept, drafter=name)
    return logprobs.added(results, batch, verdict)
