"""The simulator held against this machine: what the real engine serves, and what is simulated of the same requests.

Costs are measured in this run, on each engine; acceptance is recorded in it, with every block verified whole, and the
budget's own run is then simulated from that. Must not know: rooflines.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from load import AUTO, NONE, Arms, Item, workloads
from simulation import Recording, SimulatedEngine, Trace, TracedDrafts, serve

from dspark_serve.cache.pages import PagePool
from dspark_serve.engine.engine import Engine
from dspark_serve.engine.profile import SECONDS, Rig, sweep
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.speculation.calibrate import Calibrator
from dspark_serve.speculation.cost import CostModel, Profile
from dspark_serve.speculation.policies import AutoBudget, Budget, KeepAll
from dspark_serve.types import Request, SamplingParams

FULL = "full"
WITHIN = 0.1  # what the simulator is to keep to


class Shadow:
    """A real engine's settings, from which simulated engines and new budgets are made."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.engine = engine
        self._auto = engine.budget.calibrator if isinstance(engine.budget, AutoBudget) else None
        rig = Rig(engine.info, engine.scheduler, engine.drafter, engine.batcher, engine.runner)
        self.profile = sweep(rig, self.costly or None, seconds)

    @property
    def costly(self) -> str:
        return self._auto.head if self._auto is not None else ""

    def costs(self) -> CostModel:
        scheduler = self.engine.scheduler
        return CostModel(self.profile, scheduler.max_num_batched_tokens, scheduler.max_num_seqs)

    def budget(self) -> AutoBudget:
        """A budget that has learned nothing yet."""
        if self._auto is None:
            raise ValueError("this engine drafts nothing, so there is no budget to simulate")
        old, name = self._auto, self.engine.info.drafter
        calibrator = Calibrator(old.mode, old.width, old.stored, head=old.head, adaptive=old.adaptive)
        lookup = name == "portfolio"
        return AutoBudget(self.costs(), calibrator, drafter=name, costly=old.head or None, lookup=lookup)

    def simulated(self, budget: Budget, trace: Trace, items: list[Item], concurrency: int) -> float:
        """Tokens per second on these requests, their prompts in the prefix cache as in the measurement."""
        real = self.engine.scheduler
        scheduler = Scheduler(
            PagePool(real.pool.num_pages, real.pool.page_size, real.pool.prefix_caching),
            max_num_seqs=real.max_num_seqs,
            max_num_batched_tokens=real.max_num_batched_tokens,
            max_model_len=real.max_model_len,
            max_queue=real.max_queue,
            vocab_size=real.vocab_size,
            draft_width=real.draft_width,
            max_prefill_chunk=real.max_prefill_chunk,
        )
        engine = SimulatedEngine(scheduler, KeepAll(), TracedDrafts(trace), self.costs())
        serve(engine, _requests([replace(item, new_tokens=1) for item in items], "first-"), concurrency, drain=True)
        engine.budget = budget
        return serve(engine, _requests(items), concurrency, drain=True).tokens_per_s


def _requests(items: list[Item], prefix: str = "") -> Iterator[Request]:
    for index, item in enumerate(items):
        params = SamplingParams(temperature=item.temperature, max_tokens=item.new_tokens, ignore_eos=True)
        yield Request(f"{prefix}{index}", item.prompt, params, seed=item.seed)


def record(arms: Arms, costly: str, items: list[Item], concurrency: int) -> tuple[Trace, float]:
    """Rounds of these requests by their number, and tokens per second, with every block verified whole."""
    trace = Trace(costly, arms.drafting.drafter.width)
    arms.budgets[FULL] = Recording(KeepAll(), trace)
    rate = arms.serve(FULL, items, [0.0] * len(items), concurrency).rate
    # The engine's ids count up; the recording knows requests by their place in the workload.
    in_order = sorted(trace.rounds, key=int)
    if len(in_order) != len(items):
        raise ValueError("requests of a token or two draft nothing; ask for more new tokens")
    trace.rounds = {str(index): trace.rounds[name] for index, name in enumerate(in_order)}
    return trace, rate


def compare(
    arms: Arms, shadows: dict[str, Shadow], items: list[Item], concurrency: int, rounds: int
) -> tuple[dict[str, Any], Trace]:
    """Measured and simulated tokens per second of each arm; rounds take turns, of which the medians are compared."""
    measured: dict[str, list[float]] = {NONE: [], FULL: [], AUTO: []}
    simulated: dict[str, list[float]] = {NONE: [], FULL: [], AUTO: []}
    slowdowns: list[float] = []
    plain, drafting = shadows[NONE], shadows[AUTO]
    for turn in range(rounds):
        chosen = [items[(turn * concurrency * 2 + i) % len(items)] for i in range(max(2, concurrency * 2))]
        for name in (NONE, AUTO):  # so that all arms find their prompts in the prefix cache
            arms.serve(name, [replace(item, new_tokens=1) for item in chosen], [0.0] * len(chosen), concurrency)
        trace, rate = record(arms, drafting.costly, chosen, concurrency)
        measured[FULL].append(rate)
        measured[NONE].append(arms.serve(NONE, chosen, [0.0] * len(chosen), concurrency).rate)
        arms.budgets[AUTO] = budget = drafting.budget()
        measured[AUTO].append(arms.serve(AUTO, chosen, [0.0] * len(chosen), concurrency).rate)
        slowdowns.append(budget.cost.slowdown)
        for name, shadow, chooses in (
            (NONE, plain, KeepAll()),
            (FULL, drafting, KeepAll()),
            (AUTO, drafting, drafting.budget()),
        ):
            simulated[name].append(shadow.simulated(chooses, trace, chosen, concurrency))
    table: dict[str, Any] = {
        name: {
            "measured": statistics.median(measured[name]),
            "simulated": statistics.median(simulated[name]),
            "ratio": statistics.median(b / a for a, b in zip(measured[name], simulated[name], strict=True)),
        }
        for name in measured
    }
    table["slowdown"] = statistics.median(slowdowns)
    table["accepted_length"] = trace.accepted_length
    return table, trace


def validate(
    loads: list[int], rounds: int, new_tokens: int, seconds: float = SECONDS, keep: Path | None = None
) -> dict[str, Any]:
    """Prints and returns measured and simulated throughput at each concurrency; `keep`: where the last trace goes."""
    arms = Arms(0.6, [])
    supply = workloads(arms, None, new_tokens, greedy=False)["sample"]
    shadows = {NONE: Shadow(arms.plain, seconds), AUTO: Shadow(arms.drafting, seconds)}
    found: dict[str, Any] = {}
    for load in loads:
        table, trace = compare(arms, shadows, supply, load, rounds)
        found[str(load)] = table
        print(
            f"  concurrency {load}; {table['accepted_length']:.2f} tokens per whole block; at the end the machine was "
            f"{table['slowdown']:.2f} times as slow as when it was profiled"
        )
        for name in (NONE, FULL, AUTO):
            row = table[name]
            verdict = "within" if abs(row["ratio"] - 1) <= WITHIN else "NOT within"
            print(
                f"    {name:8} measured {row['measured']:8.1f} tokens/s   simulated {row['simulated']:8.1f}"
                f"   ratio {row['ratio']:.3f}, {verdict} {WITHIN:.0%}",
                flush=True,
            )
        if keep is not None:
            trace.save(keep)
    return found
