"""A machine, requests and a drafter in virtual time, for budgets: made-up costs, true rates of acceptance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from dspark_serve.drafters.ready import Ready
from dspark_serve.engine.drafting import DraftAhead
from dspark_serve.speculation.calibrate import Calibrator
from dspark_serve.speculation.cost import CostModel, Point, Profile
from dspark_serve.speculation.fixed import KeepAll
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.tensors import Proposal
from dspark_serve.types import Plan, Request, Row, RowResult, SamplingParams, VerifyMode

WIDTH, LOOKING_MS = 4, 0.05


def cost(step_ms: Callable[[int], float], draft_ms: Callable[[int], float] | None, top: int = 400) -> CostModel:
    steps = tuple(Point(n, 1, 0, step_ms(n)) for n in range(1, top))
    drafts = () if draft_ms is None else tuple(Point(n, n, 0, draft_ms(n)) for n in range(1, 65))
    return CostModel(Profile(steps, drafts), top, 64)


def budget(costs: CostModel, mode: VerifyMode = "coupled", **options: object) -> AutoBudget:
    adaptive = frozenset({"ngram"})
    made = Calibrator(mode, WIDTH, head="head", adaptive=adaptive)
    return AutoBudget(costs, made, drafter="head", costly="head", **options)  # type: ignore[arg-type]


@dataclass
class Repeats:
    """Texts that copy themselves all the time, with one chance of being right; 0: never."""

    found: float

    def promised(self, rows: Sequence[Row], least: float) -> list[tuple[int, list[float]]]:
        if self.found < least or not self.found:
            return []
        chances = [self.found**count for count in range(1, WIDTH + 1)]
        return [(index, chances[: row.max_drafts]) for index, row in enumerate(rows) if row.max_drafts > 0]

    def quiet(self, rows: Sequence[Row]) -> int:
        return 0


@dataclass
class Server:
    """A machine and a drafter in virtual time: every row has a true rate of acceptance, and the drafter knows it."""

    budget: AutoBudget | KeepAll
    step_ms: Callable[[int], float]
    draft_ms: Callable[[int], float]
    rates: list[float]  # per row, acceptance of each draft given the one before
    temperature: float = 1.0
    noise: float = 0.05
    spread: float = 0.0  # of the drafter's confidence around the rate, in logits
    limit: int | None = None  # max_draft_tokens of the requests
    ending: frozenset[str] = frozenset()  # requests with room for one draft before they end
    found: float = 0.5  # acceptance of what rows copy that may not draft otherwise
    ahead: bool = False  # drafts are made at the end of the step before
    now_ms: float = 0.0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)  # rows that drafted, per step
    looked_up: list[int] = field(default_factory=list)  # rows that only looked up
    kept: list[list[int]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        for row in range(len(self.rates)):
            params = SamplingParams(temperature=self.temperature)
            self.requests.append(Request(f"r{row}", (1,), params, seed=row))
        scheduler = SimpleNamespace(next_drafts=lambda request: WIDTH)
        self.early = DraftAhead(None, scheduler, torch.device("cpu"))  # type: ignore[arg-type]

    def step(self) -> None:
        width = WIDTH if self.limit is None else self.limit
        rooms = [1 if request.request_id in self.ending else width for request in self.requests]
        rows = tuple(Row(request, 99, 1, True, room) for request, room in zip(self.requests, rooms, strict=True))
        bare = tuple(row._replace(max_drafts=0) for row in rows)
        plan = Plan(bare if self.budget.quiet(bare) else rows, known_bare=bare)
        plan = self.early.admit(plan, self.budget) if self.ahead else self.budget.admit(plan)
        drafting = plan.drafting
        looking = [row.lookup_only for row in drafting]
        rates = [self.found if row.lookup_only else self.rates[int(row.request.request_id[1:])] for row in drafting]
        logits = np.array([math.log(r / (1 - r)) for r in rates])[:, None]
        shape = (len(rates), width)
        confidence = 1 / (1 + np.exp(-logits - self.draw.normal(0, self.spread, shape))) if rates else np.zeros(shape)
        proposal = Proposal(
            torch.zeros(shape, dtype=torch.int64),
            tuple(row.max_drafts for row in drafting),
            confidence=torch.from_numpy(confidence),
            drafters=tuple("ngram" if look else "head" for look in looking),
        )
        kept = list(self.budget.choose(plan, proposal))
        assert all(0 <= k <= row.max_drafts for k, row in zip(kept, drafting, strict=True))
        took_ms = {"forward": self.step_ms(len(plan.rows) + sum(kept)) * self.disturbance()}
        passes = len(rates) - sum(looking)
        if plan.ahead is not None:
            passes = len(plan.ahead)
            self.early._ready = Ready(Proposal.empty(0), {plan.rows[index].request: (0, 99) for index in plan.ahead})
        took_ms["propose"] = self.draft_ms(passes) * self.disturbance() if passes else 0.01 + LOOKING_MS * len(rates)
        accepted = np.logical_and.accumulate(self.draw.random(shape) < confidence, axis=1).sum(1).tolist()
        outcome = iter(zip(kept, accepted, strict=True))
        results = []
        for row in plan.rows:
            count, right = next(outcome) if row.max_drafts else (0, 0)
            results.append(RowResult((0,) * (min(count, right) + 1), n_kept=count))
        self.budget.learn(plan, proposal, results, took_ms)
        self.now_ms += sum(took_ms.values())
        self.tokens += sum(len(result.tokens) for result in results)
        self.drafted.append(passes)
        self.looked_up.append(sum(looking))
        self.kept.append(kept)

    def disturbance(self) -> float:
        return math.exp(self.draw.normal(0, self.noise))

    def run(self, steps: int) -> float:
        """Tokens per second over these steps."""
        tokens, now_ms = self.tokens, self.now_ms
        for _ in range(steps):
            self.step()
        return (self.tokens - tokens) / (self.now_ms - now_ms) * 1e3


def cheap(tokens: int) -> float:
    return 50 + 1.0 * tokens


def dear(tokens: int) -> float:
    return 60 + 20.0 * tokens


def drafting(rows: int) -> float:
    return 10 + 2.0 * rows


def served(step_ms: Callable[[int], float], rates: Sequence[float], **options: object) -> Server:
    return Server(budget(cost(step_ms, drafting)), step_ms, drafting, list(rates), **options)  # type: ignore[arg-type]
