"""What the budget itself takes, by rows of 7 drafts each: `admit`, `choose` and `learn` of AutoBudget, microseconds.

Every row has its own rate of acceptance, and some of the drafts are worth verifying: requests, drafts and outcomes are
made up, what decides is the real thing. Three situations: always the same rows, all of which draft; always the same,
of which about half are not worth it; rows that change with every step. One thread, no model.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import Spread, facts, write_json
from rich.console import Console
from rich.table import Table

from dspark_serve.speculation.calibrate import Calibrator, sigmoid
from dspark_serve.speculation.cost import CostModel, Point, Profile
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.tensors import Proposal
from dspark_serve.types import Plan, Request, Row, RowResult, SamplingParams, VerifyMode

WIDTH = 7
ROWS = (1, 8, 64, 256)
PRICE_MS = {"same rows": 0.008, "half of them draft": 0.02, "a new row per step": 0.008}  # per token, of 256 rows
MODES: tuple[VerifyMode, ...] = ("coupled", "rejection")
PARTS = ("admit", "choose", "learn")
_WARM = 60  # steps after which everything that is remembered has its full size


class Steps:
    """Steps of a server on a machine that says what it was told to say; `changing`: one request ends with each."""

    def __init__(self, rows: int, mode: VerifyMode, price_ms: float, changing: bool) -> None:
        self._price_ms, self._changing, self._count = price_ms, changing, rows
        tokens = rows * (WIDTH + 1)
        counts = sorted({2**n for n in range(tokens.bit_length())} | {tokens})
        profile = Profile(
            tuple(Point(n, 1, 128, self._step_ms(n)) for n in counts),
            tuple(Point(n, n, 128 * n, 0.5 + 0.002 * n) for n in counts if n <= rows),
        )
        calibrator = Calibrator(mode, WIDTH, head="dspark")
        self.budget = AutoBudget(CostModel(profile, tokens, rows), calibrator, drafter="dspark", costly="dspark")
        self._requests = [Request(f"r{row}", (1,), SamplingParams(), seed=row) for row in range(rows)]
        self._draw = np.random.default_rng(0)
        self._logits = self._draw.normal(1, 0.5, (rows, 1))
        self.start, self.kept = 128, 0

    def _step_ms(self, tokens: int) -> float:
        """Flat, then a price per token, so that there is something to trim."""
        return max(8.0, self._price_ms * tokens)

    def step(self) -> tuple[float, ...]:
        """One step; microseconds of admit, choose and learn."""
        if self._changing:
            self._replace_one()
        bare = tuple([Row(request, self.start, 1, True) for request in self._requests])  # the scheduler has them, too
        planned = Plan(tuple([row._replace(max_drafts=WIDTH) for row in bare]), known_bare=bare)
        marks = [time.perf_counter()]
        plan = self.budget.admit(planned)
        marks.append(time.perf_counter())
        rows = len(plan.drafting)
        odds = sigmoid(self._logits[:rows] + self._draw.normal(0, 0.8, (rows, WIDTH)))
        confidence = torch.from_numpy(odds.astype(np.float32))
        proposal = Proposal(torch.zeros((rows, WIDTH), dtype=torch.int64), (WIDTH,) * rows, confidence=confidence)
        accepted = np.logical_and.accumulate(self._draw.random((rows, WIDTH)) < odds, axis=1).sum(1).tolist()
        before = time.perf_counter()
        kept = self.budget.choose(plan, proposal)
        marks.append(marks[-1] + time.perf_counter() - before)
        outcome = iter(zip(kept, accepted, strict=True))
        results = []
        for row in plan.rows:
            count, right = next(outcome) if row.max_drafts else (0, 0)
            results.append(RowResult((0,) * (min(count, right) + 1), n_kept=count))
        took_ms = {"forward": self._step_ms(len(plan.rows) + sum(kept)), "propose": 0.5 + 0.002 * rows}
        before = time.perf_counter()
        self.budget.learn(plan, proposal, results, took_ms)
        marks.append(marks[-1] + time.perf_counter() - before)
        self.start, self.kept = self.start + 1, sum(kept)
        return tuple((b - a) * 1e6 for a, b in pairwise(marks))

    def _replace_one(self) -> None:
        place, self._count = self._count % len(self._requests), self._count + 1
        self.budget.release(self._requests[place].request_id)
        self._requests[place] = Request(f"r{self._count}", (1,), SamplingParams(), seed=self._count)


def main(
    quick: Annotated[bool, typer.Option(help="Fewer repetitions, some seconds.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
) -> None:
    """Print microseconds of each part of a decision: median and quartiles."""
    torch.set_num_threads(1)
    steps = 60 if quick else 400
    table = Table(title=f"the budget's host time, {WIDTH} drafts per row, us: median [quartiles]")
    for column in ("situation", "verification", "rows", *PARTS, "admit + choose", "mean", "drafts kept"):
        table.add_column(column, justify="right")
    found: list[dict[str, Any]] = []
    for (situation, price_ms), mode, rows in product(PRICE_MS.items(), MODES, ROWS):
        served = Steps(rows, mode, price_ms * max(ROWS) / rows, changing="new" in situation)
        for _ in range(_WARM):
            served.step()
        times, kept = [], 0
        for _ in range(steps):
            times.append(served.step())
            kept += served.kept
        parts = {name: Spread.of(part) for name, part in zip(PARTS, zip(*times, strict=True), strict=True)}
        sums = [admit + choose for admit, choose, _ in times]
        decision, mean = Spread.of(sums), statistics.fmean(sums)  # one step in several decides anew who drafts
        case = {"situation": situation, "mode": mode, "rows": rows}
        found.append({**case, **parts, "decision": decision, "mean": mean, "kept": kept / steps})
        spreads = [f"{s.median:.0f} [{s.low:.0f}, {s.high:.0f}]" for s in (*parts.values(), decision)]
        table.add_row(situation, mode, str(rows), *spreads, f"{mean:.0f}", f"{kept / steps:.1f} of {rows * WIDTH}")
    Console(width=140).print(table)
    write_json(json_path, {"facts": facts(), "unit": "us", "parts": found})


if __name__ == "__main__":
    typer.run(main)
