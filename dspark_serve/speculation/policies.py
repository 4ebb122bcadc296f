"""The budget that keeps what earns the most on this machine now.

Must not know: torch operations, drafters, how requests are scheduled. What it looks at before it keeps a draft of a
step is, in rejection mode, never that draft nor anything behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dspark_serve.speculation.admission import HOLD, HURDLE, Admission, Allowance, Load, all_greedy, context_of
from dspark_serve.speculation.budget import best_of_curve, early_stop, lift_slow_rows, survival_of
from dspark_serve.speculation.calibrate import Calibrator, DraftSignals
from dspark_serve.speculation.copying import MOST, Lookups, Prices
from dspark_serve.speculation.cost import CostModel
from dspark_serve.speculation.members import Batches, Members
from dspark_serve.speculation.resting import Rest
from dspark_serve.tensors import Proposal
from dspark_serve.types import BudgetReport, CostCurve, Plan, Row, RowResult

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_FULL_SHARE = 0.003  # of the time: whole blocks verified, so that labels are not only of drafts that looked good
_CURVE_POINTS = 48  # at most, of a curve to be shown
_LOOKUP_MS = 0.2  # what a step in which somebody copies takes to look up, until it is measured
_LOOKUP_GAIN = 0.05  # of that estimate, per measurement
_COPIED = 7  # steps with copies of which nothing is learned until one more comes, or the rest is over
_ODD_MS = 5.0  # longer than anything takes: the process was stopped meanwhile
_MARGIN = 0.1, 0.005, 0.03  # of the cost model's noise; least and most


_NOBODY = Members.of(())


@dataclass
class _Step:
    """What was decided in a step, until its outcome is known."""

    load: Load
    rows: tuple[Row, ...] = ()  # that might have drafted
    members: Members = _NOBODY  # theirs
    context: int = 0  # theirs
    chosen: Bools | None = None  # those of them that draft with the costly drafter, where not all do
    skipped: dict[str, int] = field(default_factory=dict)
    probed: str | None = None
    signals: DraftSignals | None = None
    said: Floats | None = None
    drafted: tuple[int, int] = 0, 0  # rows with drafts of the costly drafter, and their context


class AutoBudget:
    """Keeps, and lets be made, the drafts with which expected tokens per second are highest.

    costly: the drafter that takes a pass of a model, None if there is none. lookups: rows that do not draft with it may
    copy; without both, all draft. drafter: who drafts where a proposal does not say. Per-user speed: see
    `lift_slow_rows`; it looks ahead, so rejection mode raises ValueError.
    """

    def __init__(
        self,
        cost: CostModel,
        calibrator: Calibrator,
        *,
        drafter: str,
        costly: str | None,
        lookups: Lookups | None = None,
        tokens_per_s_per_user: float = 0.0,
    ) -> None:
        if tokens_per_s_per_user and calibrator.mode != "coupled":
            raise ValueError("an objective per user needs verify_mode coupled: it looks at all confidences of a step")
        self.cost, self.calibrator, self.lookups = cost, calibrator, lookups
        self._drafter, self._costly = drafter, costly
        self._per_user = tokens_per_s_per_user
        self._full = Allowance(_FULL_SHARE)
        self._drafted_before: bool | None = False  # in the step before; None: it only copied
        self._admission = None if costly is None else Admission(cost, costly, calibrator.own)
        self._batches = Batches(calibrator.own)
        self._n_draft: tuple[tuple[int, ...], Ints] = (), np.zeros(0, dtype=np.int64)  # the last, which mostly stay
        self._steps = 0
        self._rest: Rest | None = None
        self._resting = False  # in this step
        self._asleep = False  # the next step goes like the last, which was rested through
        self._prices: tuple[Load, int, Prices] | None = None  # of what load, until which step, what drafts must promise
        self._lookup_ms = _LOOKUP_MS
        self._only_copies = False  # are drafted in this step
        self._step = _Step(Load(0, 0, 0, True))
        self._probed_before: str | None = None  # in the step before

    @property
    def margin(self) -> float:
        share, least, most = _MARGIN
        return min(max(share * self.cost.noise, least), most)

    # ---- before the draft

    def quiet(self, rows: Sequence[Row]) -> bool:
        self._asleep = self._rest is not None and self._rest.sleeps_on(rows)
        return self._asleep

    def admit(self, plan: Plan) -> Plan:
        self._steps += 1
        asleep, self._asleep = self._asleep, False
        if asleep:
            return plan
        rest = self._rest
        self._resting = rest is not None and rest.goes_on(plan)
        if rest is not None and self._resting:
            if not rest.alike:
                self._step = self._rested_step(plan)
            elif self._step.load is not rest.load:
                self._step = _Step(rest.load)
            rested = self._admitted(plan, plan.bare)
            if rest.alike and not rested.drafting:
                rest.asleep = self._quiet_steps(plan)
            return rested
        self._probed_before = self._step.probed
        drafting = plan.drafting
        members, context = self._batches.of(drafting), context_of(drafting)
        self._step = step = _Step(Load.of(plan, members.greedy, context), drafting, members, context)
        if not drafting or (self._admission is None and self.lookups is None):
            return plan
        if self._admission is None:
            return self._admitted(plan, plan.bare)
        admitted = self._admission.decide(drafting, members, step.load, context, self._steps)
        step.probed = admitted.probed
        if admitted.drafting == len(drafting):
            return plan
        step.skipped["acceptance" if admitted.drafting else "cost"] = len(drafting) - admitted.drafting
        if not admitted.drafting:
            return self._admitted(plan, plan.bare)
        step.chosen = admitted.costly
        return self._admitted(plan, admitted.rows(plan))

    def _rested_step(self, plan: Plan) -> _Step:
        """One that is not like the others that it rests through: a prompt is read in it, or there are fewer rows."""
        drafting = plan.drafting
        step = _Step(Load.of(plan, all_greedy(drafting), context_of(drafting)))
        if self._admission is not None and drafting:
            step.skipped["cost"] = len(drafting)
        return step

    def _admitted(self, plan: Plan, rows: tuple[Row, ...]) -> Plan:
        """rows: the plan's, of which only some may draft. Of the others those do that copy what is worth verifying."""
        copied = self._copied(plan)
        if copied:
            planned = list(rows)
            for index, count in copied:
                row = plan.rows[index]
                if not rows[index].max_drafts:
                    planned[index] = Row(row.request, row.start, row.length, row.samples, count, lookup_only=True)
            rows = tuple(planned)
        return Plan(rows, plan.num_preempted, plan.admitted, plan.bare)

    def _copied(self, plan: Plan) -> Sequence[tuple[int, int]]:
        """Rows of the plan, by index, that copy, and how many drafts of each are worth it."""
        if self.lookups is None:
            return ()
        if self._per_user:  # what is worth it is to be seen with all drafts there are
            return [(index, len(chances)) for index, chances in self.lookups.promised(plan.rows, 0.0)]
        prices = self._prices_of(self._step.load)
        if prices.least >= 1:
            return ()
        promised = self.lookups.promised(plan.rows, prices.least)
        return prices.worth(promised) if promised else ()

    def _quiet_steps(self, plan: Plan) -> int:
        """For how many steps after this one, in which nothing was copied, nothing will be."""
        if self.lookups is None:
            return HOLD
        if self._prices is None:
            return 0
        _, until, prices = self._prices
        left = until - self._steps - 1
        return left if prices.least >= 1 else min(left, self.lookups.quiet(plan.rows))

    def _prices_of(self, load: Load) -> Prices:
        if self._prices is None or self._steps >= self._prices[1] or not load.like(self._prices[0]):
            times = load.decoding.times(self.cost, MOST)
            over_ms = self._lookup_ms + HURDLE * float(times[0])
            self._prices = load, self._steps + HOLD, Prices.of(load.rows, times, over_ms)
        return self._prices[2]

    # ---- after the draft, before verification

    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        total, step, drafting = sum(proposal.n_draft), self._step, plan.drafting
        self._only_copies = total > 0 and not self._per_user and all(row.lookup_only for row in drafting)
        if self._only_copies or not total:
            return proposal.n_draft
        if proposal.n_draft != self._n_draft[0]:
            self._n_draft = proposal.n_draft, np.array(proposal.n_draft, dtype=np.int64)
        n_draft = self._n_draft[1]
        signals = self._signals(drafting, proposal, n_draft)
        step.signals, step.said = signals, self.calibrator.probabilities(signals)
        survival = survival_of(step.said)
        load, draft_ms, probed = step.load, self._draft_ms(drafting, signals), self._probed(plan, signals)
        times = load.times(self.cost, total)
        if self.calibrator.mode == "coupled":
            kept = best_of_curve(survival, load.rows, draft_ms, times, self.margin, HURDLE)
            if self._per_user:
                kept = lift_slow_rows(kept, survival, draft_ms, times, self._per_user)
        else:
            kept = early_stop(survival, load.rows, draft_ms, times)
        if self._admission is not None:
            self._admission.remember(signals, survival, self._steps, probed is not None)
        if probed is not None:
            row = signals.requests.index(probed)
            kept[row] = n_draft[row]
        # Which row is verified whole is settled by counting, never by what it drafted: legal in every mode.
        whole = self._steps % len(n_draft)
        if kept[whole] < n_draft[whole] and self._full.spend(float(times[n_draft[whole]] - times[0])):
            kept[whole] = n_draft[whole]
        counts: list[int] = kept.tolist()
        return counts

    def _signals(self, rows: tuple[Row, ...], proposal: Proposal, n_draft: Ints) -> DraftSignals:
        step = self._step
        if rows is step.rows:
            members = step.members
        elif step.chosen is not None:
            members = self._batches.part(rows, step.members, step.chosen)
        else:
            members = self._batches.of(rows)
        confidence, largest = proposal.signals_to_host()
        return DraftSignals(
            requests=members.requests,
            kinds=proposal.drafters or (self._drafter,) * len(rows),
            ranges=members.ranges,
            confidence=confidence,
            largest=largest,
            n_draft=n_draft,
        )

    def _probed(self, plan: Plan, signals: DraftSignals) -> str | None:
        """The request whose drafts in this step are a probe; one that was drafted for ahead may be gone."""
        if plan.ahead is None:
            return self._step.probed
        return self._probed_before if self._probed_before in signals.requests else None

    def _draft_ms(self, rows: Sequence[Row], signals: DraftSignals) -> float:
        """What the draft was expected to take."""
        step, neural = self._step, rows
        if any([kind != self._costly for kind, _ in signals.groups]):
            neural = [row for row, kind in zip(rows, signals.kinds, strict=True) if kind == self._costly]
        step.drafted = len(neural), step.context if neural is step.rows else context_of(neural)
        return self.cost.draft_ms(*step.drafted, step.load.greedy)

    # ---- after the step

    def learn(
        self,
        plan: Plan,
        proposal: Proposal,
        results: Sequence[RowResult],
        phase_ms: Mapping[str, float],
        before_ms: float = 0.0,
    ) -> BudgetReport | None:
        propose_ms = phase_ms.get("propose", 0.0)
        step_ms = sum(phase_ms.values()) - propose_ms
        if self._admission is not None and self._drafted_before is not None:
            self._admission.lesson.add(self._drafted_before, before_ms)
        step, load, kept, draft_ms = self._step, self._step.load, 0, 0.0
        rest = self._rest if self._resting else None
        self._drafted_before = None if self._only_copies else step.signals is not None
        if self._only_copies:
            kept = sum([result.n_kept for result in results])
            if not plan.ahead:  # else a pass for the next step is in it
                self._lookup_ms += _LOOKUP_GAIN * (min(propose_ms, _ODD_MS) - self._lookup_ms)
        if rest is not None and rest.alike and (not kept or rest.copied < _COPIED):
            return rest.lasted(self.cost, kept, step_ms)
        if step.signals is not None and step.said is not None:  # else there were no drafts
            drafted = [result for row, result in zip(plan.rows, results, strict=True) if row.max_drafts > 0]
            n_kept = np.array([result.n_kept for result in drafted], dtype=np.int64)
            n_accepted = np.array([len(result.tokens) for result in drafted], dtype=np.int64) - 1
            kept = int(n_kept.sum())
            self.calibrator.learn(step.signals, step.said, n_kept, n_accepted)
        if rest is not None and not kept and rest.reads(load):
            return rest.read(self.cost, load, step.skipped, step_ms)
        passed = step.drafted
        if plan.ahead is not None:  # what was drafted in this step is for the next
            passed = len(plan.ahead), context_of([plan.rows[index] for index in plan.ahead])
        if passed[0]:
            draft_ms = self.cost.draft_ms(*passed, load.greedy)
        plain_ms: tuple[float, float] | None = None
        rested_ms = 0.0
        if self._rest is not None:  # in the order in which they were: what is slow now was slow then, or it was not
            rested_ms = self._rest.learn(self.cost, plan.rows)
        if kept or load.tokens > load.rows:
            plain_ms = self._plain(plan)
        at = load.tokens + kept, load.rows, load.context, step_ms, load.greedy
        predicted_ms = self.cost.observe_step(*at, kept * load.keys_per_draft, load.silent)
        plain_ms = plain_ms or (predicted_ms, predicted_ms / max(load.rows, 1))
        if draft_ms:
            self.cost.observe_draft(*passed, propose_ms, load.greedy)
        report = BudgetReport(predicted_ms, draft_ms, *plain_ms, step.skipped, self.calibrator.error)
        # Predicted: a process that was stopped for a minute earned nothing.
        spent_ms = predicted_ms + draft_ms + rested_ms
        if rest is None:
            weighs = self._per_user or (self._admission is None and self.lookups is None)  # every step
            whoever = self._admission is not None and not self._admission.could_pay
            self._rest = None if weighs else Rest.after(plan, step.rows, load, report, whoever)
        elif not rest.alike:
            rest.looked(load, report)
        self._full.earn(spent_ms)
        if self._admission is not None:
            self._admission.learn(spent_ms, 0.0 if step.probed is None else max(propose_ms - draft_ms, 0.0))
        return report

    def _plain(self, plan: Plan) -> tuple[float, float]:
        """The step without drafts, and, per row, one of its decoding rows alone; in milliseconds."""
        load = self._step.load
        step_ms = load.step_ms(self.cost)
        if load.tokens == load.rows:  # they are alone
            return step_ms, step_ms / load.rows
        decoding = [row for row in plan.rows if row.length == 1 and row.samples]
        if not decoding:
            return step_ms, 0.0
        rows = len(decoding)
        return step_ms, self.cost.step_ms(rows, rows, context_of(decoding), load.greedy) / rows

    def release(self, request_id: str) -> None:
        self._batches.release(request_id)
        if self._admission is not None:
            self._admission.release(request_id)
        self.calibrator.release(request_id)

    def curve(self, max_tokens: int) -> CostCurve | None:
        load = self._step.load
        rows = max(load.rows, 1)
        last = max(max_tokens, rows)
        tokens = np.unique(np.geomspace(rows, last, _CURVE_POINTS).round().astype(np.int64))
        steps = self.cost.step_curve(rows, last, rows, load.context, load.greedy, load.keys_per_draft)
        return CostCurve(
            rows=rows,
            context=load.context,
            tokens=tuple(tokens.tolist()),
            step_ms=tuple(steps[tokens - rows].tolist()),
            draft_ms=self.cost.draft_ms(rows, load.context, load.greedy),
            slowdown=self.cost.slowdown,
        )
