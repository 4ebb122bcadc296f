"""The budgets one can choose: everything, a fixed number, or what earns the most on this machine now.

Must not know: torch operations, drafters, how requests are scheduled. What `AutoBudget` looks at before it keeps a
draft of a step is, in rejection mode, never that draft nor anything behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dspark_serve.speculation.budget import (
    LEVELS,
    Drafted,
    best_of_curve,
    early_stop,
    lift_slow_rows,
    rows_worth_drafting,
)
from dspark_serve.speculation.calibrate import Calibrator, DraftSignals, temperature_ranges
from dspark_serve.speculation.cost import CostModel
from dspark_serve.tensors import Proposal
from dspark_serve.types import BudgetReport, Plan, Row, RowResult

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_PROBE_SHARE = 0.005  # of the time: drafts for rows that would not earn them, to learn whether they would now
_FULL_SHARE = 0.005  # of the time: whole blocks verified, so that labels are not only of drafts that looked good
_SAMPLES = 64  # rows whose survival is remembered per temperature range
_ENOUGH = 8  # of them before they decide anything
_PROBE_WEIGHT = 4  # a probe is rare, and is news
_OWN_GAIN = 0.2  # of the estimate of a request's own survival, per draft
_OTHERS = 4.0  # drafts of a request's own at which they count as much as those of all
_MOST = 10.0  # times the usual survival
_MARGIN = 0.1, 0.005, 0.03  # of the cost model's noise; least and most


class Budget(Protocol):
    def admit(self, plan: Plan) -> Plan:
        """Before drafting: the plan with drafts taken from the rows that would not earn them."""
        ...

    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        """Drafts to keep per row of plan.drafting, each at most the proposal's n_draft."""
        ...

    def learn(
        self, plan: Plan, proposal: Proposal, results: Sequence[RowResult], phase_ms: Mapping[str, float]
    ) -> BudgetReport | None:
        """After the step; results are of all the plan's rows, with n_kept filled in."""
        ...

    def release(self, request_id: str) -> None:
        """The request is finished; forget it. Unknown ids are fine."""
        ...


class KeepAll:
    """Verify every draft."""

    def admit(self, plan: Plan) -> Plan:
        return plan

    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        return proposal.n_draft

    def learn(
        self, plan: Plan, proposal: Proposal, results: Sequence[RowResult], phase_ms: Mapping[str, float]
    ) -> BudgetReport | None:
        return None

    def release(self, request_id: str) -> None:
        pass


class FixedBudget(KeepAll):
    """Verify the first `count` drafts of every row, or as many as it has."""

    def __init__(self, count: int) -> None:
        self.count = count

    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        return [min(n, self.count) for n in proposal.n_draft]


@dataclass
class _Allowance:
    """A share of the time, saved up and spent on experiments."""

    share: float
    saved_ms: float = 0.0

    def earn(self, ms: float) -> None:
        self.saved_ms += self.share * ms

    def spend(self, cost_ms: float) -> bool:
        """True if the experiment can be paid; never saves up for more than two."""
        self.saved_ms = min(self.saved_ms, 2 * cost_ms)
        if self.saved_ms < cost_ms:
            return False
        self.saved_ms -= cost_ms
        return True


@dataclass(frozen=True)
class _Load:
    """A plan without its drafts, as the cost model sees it."""

    tokens: int
    rows: int
    context: int
    sampling: int  # rows from which a token comes out
    greedy: bool  # all of these

    @staticmethod
    def of(plan: Plan) -> _Load:
        lengths = [row.length for row in plan.rows]
        starts = [row.start for row in plan.rows]
        tokens = sum(lengths)
        greedy = [row.request.params.greedy for row in plan.rows if row.samples]
        return _Load(tokens, len(lengths), tokens + sum(starts), len(greedy), all(greedy))


@dataclass
class _Own:
    """One request's survival, summed over a whole block, of how many blocks, and when it drafted last."""

    survival: float = 0.0
    blocks: int = 0
    step: int = -1


@dataclass
class _Step:
    """What was decided in a step, until its outcome is known."""

    load: _Load
    skipped: dict[str, int] = field(default_factory=dict)
    probed: str | None = None
    signals: DraftSignals | None = None
    said: Floats | None = None


