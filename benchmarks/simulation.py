"""An engine in virtual time: the real scheduler, page pool, budget, cost model and calibration around two stand-ins.

What stands in: a source of drafts that knows which of them the target would accept, and a machine that says what a step
takes instead of taking it. Must not know: where machines and traces come from, what is made of the outcome.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from rooflines import Machine

from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.reports import StepReport
from dspark_serve.speculation.copying import Promised
from dspark_serve.speculation.fixed import Budget
from dspark_serve.tensors import Proposal
from dspark_serve.types import Plan, Request, Row, RowResult

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_FORMAT = 1


class Drafts(Protocol):
    """A drafter that also knows the future."""

    @property
    def costly(self) -> str:
        """Name, in proposals, of the drafter that takes a pass of a model."""
        ...

    def propose(self, rows: Sequence[Row]) -> tuple[Proposal, Ints]:
        """Drafts without tokens, and how many of each row's the target would accept, had all been kept [rows]."""
        ...

    def release(self, request_id: str) -> None: ...


@dataclass(frozen=True)
class Round:
    """One recorded draft. `at`: its anchor's place in the answer, -1 for the prompt's end; `accepted`: of the block."""

    at: int
    drafter: str
    accepted: int
    confidence: tuple[float, ...]  # one per draft
    largest: tuple[float, ...] = ()


