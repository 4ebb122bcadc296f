"""The simulator held against this machine: what the real engine serves, and what is simulated of the same requests.

Costs are measured in this run, on each engine, before every round; acceptance is recorded in it, with every block
verified whole, and the budget's own run is then simulated from that. A profile knows a machine in calm moments; other
guests of the same host slow it down: each arm's simulated throughput is divided by the factor by which the steps of the
*other* arms, served by turns with it, took longer than profiled. Must not know: rooflines.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import MODEL
from load import AUTO, FULL, NONE, Arms, Item, workloads
from simulation import Recording, SimulatedEngine, Trace, TracedDrafts, serve

from dspark_serve.cache.pages import PagePool
from dspark_serve.drafters.portfolio import PortfolioDrafter
from dspark_serve.engine.cores import Cores
from dspark_serve.engine.engine import Engine
from dspark_serve.engine.profile import SECONDS, Rig, sweep
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.speculation.calibrate import Calibrator
from dspark_serve.speculation.copying import Lookups
from dspark_serve.speculation.cost import CostModel, Point, Profile
from dspark_serve.speculation.fixed import Budget, KeepAll
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.types import Request, SamplingParams

WITHIN = 0.1  # what the simulator is to keep to


class Shadow:
    """A real engine's settings, from which simulated engines and new budgets are made; measures what it costs.

    calibrator: whose settings new budgets get; None where nothing is drafted.
    """

    def __init__(self, engine: Engine, calibrator: Calibrator | None, seconds: float) -> None:
        self.engine, self._calibrator, self._seconds = engine, calibrator, seconds
        self._cores, self._profiles = Cores(torch.device("cpu")), list[Profile]()

    def measure(self) -> None:
        """Once more: what is known of the costs is the median of all measurements."""
        engine = self.engine
        rig = Rig(engine.info, engine.scheduler, engine.drafter, engine.batcher, engine.runner)
        with self._cores:
            self._profiles.append(sweep(rig, self.costly or None, self._seconds))

    @property
    def costly(self) -> str:
        return self._calibrator.head if self._calibrator is not None else ""

    def costs(self) -> CostModel:
        scheduler, found = self.engine.scheduler, self._profiles
        points = (
            _medians([point for profile in found for point in getattr(profile, curve)])
            for curve in ("steps", "drafts", "greedy_steps", "greedy_drafts")
        )
        return CostModel(Profile(*points), scheduler.max_num_batched_tokens, scheduler.max_num_seqs)

    def budget(self, lookups: Lookups) -> AutoBudget:
        """A budget that has learned nothing yet. lookups: what it is told of texts that repeat themselves."""
        if self._calibrator is None:
            raise ValueError("this engine drafts nothing, so there is no budget to simulate")
        old, name = self._calibrator, self.engine.info.drafter
        calibrator = Calibrator(old.mode, old.width, old.stored, head=old.head, adaptive=old.adaptive)
        return AutoBudget(self.costs(), calibrator, drafter=name, costly=old.head or None, lookups=lookups)

    def simulated(self, decides: bool, trace: Trace, items: list[Item], concurrency: int) -> float:
        """Tokens per second on these requests, their prompts in the prefix cache as in the measurement, with a new
        budget or with every draft kept."""
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
        engine = SimulatedEngine(scheduler, KeepAll(), drafts := TracedDrafts(trace), self.costs())
        serve(engine, _requests([replace(item, new_tokens=1) for item in items], "first-"), concurrency, drain=True)
        if decides:
            engine.budget = self.budget(drafts)
        return serve(engine, _requests(items), concurrency, drain=False).tokens_per_s


def _medians(points: list[Point]) -> tuple[Point, ...]:
    """One for those that were measured again and again."""
    times: dict[Point, list[float]] = {}
    for point in points:
        times.setdefault(replace(point, ms=0.0), []).append(point.ms)
    return tuple(replace(point, ms=statistics.median(several)) for point, several in times.items())


def _requests(items: list[Item], prefix: str = "") -> Iterator[Request]:
    for index, item in enumerate(items):
        params = SamplingParams(temperature=item.temperature, max_tokens=item.new_tokens, ignore_eos=True)
        yield Request(f"{prefix}{index}", item.prompt, params, seed=item.seed)


@dataclass(frozen=True)
class Turn:
    """One round: what was asked, how fast each arm served it, and what was seen of each on the way."""

    items: list[Item]
    rates: dict[str, float]
    seen: dict[str, Recording]


def by_number(trace: Trace, count: int) -> Trace:
    """The same with requests named by their place in the workload: the engine's ids count up."""
    if len(trace.rounds) != count:
        raise ValueError("requests of a token or two draft nothing; ask for more new tokens")
    in_order = sorted(trace.rounds, key=int)
    return replace(trace, rounds={str(index): trace.rounds[name] for index, name in enumerate(in_order)})


