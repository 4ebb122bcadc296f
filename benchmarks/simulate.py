"""SIMULATION: budget, fixed numbers of drafts and a one-token baseline on machines that are not here, in virtual time.

The scheduler, pages, budget, cost model and calibration are the server's own; what a step takes comes from a roofline
or a measured profile, and which drafts are accepted from given rates or a recorded trace. --validate holds the
simulator against this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dspark_serve.types import LOOKUP, Request, SamplingParams  # isort: skip  (before torch: the package sets how threads wait)

import numpy as np
from common import facts, write_json
from rooflines import DEVICES, MODELS, Machine, Roofline
from simulation import Drafts, Outcome, SimulatedEngine, Trace, TracedDrafts, serve
from synthetic_drafts import SyntheticDrafts, logit_for
from validation import validate

from dspark_serve.cache.pages import PagePool
from dspark_serve.engine.profile import shapes
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.speculation.calibrate import Calibrator
from dspark_serve.speculation.cost import CostModel, Point, Profile, load_profile
from dspark_serve.speculation.fixed import Budget, FixedBudget, KeepAll
from dspark_serve.speculation.policies import AutoBudget

PAPER = (6.11, 5.70, 4.89, 5.13, 5.38, 4.86, 3.64, 3.54, 3.29)  # DSpark paper, Qwen3-4B, T=1, blocks of 7, nine sets
PAPER_WIDTH = 7
NONE, MTP, AUTO = "none", "mtp-1", "budget"
FIXED = (1, 2, 3, 5, 7)
PAGE = 64
LOADS = {"qwen3-8b": [1, 4, 16, 64, 128, 256], "flash-moe": [8, 32, 128, 256, 512, 1024]}


@dataclass(frozen=True)
class Work:
    """What is asked of the simulated server."""

    requests: int = 300  # counted per cell, at least; never fewer than twice the concurrency
    prompt_tokens: int = 513
    new_tokens: int = 64  # mean; answers have between half and one and a half times as many
    prefill: bool = False  # prompts are computed; else they are found in the prefix cache but for their last token
    noise: float = 0.02  # of durations, in logarithms
    seed: int = 0
    long_sweep: bool = False  # see `sampled`

    def __post_init__(self) -> None:
        if min(self.requests, self.prompt_tokens, self.new_tokens) < 1 or self.noise < 0:
            raise ValueError("requests, prompt and new tokens must be at least 1, noise at least 0")


@dataclass(frozen=True)
class Scene:
    """A machine, with what it takes for each arm, and where acceptance comes from."""

    name: str
    about: str
    machines: dict[str, Machine]  # by arm; AUTO's is that of all arms not named
    widths: dict[str, int]  # likewise
    kv_tokens: int
    lengths: tuple[float, ...] = PAPER
    trace: Trace | None = None
    profile: Profile | None = None  # what the budget starts from; None: the machine at the shapes a server measures

    def machine(self, arm: str) -> Machine:
        return self.machines.get(arm, self.machines[AUTO])

    def width(self, arm: str) -> int:
        return self.widths.get(arm, self.widths[AUTO])

    @property
    def arms(self) -> list[str]:
        fixed = [f"fixed {count}" for count in FIXED if count <= self.width(AUTO)]
        return [NONE, *([MTP] if MTP in self.machines else []), *fixed, AUTO]

    def drafts(self, arm: str, seed: int) -> Drafts:
        if self.trace is not None:
            return TracedDrafts(self.trace)
        logits = [logit_for(length, PAPER_WIDTH) for length in self.lengths]
        return SyntheticDrafts(logits, self.width(arm) or 1, seed)


def roofline_scene(name: str, device: str, devices: int | None, lengths: tuple[float, ...]) -> Scene:
    """Raises ValueError where the model does not fit."""
    served, kind = MODELS[name], DEVICES[device]
    count = devices or served.devices
    machines = {
        arm: Roofline(kind, served.target, draft, count)
        for arm, draft in ((NONE, None), (MTP, served.mtp), (AUTO, served.dspark))
    }
    widths = {NONE: 0, MTP: served.mtp.width, AUTO: served.dspark.width}
    about = f"{served.about}; on {count} x {device}"
    return Scene(name, about, {**machines}, widths, machines[AUTO].kv_tokens, lengths)


def profile_scene(path: Path, lengths: tuple[float, ...], trace: Trace | None) -> Scene:
    """The machine whose measured profile lies in `path`. Raises ValueError where that is no profile."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))["key"]
        width, about = int(key["width"]), f"{key['model']} on {key['device']}, {key['threads']} threads, {key['dtype']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no cost profile: {error!r}") from None
    profile = load_profile(path, key)
    if profile is None:
        raise ValueError(f"{path} is no cost profile of this version")
    if not width:
        raise ValueError(f"{path} is of a server without a drafter")
    machine = CostModel(profile, 1 << 13, 256)
    return Scene("profile", about, {AUTO: machine}, {NONE: 0, AUTO: width}, 1 << 22, lengths, trace, profile)