class AutoBudget:
    """Keeps, and lets be made, the drafts with which expected tokens per second are highest.

    costly: the drafter that takes a pass of a model, None if there is none; rows that would not earn it may still
    draft otherwise if `lookup`. drafter: who drafts where a proposal does not say. Per-user speed: see
    `lift_slow_rows`; it looks ahead, so rejection mode raises ValueError.
    """

    def __init__(
        self,
        cost: CostModel,
        calibrator: Calibrator,
        *,
        drafter: str,
        costly: str | None,
        lookup: bool = False,
        tokens_per_s_per_user: float = 0.0,
    ) -> None:
        if tokens_per_s_per_user and calibrator.mode != "coupled":
            raise ValueError("an objective per user needs verify_mode coupled: it looks at all confidences of a step")
        self.cost, self.calibrator = cost, calibrator
        self._drafter, self._costly, self._lookup = drafter, costly, lookup
        self._per_user = tokens_per_s_per_user
        self._probes, self._full = _Allowance(_PROBE_SHARE), _Allowance(_FULL_SHARE)
        self._samples: dict[int, Floats] = {}  # temperature range -> survival of its last rows [samples, width]
        self._summaries: dict[int, Drafted] = {}  # the same as the decision needs it, made when it is needed
        self._own: dict[str, _Own] = {}
        self._steps = 0
        self._step = _Step(_Load(0, 0, 0, 0, True))

    @property
    def margin(self) -> float:
        share, least, most = _MARGIN
        return min(max(share * self.cost.noise, least), most)

    # ---- before the draft

    def admit(self, plan: Plan) -> Plan:
        self._steps += 1
        self._step = step = _Step(_Load.of(plan))
        drafting = plan.drafting
        if not drafting or self._costly is None:
            return plan
        worth = self._worth(drafting, step.load)
        if not worth.all():
            self._probe(drafting, worth, step)
        if worth.all():
            return plan
        step.skipped["acceptance" if worth.any() else "cost"] = int((~worth).sum())
        barred = {row.request.request_id for row, good in zip(drafting, worth.tolist(), strict=True) if not good}
        rows = (self._bar(row) if row.request.request_id in barred else row for row in plan.rows)
        return replace(plan, rows=tuple(rows))

    def _bar(self, row: Row) -> Row:
        return replace(row, lookup_only=True) if self._lookup else replace(row, max_drafts=0)

    def _worth(self, rows: Sequence[Row], load: _Load) -> npt.NDArray[np.bool_]:
        """Rows that earn a draft, going by those of late; rows of which too little is known yet do."""
        limits = np.array([row.max_drafts for row in rows], dtype=np.int64)
        own = [self._own.get(row.request.request_id, _Own()) for row in rows]
        ranges = temperature_ranges([row.request.params.temperature for row in rows])
        kept, gain = np.zeros((2, len(rows), len(LEVELS)))
        known = np.ones(len(rows), dtype=np.bool_)
        for level in np.unique(ranges).tolist():
            mine, samples = ranges == level, self._samples.get(level)
            if samples is None or len(samples) < _ENOUGH:
                known[mine] = False
            else:
                usual = max(float(samples.sum()) / len(samples), 1e-6)
                scale = np.array([_scale(own[row], usual) for row in np.flatnonzero(mine).tolist()])
                if level not in self._summaries:
                    self._summaries[level] = Drafted.of(samples)
                kept[mine], gain[mine] = self._summaries[level].at(LEVELS, scale, limits[mine])
        steps = self.cost.step_curve(load.tokens, load.tokens + int(limits.sum()), load.rows, load.context, load.greedy)
        drafts = self.cost.draft_curve(len(rows), _context(rows), load.greedy)
        return rows_worth_drafting(kept, gain, load.sampling, drafts, steps, self.margin) | ~known

    def _probe(self, rows: Sequence[Row], worth: npt.NDArray[np.bool_], step: _Step) -> None:
        """Let the row that has not drafted for longest draft all the same, if its time has been saved up."""
        known = {index: self._own.get(row.request.request_id, _Own()).step for index, row in enumerate(rows)}
        index = min((i for i in known if not worth[i]), key=lambda i: known[i])
        load, row = step.load, rows[index]
        drafts = self.cost.draft_curve(int(worth.sum()) + 1, _context([row]) * (int(worth.sum()) + 1), load.greedy)
        steps = self.cost.step_curve(load.tokens, load.tokens + row.max_drafts, load.rows, load.context, load.greedy)
        if self._probes.spend(float(drafts[-1] - drafts[-2] + steps[-1] - steps[0])):
            worth[index], step.probed = True, row.request.request_id

    # ---- after the draft, before verification

    def choose(self, plan: Plan, proposal: Proposal) -> Sequence[int]:
        n_draft = np.array(proposal.n_draft, dtype=np.int64)
        total, step = int(n_draft.sum()), self._step
        if not total:
            return proposal.n_draft
        signals = self._signals(plan.drafting, proposal, n_draft)
        step.signals, step.said = signals, self.calibrator.probabilities(signals)
        survival: Floats = step.said.cumprod(1)
        load = step.load
        times = self.cost.step_curve(load.tokens, load.tokens + total, load.rows, load.context, load.greedy)
        draft_ms = self._draft_ms(plan.drafting, signals)
        if self.calibrator.mode == "coupled":
            kept = best_of_curve(survival, load.sampling, draft_ms, times, self.margin)
            if self._per_user:
                kept = lift_slow_rows(kept, survival, draft_ms, times, self._per_user)
        else:
            kept = early_stop(survival, load.sampling, draft_ms, times)
        self._remember(signals, survival, step.probed)
        # Which row is verified whole is settled by counting, never by what it drafted: legal in every mode.
        whole = self._steps % len(n_draft)
        if kept[whole] < n_draft[whole] and self._full.spend(float(times[n_draft[whole]] - times[0])):
            kept[whole] = n_draft[whole]
        if step.probed is not None:
            probed = signals.requests.index(step.probed)
            kept[probed] = n_draft[probed]
        counts: list[int] = kept.tolist()
        return counts

    def _signals(self, rows: Sequence[Row], proposal: Proposal, n_draft: Ints) -> DraftSignals:
        return DraftSignals(
            requests=tuple(row.request.request_id for row in rows),
            kinds=proposal.drafters or (self._drafter,) * len(rows),
            ranges=temperature_ranges([row.request.params.temperature for row in rows]),
            confidence=_host(proposal.confidence),
            largest=_host(proposal.largest),
            n_draft=n_draft,
        )

    def _draft_ms(self, rows: Sequence[Row], signals: DraftSignals) -> float:
        neural = [row for row, kind in zip(rows, signals.kinds, strict=True) if kind == self._costly]
        return self.cost.draft_ms(len(neural), _context(neural), self._step.load.greedy) if neural else 0.0

    def _remember(self, signals: DraftSignals, survival: Floats, probed: str | None) -> None:
        """Survival of whole blocks of the costly drafter, for later decisions whether to draft."""
        costly = np.array([kind == self._costly for kind in signals.kinds]) & (signals.n_draft > 0)
        if not costly.any():
            return
        for level in np.unique(signals.ranges[costly]).tolist():
            mine = costly & (signals.ranges == level)
            before = self._samples.get(level)
            whole = survival[mine & (signals.n_draft == survival.shape[1])]
            if before is not None:
                whole, before = _widen(whole, before.shape[1]), _widen(before, whole.shape[1])
            self._remember_rows(signals, mine, survival)
            news = whole if probed is None else whole.repeat(_PROBE_WEIGHT, axis=0)
            self._summaries.pop(level, None)
            self._samples[level] = (news if before is None else np.concatenate([before, news]))[-_SAMPLES:]

    def _remember_rows(self, signals: DraftSignals, mine: npt.NDArray[np.bool_], survival: Floats) -> None:
        usual = survival[mine].mean(0).cumsum()
        share = usual / max(float(usual[-1]), 1e-6)
        for row in np.flatnonzero(mine).tolist():
            # A request that may draft little is judged as if it had drafted whole blocks, as all others are.
            whole = float(survival[row].sum()) / max(float(share[int(signals.n_draft[row]) - 1]), 1e-3)
            own = self._own.setdefault(signals.requests[row], _Own())
            own.blocks, own.step = own.blocks + 1, self._steps
            own.survival += max(_OWN_GAIN, 1 / own.blocks) * (whole - own.survival)

    # ---- after the step

    def learn(
        self, plan: Plan, proposal: Proposal, results: Sequence[RowResult], phase_ms: Mapping[str, float]
    ) -> BudgetReport | None:
        step, load, rows = self._step, self._step.load, plan.drafting
        drafted = [result for row, result in zip(plan.rows, results, strict=True) if row.max_drafts > 0]
        tokens = load.tokens + sum(result.n_kept for result in drafted)
        predicted_ms = self.cost.step_ms(tokens, load.rows, load.context, load.greedy)
        step_ms = sum(ms for phase, ms in phase_ms.items() if phase != "propose")
        self.cost.observe_step(tokens, load.rows, load.context, step_ms, load.greedy)
        draft_ms = 0.0
        if step.signals is not None and step.said is not None:
            neural = [row for row, kind in zip(rows, step.signals.kinds, strict=True) if kind == self._costly]
            if neural:
                draft_ms = self.cost.draft_ms(len(neural), _context(neural), load.greedy)
                self.cost.observe_draft(len(neural), _context(neural), phase_ms.get("propose", 0.0), load.greedy)
            n_kept = np.array([result.n_kept for result in drafted], dtype=np.int64)
            n_accepted = np.array([len(result.tokens) - 1 for result in drafted], dtype=np.int64)
            self.calibrator.learn(step.signals, step.said, n_kept, n_accepted)
        for allowance in (self._probes, self._full):
            allowance.earn(predicted_ms + draft_ms)  # predicted: a process that was stopped for a minute earned nothing
        return BudgetReport(predicted_ms, draft_ms, step.skipped, self.calibrator.error)

    def release(self, request_id: str) -> None:
        self._own.pop(request_id, None)
        self.calibrator.release(request_id)


def _scale(own: _Own, usual: float) -> float:
    """A request's survival in times of the usual; the less it has drafted, the nearer to 1."""
    return min((own.blocks * own.survival / usual + _OTHERS) / (own.blocks + _OTHERS), _MOST)


def _widen(samples: Floats, width: int) -> Floats:
    return np.pad(samples, ((0, 0), (0, width - samples.shape[1]))) if samples.shape[1] < width else samples


def _context(rows: Sequence[Row]) -> int:
    return sum(row.start + 1 for row in rows)


def _host(signal: Tensor | None) -> Floats | None:
    if signal is None:
        return None
    values: Floats = signal.detach().cpu().numpy().astype(np.float64)
    return values