@dataclass
class Trace:
    """What a real engine's drafts came to where every block was verified whole: rounds by request, in order."""

    costly: str
    width: int
    rounds: dict[str, list[Round]] = field(default_factory=dict)

    @property
    def accepted_length(self) -> float:
        """Tokens per round, the bonus token included."""
        return 1 + statistics.mean(each.accepted for rounds in self.rounds.values() for each in rounds)

    def save(self, path: Path) -> None:
        rounds = {name: [list(vars(each).values()) for each in mine] for name, mine in self.rounds.items()}
        stored = {"format": _FORMAT, "costly": self.costly, "width": self.width, "rounds": rounds}
        path.write_text(json.dumps(stored) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> Trace:
        """Raises ValueError, in one sentence, for what is no trace."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != _FORMAT:
                raise ValueError(f"format {stored['format']} is not {_FORMAT}")
            rounds = {name: [_round(each) for each in mine] for name, mine in stored["rounds"].items()}
            if not all(rounds.values()) or not rounds:
                raise ValueError("it holds a request without rounds, or none at all")
            return Trace(str(stored["costly"]), int(stored["width"]), rounds)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no acceptance trace: {error}") from None


def _round(stored: list[Any]) -> Round:
    at, drafter, accepted, confidence, largest = stored
    made = Round(at, drafter, accepted, tuple(confidence), tuple(largest))
    if not 0 <= accepted <= len(confidence):
        raise ValueError(f"a round accepts {accepted} of {len(confidence)} drafts")
    return made


@dataclass(frozen=True)
class Timed:
    """A real step as a machine is asked for it, and what it took, drafts aside."""

    tokens: int
    rows: int
    context: int
    greedy: bool
    draft_keys: int
    silent: int
    ms: float


class Recording:
    """A budget with a look at what passes through another. Acceptance is whole only where that is `KeepAll`."""

    def __init__(self, budget: Budget, trace: Trace) -> None:
        self._budget, self.trace = budget, trace
        self.steps: list[Timed] = []
        self.quiet, self.admit = budget.quiet, budget.admit
        self.choose, self.release = budget.choose, budget.release

    def slowdown(self, machine: Machine) -> float:
        """Time that the steps took over what the machine says they would."""
        said_ms = sum(machine.step_ms(*astuple(each)[:-1]) for each in self.steps)
        return sum(each.ms for each in self.steps) / said_ms

    def learn(
        self,
        plan: Plan,
        proposal: Proposal,
        results: Sequence[RowResult],
        phase_ms: Mapping[str, float],
        before_ms: float = 0.0,
    ) -> Any:
        drafted = [(row, result) for row, result in zip(plan.rows, results, strict=True) if row.max_drafts > 0]
        confidence = None if proposal.confidence is None else proposal.confidence.tolist()
        largest = None if proposal.largest is None else proposal.largest.tolist()
        for index, (row, result) in enumerate(drafted):
            count, at = result.n_draft, row.start - row.request.num_prompt
            said = (0.5,) * count if confidence is None else tuple(confidence[index][:count])
            peak = () if largest is None else tuple(largest[index][:count])
            made = Round(at, result.drafter, len(result.tokens) - 1, said, peak)
            self.trace.rounds.setdefault(row.request.request_id, []).append(made)
        took_ms = sum(ms for phase, ms in phase_ms.items() if phase != "propose")
        kept = [result.n_kept for row, result in zip(plan.rows, results, strict=True) if row.max_drafts > 0]
        self.steps.append(Timed(*_step(plan, kept), took_ms))
        return self._budget.learn(plan, proposal, results, phase_ms, before_ms)


class TracedDrafts:
    """Drafts of a recorded run. A request is the recorded one of the same id, or goes round among all.

    An anchor that no recorded round began at takes the next one that did: of the rounds that anchors lie in, the long
    ones have too many. An answer longer than the recorded one begins it anew. Rows that may only look up draft where a
    lookup drafted in the recording.
    """

    def __init__(self, trace: Trace) -> None:
        self.costly, self.width = trace.costly, trace.width
        self._trace, self._names = trace, list(trace.rounds)
        self._starts = {name: [each.at for each in mine] for name, mine in trace.rounds.items()}

    def propose(self, rows: Sequence[Row]) -> tuple[Proposal, Ints]:
        found = [self._find(row) for row in rows]
        counts = tuple(
            0 if row.lookup_only and each.drafter == self.costly else min(len(each.confidence), row.max_drafts)
            for row, each in zip(rows, found, strict=True)
        )
        proposal = Proposal(
            torch.zeros((len(rows), self.width), dtype=torch.int64),
            counts,
            confidence=self._table([each.confidence for each in found]),
            drafters=tuple(each.drafter for each in found),
            largest=self._table([each.largest for each in found]) if any(each.largest for each in found) else None,
        )
        return proposal, np.array([each.accepted for each in found], dtype=np.int64)

    def promised(self, rows: Sequence[Row], least: float) -> Promised:
        """Rows that a lookup drafted for in the recording, with what it said then."""
        promised = []
        for index, row in enumerate(rows):
            if row.max_drafts > 0 and (found := self._find(row)).drafter != self.costly:
                chances = itertools.accumulate(found.confidence[: row.max_drafts], operator.mul)
                if likely := list(itertools.takewhile(lambda chance: chance >= least, chances)):
                    promised.append((index, likely))
        return promised

    def quiet(self, rows: Sequence[Row]) -> int:
        return 0  # a recording is looked up in every step

    def _find(self, row: Row) -> Round:
        name = row.request.request_id
        if name not in self._starts:
            name = self._names[row.request.arrival % len(self._names)]
        rounds = self._trace.rounds[name]
        # An anchor that ends its prompt is at -1.
        place = (row.start - row.request.num_prompt + 1) % (rounds[-1].at + rounds[-1].accepted + 2) - 1
        return rounds[min(bisect.bisect_left(self._starts[name], place), len(rounds) - 1)]

    def _table(self, lines: Sequence[tuple[float, ...]]) -> torch.Tensor:
        padded = [line[: self.width] + (0.0,) * (self.width - len(line)) for line in lines]
        return torch.tensor(padded, dtype=torch.float64)

    def release(self, request_id: str) -> None:
        pass


class SimulatedEngine:
    """The engine's step, part by part, with a clock that is moved and not read.

    noise: standard deviation of the logarithm of every duration around what the machine says.
    """

    def __init__(
        self, scheduler: Scheduler, budget: Budget, drafts: Drafts, machine: Machine, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.scheduler, self.budget, self.drafts, self.machine = scheduler, budget, drafts, machine
        self.now_ms = 0.0
        self._noise, self._draw = noise, np.random.default_rng(seed)

    def step(self) -> StepReport:
        """One step: as the engine's, but that acceptance is looked up and time is added."""
        plan = self.budget.admit(self.scheduler.plan(self.budget.quiet))
        if not plan.rows:
            raise RuntimeError("a step with nothing to do: no request is here, or none fits the pool")
        drafting = plan.drafting
        proposal, right = self.drafts.propose(drafting) if drafting else (Proposal.empty(0), np.zeros(0, np.int64))
        kept = list(self.budget.choose(plan, proposal))
        phase_ms = {"propose": self._draft_ms(drafting, proposal), "forward": self._step_ms(plan, kept)}
        results = self._results(plan, proposal, kept, right.tolist())
        report = self.scheduler.commit(plan, results)
        learned = self.budget.learn(plan, proposal, results, phase_ms)
        for delta in report.deltas:
            if delta.finish_reason is not None:
                self.drafts.release(delta.request_id)
                self.budget.release(delta.request_id)
        self.now_ms += sum(phase_ms.values())
        return replace(report, phase_ms=phase_ms, budget=learned)

    def _results(self, plan: Plan, proposal: Proposal, kept: Sequence[int], right: Sequence[int]) -> list[RowResult]:
        names = proposal.drafters or (self.drafts.costly,) * len(kept)
        outcome = iter(zip(proposal.n_draft, kept, right, names, strict=True))
        results = []
        for row in plan.rows:
            if row.max_drafts:
                n_draft, n_kept, n_right, name = next(outcome)
                results.append(RowResult((0,) * (min(n_kept, n_right) + 1), n_draft, n_kept, drafter=name))
            else:
                results.append(_ONE if row.samples else _NOTHING)
        return results

    def _step_ms(self, plan: Plan, kept: Sequence[int]) -> float:
        return self.machine.step_ms(*_step(plan, kept)) * self._disturbance()

    def _draft_ms(self, rows: Sequence[Row], proposal: Proposal) -> float:
        if proposal.drafters is not None:
            made = zip(rows, proposal.drafters, proposal.n_draft, strict=True)
            rows = [row for row, name, count in made if name == self.drafts.costly and count]
        if not rows:
            return 0.0
        context = sum(row.start + 1 for row in rows)
        return self.machine.draft_ms(len(rows), context, _greedy(rows)) * self._disturbance()

    def _disturbance(self) -> float:
        return math.exp(self._draw.normal(0, self._noise)) if self._noise else 1.0


_ONE, _NOTHING = RowResult((0,)), RowResult()


def _step(plan: Plan, kept: Sequence[int]) -> tuple[int, int, int, bool, int, int]:
    """What a machine is asked: tokens, rows, keys that rows see, whether all are greedy, keys that drafts see, silent
    tokens. kept: of rows that draft."""
    tokens = context = draft_keys = silent = 0
    drafts = iter(kept)
    for row in plan.rows:
        tokens += row.length
        silent += row.length - row.samples
        context += row.start
        if row.max_drafts:
            count = next(drafts)
            tokens += count
            draft_keys += count * (row.start + 1)
    context += sum(row.length for row in plan.rows)
    return tokens, len(plan.rows), context, _greedy(plan.rows), draft_keys, silent


def _greedy(rows: Iterable[Row]) -> bool:
    return all(row.request.params.greedy for row in rows if row.samples)


@dataclass
class Outcome:
    """What was served from the moment the first requests had ended until the supply was used up."""

    tokens: int = 0
    ms: float = 0.0
    steps: int = 0
    row_steps: int = 0
    kept: int = 0
    accepted: int = 0
    drafting: int = 0  # rows that drafted, over all steps
    requests: int = 0  # finished, those before included
    misses: list[float] = field(default_factory=list)  # relative error of predicted step times

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.ms * 1e3

    def note(self, report: StepReport) -> None:
        self.steps += 1
        self.row_steps += len(report.rows)
        for row in report.rows:
            self.kept += row.n_kept
            self.accepted += row.n_accepted
            self.drafting += row.n_draft > 0
        took_ms = sum(report.phase_ms.values())
        self.ms += took_ms
        if report.budget is not None:
            predicted_ms = report.budget.predicted_step_ms + report.budget.predicted_draft_ms
            self.misses.append(abs(predicted_ms / took_ms - 1))


def serve(
    engine: SimulatedEngine, requests: Iterable[Request], concurrency: int, warm: int = 0, drain: bool = False
) -> Outcome:
    """Closed loop: so many requests at once, the next as soon as one ends. The first `warm` that end are not counted.

    Stops when there is no further request to begin, so that the load is the same throughout; `drain` serves the rest.
    """
    supply, outcome = iter(requests), Outcome()
    running: set[str] = set()
    exhausted = False
    while True:
        while not exhausted and len(running) < concurrency:
            request = next(supply, None)
            if request is None:
                exhausted = True
            else:
                engine.scheduler.add(request)
                running.add(request.request_id)
        if not running or (exhausted and not drain):
            break
        report = engine.step()
        counted = outcome.requests >= warm
        if counted:
            outcome.note(report)
        for delta in report.deltas:
            outcome.tokens += counted * len(delta.token_ids)
            if delta.finish_reason is not None:
                running.remove(delta.request_id)
                outcome.requests += 1
    for request_id in sorted(running):
        engine.scheduler.cancel(request_id)
    if not outcome.tokens:
        raise ValueError(f"too few requests for concurrency {concurrency}: nothing was served after the first {warm}")
    return outcome
