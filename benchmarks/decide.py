"""What the budget itself takes, by rows of 7 drafts each: `admit`, `choose` and `learn` of AutoBudget, microseconds.

Every row has its own rate of acceptance, and some of the drafts are worth verifying: requests, drafts and outcomes are
made up, what decides is the real thing. One thread, no model.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
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
MODES: tuple[VerifyMode, ...] = ("coupled", "rejection")
PARTS = ("admit", "choose", "learn")
_WARM = 60  # steps after which everything that is remembered has its full size


class Steps:
    """Steps of a server with always the same requests, on a machine that says what it was told to say."""

    def __init__(self, rows: int, mode: VerifyMode) -> None:
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

    @staticmethod
    def _step_ms(tokens: int) -> float:
        """Flat, then a price per token, so that there is something to trim."""
        return max(8.0, 0.02 * tokens)

    def step(self) -> tuple[float, ...]:
        """One step; microseconds of admit, choose and learn."""
        planned = Plan(tuple([Row(request, self.start, 1, True, WIDTH) for request in self._requests]))
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


def main(
    quick: Annotated[bool, typer.Option(help="Fewer repetitions, some seconds.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
) -> None:
    """Print microseconds of each part of a decision: median and quartiles."""
    torch.set_num_threads(1)
    steps = 60 if quick else 400
    table = Table(title=f"the budget's host time, {WIDTH} drafts per row, us: median [quartiles]")
    for column in ("verification", "rows", *PARTS, "admit + choose", "mean", "drafts kept"):
        table.add_column(column, justify="right")
    found: list[dict[str, Any]] = []
    for mode in MODES:
        for rows in ROWS:
            served = Steps(rows, mode)
            for _ in range(_WARM):
                served.step()
            times, kept = [], 0
            for _ in range(steps):
                times.append(served.step())
                kept += served.kept
            parts = {name: Spread.of(part) for name, part in zip(PARTS, zip(*times, strict=True), strict=True)}
            sums = [admit + choose for admit, choose, _ in times]
            decision, mean = Spread.of(sums), statistics.fmean(sums)  # one step in several decides anew who drafts
            found.append(
                {"mode": mode, "rows": rows, **parts, "decision": decision, "mean": mean, "kept": kept / steps}
            )
            spreads = [f"{s.median:.0f} [{s.low:.0f}, {s.high:.0f}]" for s in (*parts.values(), decision)]
            table.add_row(mode, str(rows), *spreads, f"{mean:.0f}", f"{kept / steps:.1f} of {rows * WIDTH}")
    Console(width=130).print(table)
    write_json(json_path, {"facts": facts(), "unit": "us", "parts": found})


if __name__ == "__main__":
    typer.run(main)