def serve_round(
    arms: Arms, shadows: dict[str, Shadow], items: list[Item], concurrency: int, draw: random.Random
) -> Turn:
    """All arms by turns, so that what slows the machine down slows them all."""
    for shadow in set(shadows.values()):
        shadow.measure()
    for engine in arms.engines.values():
        engine.budget = KeepAll()
    at_once = [0.0] * len(items)  # and all find their prompts in the prefix cache
    arms.serve_all([replace(item, new_tokens=1) for item in items], at_once, concurrency, draw)
    seen = {}
    for arm, engine in arms.engines.items():
        budget: Budget = KeepAll()
        if arm == AUTO:
            assert isinstance(engine.drafter, PortfolioDrafter), "as the default model comes"
            budget = shadows[arm].budget(engine.drafter.copies)
        engine.budget = seen[arm] = Recording(budget, Trace(shadows[arm].costly, engine.drafter.width))
    served = arms.serve_all(items, at_once, concurrency, draw)
    return Turn(items, {arm: each.rate for arm, each in served.items()}, seen)


def compare(turns: list[Turn], shadows: dict[str, Shadow], concurrency: int) -> tuple[dict[str, Any], Trace]:
    """Measured and simulated tokens per second of each arm, the medians over the rounds; and the last round's trace."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in shadows}
    for turn in turns:
        trace = by_number(turn.seen[FULL].trace, len(turn.items))
        slowdowns = {arm: seen.slowdown(shadows[arm].costs()) for arm, seen in turn.seen.items()}
        for arm, shadow in shadows.items():
            simulated = shadow.simulated(arm == AUTO, trace, turn.items, concurrency)
            drift = statistics.mean(slowdowns[other] for other in slowdowns if other not in (arm, AUTO))
            found[arm].append(
                {
                    "measured": turn.rates[arm],
                    "simulated": simulated,
                    "slowdown": drift,
                    "ratio": simulated / drift / turn.rates[arm],
                    "ratio_as_profiled": simulated / turn.rates[arm],
                }
            )
    table: dict[str, Any] = {
        arm: {name: statistics.median(row[name] for row in rows) for name in rows[0]} for arm, rows in found.items()
    }
    return {**table, "accepted_length": trace.accepted_length}, trace


def validate(
    loads: list[int], rounds: int, new_tokens: int, seconds: float = SECONDS, keep: Path | None = None
) -> dict[str, Any]:
    """Prints and returns measured and simulated throughput at each concurrency; `keep`: where the last trace goes."""
    arms = Arms(MODEL, 0.6, [])
    if not isinstance(arms.engines[AUTO].budget, AutoBudget):
        raise ValueError("the default model is served without its head here, so there is no budget to simulate")
    calibrator = arms.engines[AUTO].budget.calibrator
    supply = workloads(arms.tokenizer, None, new_tokens, greedy=False)["sample"]
    plain, drafting = Shadow(arms.engines[NONE], None, seconds), Shadow(arms.engines[AUTO], calibrator, seconds)
    shadows = {NONE: plain, FULL: drafting, AUTO: drafting}
    turns: dict[int, list[Turn]] = {load: [] for load in loads}
    for turn in range(rounds):
        for load in loads:
            count, draw = max(6, 2 * load), random.Random(load)
            turns[load].append(serve_round(arms, shadows, supply.items(turn * count, count), load, draw))
    found: dict[str, Any] = {}
    for load in loads:
        found[str(load)], trace = compare(turns[load], shadows, load)
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
            f"    {arm:8} measured {row['measured']:8.1f} tokens/s   simulated {row['simulated']:8.1f}, on a machine "
            f"{row['slowdown']:.2f} times slower {row['simulated'] / row['slowdown']:8.1f}"
            f"   ratio {row['ratio']:.3f}, {verdict} {WITHIN:.0%}",
            flush=True,
        )