def sampled(machine: Machine, scheduler: Scheduler, width: int, long_sweep: bool = False) -> Profile:
    """What a server on this machine would have measured at start-up: the same shapes, without their noise.

    long_sweep: the largest step that can come as well, where a server's doublings end below it.
    """
    wanted = shapes(SimpleNamespace(drafter=SimpleNamespace(width=width), scheduler=scheduler))  # type: ignore[arg-type]
    steps = [
        s.point(machine.step_ms(s.tokens, s.rows, s.keys, draft_keys=s.draft_keys, silent=s.silent)) for s in wanted
    ]
    tokens = max(point.count for point in steps)
    while long_sweep and tokens < scheduler.max_num_batched_tokens:
        tokens = min(2 * tokens, scheduler.max_num_batched_tokens)
        steps.append(Point(tokens, 1, tokens, machine.step_ms(tokens, 1, tokens, silent=tokens), silent=tokens))
    decoding = [s for s in wanted if s.chunk == 1]
    drafts = [Point(s.rows, s.rows, s.keys, machine.draft_ms(s.rows, s.keys)) for s in decoding]
    return Profile(tuple(steps), tuple(point for point in drafts if point.ms > 0))


def budget_for(arm: str, scene: Scene, scheduler: Scheduler, drafts: Drafts, long_sweep: bool = False) -> Budget:
    if arm != AUTO:
        return FixedBudget(int(arm.split()[1])) if arm.startswith("fixed") else KeepAll()
    width = scene.width(arm)
    profile = scene.profile or sampled(scene.machine(arm), scheduler, width, long_sweep)
    costs = CostModel(profile, scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
    calibrator = Calibrator("coupled", width, head=drafts.costly, adaptive=frozenset({LOOKUP}))
    lookups = drafts if isinstance(drafts, TracedDrafts) else None
    return AutoBudget(costs, calibrator, drafter=drafts.costly, costly=drafts.costly, lookups=lookups)


def requests_of(work: Work, count: int) -> Iterator[Request]:
    draw = np.random.default_rng(work.seed)
    lengths = draw.integers(max(1, work.new_tokens // 2), work.new_tokens + work.new_tokens // 2 + 1, count)
    prompt = (1,) * work.prompt_tokens
    for index, length in enumerate(lengths.tolist()):
        params = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True)
        yield Request(f"r{index}", prompt, params, seed=index)


def run_cell(scene: Scene, arm: str, concurrency: int, work: Work) -> Outcome:
    """One arm at one concurrency. Deterministic, given `work`."""
    length = work.prompt_tokens + 2 * work.new_tokens
    pages = min(scene.kv_tokens // PAGE, max(64, 2 * concurrency * (length // PAGE + 2))) + 1
    drafts = scene.drafts(arm, work.seed)
    scheduler = Scheduler(
        PagePool(pages, PAGE, prefix_caching=not work.prefill),
        max_num_seqs=concurrency,
        max_num_batched_tokens=max(2048, concurrency * (scene.width(arm) + 1)),
        max_model_len=max(length, 4096),  # or a server could not measure the shapes that it would
        max_queue=concurrency + 1,
        vocab_size=2,
        draft_width=0 if arm == NONE else scene.width(arm),
    )
    budget = budget_for(arm, scene, scheduler, drafts, work.long_sweep)
    engine = SimulatedEngine(scheduler, budget, drafts, scene.machine(arm), work.noise, work.seed)
    count = concurrency + max(work.requests, 2 * concurrency)
    # The requests that begin together also end together; by then others have taken their places out of step.
    return serve(engine, requests_of(work, count), concurrency, warm=concurrency)


def entry(outcome: Outcome, none: Outcome, load: int) -> dict[str, Any]:
    rows = max(outcome.row_steps, 1)
    return {
        "tokens_per_s": outcome.tokens_per_s,
        "of_none": outcome.tokens_per_s / none.tokens_per_s,
        "per_user": outcome.tokens_per_s / load,  # as many are served at any moment
        "verified_per_row": 1 + outcome.kept / rows,
        "accepted_per_row": 1 + outcome.accepted / rows,
        "drafting": outcome.drafting / rows,
        "predicted_off": float(np.median(outcome.misses)) if outcome.misses else None,
        "requests": outcome.requests,
    }


def sweep_loads(scene: Scene, arms: list[str], loads: list[int], work: Work, jobs: int) -> dict[str, dict[str, Any]]:
    """Every arm at every load -> by load, by arm. `jobs`: processes, as cells have nothing in common."""
    names = list(dict.fromkeys([NONE, *arms]))
    grid = [(scene, arm, load, work) for load in loads for arm in names]
    found: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(jobs) if jobs > 1 else contextlib.nullcontext() as pool:
        outcomes = iter((map if pool is None else pool.map)(run_cell, *zip(*grid, strict=True)))
        for load in loads:
            here = {arm: next(outcomes) for arm in names}
            found[str(load)] = {arm: entry(outcome, here[NONE], load) for arm, outcome in here.items()}
            show(load, found[str(load)])
    return found


def show(load: int, table: dict[str, Any]) -> None:
    best = max((row["tokens_per_s"] for arm, row in table.items() if arm.startswith("fixed")), default=None)
    print(f"  concurrency {load}")
    for arm, row in table.items():
        line = (
            f"    {arm:8} {row['tokens_per_s']:10.0f} tokens/s   of none {row['of_none']:5.3f}"
            f"   per user {row['per_user']:7.1f}   per request and step: {row['verified_per_row']:.2f} verified, "
            f"{row['accepted_per_row']:.2f} came out"
        )
        if arm == AUTO and best is not None:
            line += f"; of the best fixed {row['tokens_per_s'] / best:.3f}"
        print(line, flush=True)


def faster_at_equal_throughput(found: dict[str, dict[str, Any]], arm: str, baseline: str) -> dict[str, float]:
    """Per-user speed of `arm` over that of `baseline` where that one serves as many tokens in all, by load of `arm`.

    Between its loads the baseline's frontier is taken to be straight; loads beyond its ends are left out.
    """
    line = sorted((by[baseline]["tokens_per_s"], by[baseline]["per_user"]) for by in found.values())
    rates, speeds = [rate for rate, _ in line], [speed for _, speed in line]
    return {
        load: by[arm]["per_user"] / float(np.interp(by[arm]["tokens_per_s"], rates, speeds))
        for load, by in found.items()
        if rates[0] <= by[arm]["tokens_per_s"] <= rates[-1]
    }


def conclude(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The two figures in words: the budget against the load, and the frontier against the baseline."""
    result: dict[str, Any] = {}
    first = next(iter(found.values()))
    if AUTO in first:
        result["verified_per_row"] = {load: by[AUTO]["verified_per_row"] for load, by in found.items()}
        print("  tokens verified per request, anchor included, by concurrency: ", end="")
        print(", ".join(f"{load}: {count:.2f}" for load, count in result["verified_per_row"].items()))
    if AUTO in first and MTP in first:
        gains = faster_at_equal_throughput(found, AUTO, MTP)
        result["per_user_at_equal_throughput"] = gains
        print("  speed of a user over mtp-1's at equal total throughput, by concurrency: ", end="")
        print(", ".join(f"{load}: {gain:.2f}" for load, gain in gains.items()) or "the frontiers do not overlap")
    return result


def plots(results: dict[str, Any], directory: Path) -> None:
    """Per scene, tokens verified per request against concurrency, and total against per-user throughput."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    directory.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        found = result["loads"]
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        loads = [int(load) for load in found]
        left.plot(loads, [found[load].get(AUTO, {}).get("verified_per_row") for load in found], marker="o")
        left.set(xscale="log", xlabel="concurrency", ylabel="tokens verified per request", title=f"{name}: SIMULATION")
        for arm in next(iter(found.values())):
            points = [(by[arm]["per_user"], by[arm]["tokens_per_s"]) for by in found.values()]
            right.plot(*zip(*points, strict=True), marker="o", label=arm)
        right.set(xlabel="tokens/s per user", ylabel="tokens/s", yscale="log", title=result["about"][:60])
        right.legend()
        figure.savefig(directory / f"simulated-{name}.png", dpi=120)


def assumptions(options: argparse.Namespace, work: Work) -> dict[str, Any]:
    return {
        "real": "scheduler, page pool, budget, cost model, calibration: the server's own code and objects",
        "simulated": "the target's passes, the drafts, whether they are accepted, and the clock",
        "left_out": "host time of the server, network, prompts (see work), uneven choice of experts",
        "device": None if options.profile is not None else asdict(DEVICES[options.device]),
        "acceptance": str(options.trace)
        if options.trace is not None
        else f"accepted lengths {options.lengths} of "
        f"blocks of {PAPER_WIDTH}, one per kind of request (default: the DSpark paper's of Qwen3-4B at T=1); the same "
        "odds per slot for other widths, mtp-1 included; confidences are the odds that outcomes are drawn with",
        "work": asdict(work),
    }


def simulate(options: argparse.Namespace, work: Work) -> dict[str, Any]:
    lengths = tuple(options.lengths)
    trace = None if options.trace is None else Trace.load(options.trace)
    if options.profile is not None:
        scenes = [profile_scene(options.profile, lengths, trace)]
    elif trace is not None:
        raise ValueError("--trace needs --profile: it was recorded with one model, and tells of no other")
    else:
        scenes = [roofline_scene(name, options.device, options.devices, lengths) for name in options.models]
    results: dict[str, Any] = {}
    began, requests = time.perf_counter(), 0
    gc.disable()  # nothing here is in cycles, and millions of small objects are looked through again and again
    for scene in scenes:
        print(f"\n{scene.name}: {scene.about}", flush=True)
        arms = scene.arms if options.arms is None else options.arms
        unknown = set(arms) - set(scene.arms)
        if unknown:
            raise ValueError(f"no such arm here: {', '.join(sorted(unknown))}; there are {', '.join(scene.arms)}")
        loads = options.concurrency or LOADS.get(scene.name, [1, 4, 16, 64])
        found = sweep_loads(scene, arms, loads[:: 2 if options.quick else 1], work, options.jobs)
        results[scene.name] = {"about": scene.about, "loads": found, **conclude(found)}
        requests += sum(row["requests"] for by in found.values() for row in by.values())
        gc.collect()
    gc.enable()
    took_s = time.perf_counter() - began
    rate = f"100,000 in {1e5 * took_s / requests:.0f} s"
    print(f"\n{requests} requests simulated in {took_s:.1f} s by {options.jobs} process(es): {rate}")
    return {"scenes": results, "requests": requests, "wall_s": took_s}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100")
    parser.add_argument("--devices", type=int, help="how many share the model; default: one, or a node of 8 for a MoE")
    parser.add_argument("--profile", type=Path, help="a cost profile instead of a roofline: a file of the cache")
    parser.add_argument("--trace", type=Path, help="with --profile: recorded acceptance, see --record")
    parser.add_argument("--lengths", type=float, nargs="+", default=list(PAPER), help="accepted lengths, blocks of 7")
    parser.add_argument("--arms", nargs="+", help=f"of {NONE}, {MTP}, 'fixed K', {AUTO}; default: all")
    parser.add_argument("--concurrency", type=int, nargs="+")
    parser.add_argument("--requests", type=int, default=300, help="counted per cell, at least")
    parser.add_argument("--prompt-tokens", type=int, default=513)
    parser.add_argument("--new-tokens", type=int, default=64, help="mean")
    parser.add_argument("--prefill", action="store_true", help="prompts are computed, not found in the prefix cache")
    parser.add_argument("--long-sweep", action="store_true", help="the budget knows the costs of the largest steps too")
    parser.add_argument("--noise", type=float, default=0.02, help="of durations, in logarithms")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="every other load, fewer requests; validation: one round")
    parser.add_argument("--validate", action="store_true", help="simulated against measured, on this machine")
    parser.add_argument("--rounds", type=int, help="of the validation")
    parser.add_argument("--record", type=Path, help="with --validate: keep the acceptance that was recorded")
    parser.add_argument("--plots", type=Path, help="directory for pictures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if min([options.jobs, *(options.concurrency or [])]) < 1:
        parser.error("--concurrency and --jobs must be at least 1")
    if options.record is not None and not options.validate:
        parser.error("--record keeps what --validate records")
    return options


def main() -> None:
    options = parsed()
    work = Work(
        options.requests,
        options.prompt_tokens,
        options.new_tokens,
        options.prefill,
        options.noise,
        options.seed,
        options.long_sweep,
    )
    if options.quick:
        work = replace(work, requests=min(work.requests, 60))
    if options.validate:
        print("The simulator held against this machine; `measured` is measured, `simulated` is a SIMULATION.")
        loads, rounds = options.concurrency or [1, 4, 16], options.rounds or (1 if options.quick else 3)
        result: dict[str, Any] = {"validation": validate(loads, rounds, work.new_tokens, keep=options.record)}
    else:
        print("SIMULATION: what follows was computed, not measured.")
        about = assumptions(options, work)
        for name, said in about.items():
            print(f"  {name}: {said}")
        result = {"assumptions": about, **simulate(options, work)}
        if options.plots is not None:
            plots(result["scenes"], options.plots)
    machine = facts()
    print(machine)
    write_json(options.json, {"simulation": True, "facts": machine, **result})


if __name__ == "__main__":
    main()
