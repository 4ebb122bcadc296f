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

from common import MODEL
from load import AUTO, FULL, NONE, Arms, Item, workloads
from simulation import Recording, SimulatedEngine, Trace, TracedDrafts, serve

from dspark_serve.cache.pages import PagePool
from dspark_serve.engine.engine import Engine
from dspark_serve.engine.profile import SECONDS, Rig, sweep
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.speculation.calibrate import Calibrator
from dspark_serve.speculation.cost import CostModel
from dspark_serve.speculation.policies import AutoBudget, Budget, KeepAll
from dspark_serve.types import Request, SamplingParams

WITHIN = 0.1  # what the simulator is to keep to


class Shadow:
    """A real engine's settings, from which simulated engines and new budgets are made; measures what it costs.

    calibrator: whose settings new budgets get; None where nothing is drafted.
    """

    def __init__(self, engine: Engine, calibrator: Calibrator | None, seconds: float) -> None:
        self.engine, self._calibrator = engine, calibrator
        rig = Rig(engine.info, engine.scheduler, engine.drafter, engine.batcher, engine.runner)
        self.profile = sweep(rig, self.costly or None, seconds)

    @property
    def costly(self) -> str:
        return self._calibrator.head if self._calibrator is not None else ""

    def costs(self) -> CostModel:
        scheduler = self.engine.scheduler
        return CostModel(self.profile, scheduler.max_num_batched_tokens, scheduler.max_num_seqs)

    def budget(self) -> AutoBudget:
        """A budget that has learned nothing yet."""
        if self._calibrator is None:
            raise ValueError("this engine drafts nothing, so there is no budget to simulate")
        old, name = self._calibrator, self.engine.info.drafter
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
        return serve(engine, _requests(items), concurrency, drain=False).tokens_per_s


def _requests(items: list[Item], prefix: str = "") -> Iterator[Request]:
    for index, item in enumerate(items):
        params = SamplingParams(temperature=item.temperature, max_tokens=item.new_tokens, ignore_eos=True)
        yield Request(f"{prefix}{index}", item.prompt, params, seed=item.seed)


class Pair:
    """One arm's measured and simulated tokens per second, round by round, and how slow its steps were by then."""

    def __init__(self) -> None:
        self.measured: list[float] = []
        self.simulated: list[float] = []
        self.slowdown: list[float] = []

    def table(self) -> dict[str, float]:
        ratios = [b / a for a, b in zip(self.measured, self.simulated, strict=True)]
        return {
            "measured": statistics.median(self.measured),
            "simulated": statistics.median(self.simulated),
            "ratio": statistics.median(ratios),
            "slowdown": statistics.median(self.slowdown),
            "ratio_less_drift": statistics.median(b / a for a, b in zip(self.slowdown, ratios, strict=True)),
        }


def measure(
    arms: Arms, arm: str, shadow: Shadow, budget: Budget, items: list[Item], most: int
) -> tuple[float, Recording]:
    """Tokens per second of the real engine under `budget`, and what was seen on the way."""
    seen = Recording(budget, Trace(shadow.costly, shadow.engine.drafter.width), shadow.costs())
    arms.engines[arm].budget = seen
    return arms.serve(arm, items, most).rate, seen


def by_number(trace: Trace, count: int) -> Trace:
    """The same with requests named by their place in the workload: the engine's ids count up."""
    if len(trace.rounds) != count:
        raise ValueError("requests of a token or two draft nothing; ask for more new tokens")
    in_order = sorted(trace.rounds, key=int)
    return replace(trace, rounds={str(index): trace.rounds[name] for index, name in enumerate(in_order)})


def compare(
    arms: Arms, shadows: dict[str, Shadow], items: list[Item], concurrency: int, rounds: int
) -> tuple[dict[str, Any], Trace]:
    """Measured and simulated tokens per second of each arm; rounds take turns, of which the medians are compared."""
    pairs = {NONE: Pair(), FULL: Pair(), AUTO: Pair()}
    for turn in range(rounds):
        count = max(6, 2 * concurrency)
        chosen = [items[(turn * count + i) % len(items)] for i in range(count)]
        for arm in pairs:  # so that all find their prompts in the prefix cache
            first = [replace(item, new_tokens=1) for item in chosen]
            measure(arms, arm, shadows[NONE if arm == NONE else AUTO], KeepAll(), first, concurrency)
        trace = Trace("", 0)
        for arm, pair in pairs.items():
            shadow = shadows[NONE if arm == NONE else AUTO]
            budget = shadow.budget() if arm == AUTO else KeepAll()
            rate, seen = measure(arms, arm, shadow, budget, chosen, concurrency)
            pair.measured.append(rate)
            pair.slowdown.append(seen.slowdown)
            if arm == FULL:
                trace = by_number(seen.trace, len(chosen))
        for arm, pair in pairs.items():
            shadow = shadows[NONE if arm == NONE else AUTO]
            budget = shadow.budget() if arm == AUTO else KeepAll()
            pair.simulated.append(shadow.simulated(budget, trace, chosen, concurrency))
    table: dict[str, Any] = {arm: pair.table() for arm, pair in pairs.items()}
    return {**table, "accepted_length": trace.accepted_length}, trace


def validate(
    loads: list[int], rounds: int, new_tokens: int, seconds: float = SECONDS, keep: Path | None = None
) -> dict[str, Any]:
    """Prints and returns measured and simulated throughput at each concurrency; `keep`: where the last trace goes."""
    arms = Arms(MODEL, 0.6, [])
    if not isinstance(arms.engines[AUTO].budget, AutoBudget):
        raise ValueError("the default model is served without its head here, so there is no budget to simulate")
    calibrator = arms.engines[AUTO].budget.calibrator
    supply = workloads(arms, None, new_tokens, greedy=False)["sample"]
    found: dict[str, Any] = {}
    for load in loads:
        # Anew for each load: on a shared machine what was measured minutes ago is another machine's.
        shadows = {
            NONE: Shadow(arms.engines[NONE], None, seconds),
            AUTO: Shadow(arms.engines[AUTO], calibrator, seconds),
        }
        found[str(load)], trace = compare(arms, shadows, supply, load, rounds)
        show(load, found[str(load)])
        if keep is not None:
            trace.save(keep)
    return found


def show(load: int, table: dict[str, Any]) -> None:
    print(f"  concurrency {load}; {table['accepted_length']:.2f} tokens per whole block")
    for arm in (NONE, FULL, AUTO):
        row = table[arm]
        verdict = "within" if abs(row["ratio"] - 1) <= WITHIN else "NOT within"
        print(
            f"    {arm:8} measured {row['measured']:8.1f} tokens/s   simulated {row['simulated']:8.1f}"
            f"   ratio {row['ratio']:.3f}, {verdict} {WITHIN:.0%}; steps took {row['slowdown']:.2f} times what was "
            f"profiled, without that {row['ratio_less_drift']:.3f}",
            flush=True,
        )
