"""What the live page draws: counts since the start, the last steps one by one, the cost model's curve.

Fed on the event loop, once per step. Must not know: HTTP, text, how tokens are made, what the page looks like.
"""

from __future__ import annotations

import time
from collections import deque

from pydantic import BaseModel

from dspark_serve.reports import EngineInfo, EngineStats, StepReport
from dspark_serve.server.async_engine import State
from dspark_serve.types import CostCurve, FinishReason, Request

_STEPS = 512  # kept; who asks once a second misses none of a CPU's


class Step(BaseModel):
    """One step of the engine. `predicted_ms` is what the cost model expected of it, drafting not included, as `ms`."""

    tokens: int  # through the target, drafts included
    kept: int  # drafts verified
    accepted: int
    ms: float
    predicted_ms: float | None  # null under a budget that does not predict


class Position(BaseModel):
    """Drafts at one position: `tried` had all before them accepted, and were verified."""

    tried: int
    accepted: int


class Curve(BaseModel):
    """A step's time by its tokens, as the cost model knows it for the present load."""

    rows: int
    context: int
    tokens: list[int]
    step_ms: list[float]
    draft_ms: float
    slowdown: float


class LiveStats(BaseModel):
    """The answer of /stats. Counts are since the start of the server."""

    state: State  # of the engine
    now_s: float  # of a clock that only goes forward
    generated_tokens: int
    running: int
    waiting: int
    kv_used: float  # share of the K/V pages in use
    positions: list[Position]  # by position in the draft
    num_steps: int
    steps: list[Step]  # the last of them, oldest first; those after the step asked for
    curve: Curve | None  # null where no cost model decides


class Live:
    """An observer of the AsyncEngine that keeps what the page draws."""

    def __init__(self) -> None:
        self._steps: deque[Step] = deque(maxlen=_STEPS)
        self._num_steps = self._generated = 0
        self._tried: list[int] = []  # by position in the draft
        self._accepted: list[int] = []

    def on_loaded(self, info: EngineInfo, stats: EngineStats) -> None:
        pass

    def on_submit(self, request: Request) -> None:
        pass

    def on_reject(self, request_id: str) -> None:
        pass

    def on_end(self, request_id: str, reason: FinishReason) -> None:
        pass

    def on_step(self, report: StepReport | None, stats: EngineStats, started_s: float) -> None:
        if report is None or not report.num_tokens:
            return
        self._num_steps += 1
        self._generated += sum(len(delta.token_ids) for delta in report.deltas)
        for row in report.rows:
            self._count(row.n_kept, row.n_accepted)
        self._steps.append(
            Step(
                tokens=report.num_tokens,
                kept=sum(row.n_kept for row in report.rows),
                accepted=sum(row.n_accepted for row in report.rows),
                ms=report.target_ms,
                predicted_ms=None if report.budget is None else report.budget.predicted_step_ms,
            )
        )

    def _count(self, kept: int, accepted: int) -> None:
        """Every draft up to the first that was refused has been tried."""
        tried = min(kept, accepted + 1)
        new = [0] * (tried - len(self._tried))
        self._tried += new
        self._accepted += new
        for place in range(tried):
            self._tried[place] += 1
            self._accepted[place] += place < accepted

    def show(self, state: State, stats: EngineStats, curve: CostCurve | None, after: int) -> LiveStats:
        """What there is to draw; `after`: the number of steps known already."""
        new = max(0, self._num_steps - after)
        return LiveStats(
            state=state,
            now_s=time.monotonic(),
            generated_tokens=self._generated,
            running=stats.num_running,
            waiting=stats.num_waiting,
            kv_used=stats.pages_used / stats.pages_total if stats.pages_total else 0.0,
            positions=[Position(tried=t, accepted=a) for t, a in zip(self._tried, self._accepted, strict=True)],
            num_steps=self._num_steps,
            steps=list(self._steps)[-new:] if new else [],
            curve=None if curve is None else Curve.model_validate(curve, from_attributes=True),
        )
