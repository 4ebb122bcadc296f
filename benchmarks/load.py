"""Throughput under load: no speculation, fixed numbers of drafts, the budget. All arms in one run, interleaved.

Every arm is an engine of its own, of the same weights. They take turns of some steps, each on a clock that runs
while it works, so that a machine that slows down slows down all of them. Where in memory an engine happens to lie makes
its steps up to two percent longer or shorter, so every round has engines of its own, built in another order; they begin
with what those before have learned. All serve the same requests, so texts are compared as well: every other one greedy,
the rest at T=1 (hostile: all at 1.5), or all greedy with --greedy. Answers differ in length and do not end together: in
lockstep many prompts would share a step, as no server sees them. A round ends while the load is still steady: where no
further request is there to start. Prompts: a directory of JSON lines with "turns", else the sample here.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dspark_serve.config import Config  # isort: skip  (before torch: the package decides how threads wait)

from common import MODEL, Spread, facts, figures, write_json
from load_report import conclude, plots, show

from dspark_serve.bench.workload import SHIPPED
from dspark_serve.drafters.portfolio import PortfolioDrafter
from dspark_serve.engine.build import build_engine
from dspark_serve.engine.engine import Engine
from dspark_serve.models.loader import load_model, resolve
from dspark_serve.reports import StepReport
from dspark_serve.text import Tokenizer
from dspark_serve.types import Request, SamplingParams

SETS = ("gsm8k", "humaneval", "mt-bench")
NONE, FULL, AUTO = "none", "full", "budget"
_TURN_S = 0.12  # some steps: what an engine finds in the caches is mostly its own, as on a server
_numbers = itertools.count()  # of requests
_GOLDEN = 0.618034  # answers are of half to one and a half times the mean length, and no two that meet end together
_FEWEST = 12  # requests of a round, or twice as many as are served at once, if nothing else is asked for
_WARM_TOKENS = 8
_ROUNDS = {True: 2, False: 3}  # by whether it is to be quick
_NEW_TOKENS = {True: 24, False: 96}  # of an answer, in the mean
_PROMPTS = (
    48  # of a workload, asked again and again with other seeds: they are in the prefix cache from the second time
)


@dataclass(frozen=True)
class Item:
    """One request of a workload."""

    prompt: tuple[int, ...]
    temperature: float
    new_tokens: int
    seed: int


@dataclass
class Served:
    """What one arm made of a workload."""

    seconds: float = 0.0  # from the first step until there was no further request to start
    tokens: int = 0  # in that time
    texts: dict[int, list[int]] = field(default_factory=dict)
    per_user: list[float] = field(default_factory=list)  # tokens per second of each request that ended
    kept: list[float] = field(default_factory=list)  # drafts verified per row, each step
    misses: list[float] = field(default_factory=list)  # relative error of the predicted step time
    took_ms: float = 0.0  # of the steps in `seconds` whose budget predicts
    plain_ms: float = 0.0  # estimated for the same tokens without speculation, as `/metrics` has it

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def estimate(self) -> float | None:
        """The speed-up by that estimate; None of a budget that does not predict."""
        return self.plain_ms / self.took_ms if self.took_ms else None


class Serving:
    """One engine at work on some requests, on a clock that stands still while others have their turn.

    At most `most` requests at once, none before its time; closed loop where all times are 0. `drain`: those under way
    when there is no further one to start are served as well; else they are cancelled.
    """

    def __init__(self, engine: Engine, items: list[Item], arrivals_s: list[float], most: int, drain: bool) -> None:
        self.served = Served()
        self._engine, self._arrivals_s, self._most, self._drain = engine, arrivals_s, most, drain
        self._waiting = list(enumerate(items))
        self._running: dict[str, int] = {}
        self._started_s: dict[int, float] = {}
        self._clock_s = 0.0

    @property
    def done(self) -> bool:
        return not self._waiting and not self._running

    def advance(self, seconds: float) -> None:
        """Steps until the clock has gone on by `seconds`, or all is done."""
        until_s = self._clock_s + seconds
        while not self.done and self._clock_s < until_s:
            if not self._running and self._waiting:  # nobody is waited for in real time
                self._clock_s = max(self._clock_s, self._arrivals_s[self._waiting[0][0]])
            self._admit()
            if self.done:
                break
            began = time.perf_counter()
            report = self._engine.step()
            self._clock_s += time.perf_counter() - began
            self._note(report)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._most:
            index, item = self._waiting[0]
            if self._arrivals_s[index] > self._clock_s:
                break
            self._waiting.pop(0)
            name = str(next(_numbers))
            self._running[name], self._started_s[index] = index, self._clock_s
            params = SamplingParams(temperature=item.temperature, max_tokens=item.new_tokens, ignore_eos=True)
            self._engine.add(Request(name, item.prompt, params, seed=item.seed))
            if not self._waiting:
                self.served.seconds = self._clock_s
                self.served.tokens = sum(map(len, self.served.texts.values()))
                if not self._drain:
                    for name in self._running:
                        self._engine.cancel(name)
                    self._running.clear()

    def _note(self, report: StepReport) -> None:
        served = self.served
        for delta in report.deltas:
            text = served.texts.setdefault(self._running[delta.request_id], [])
            text.extend(delta.token_ids)
            if delta.finish_reason is not None:
                index = self._running.pop(delta.request_id)
                served.per_user.append(len(text) / (self._clock_s - self._started_s[index]))
        if report.rows:
            served.kept.append(sum(row.n_kept for row in report.rows) / len(report.rows))
        if report.budget is not None:
            predicted_ms = report.budget.predicted_step_ms + report.budget.predicted_draft_ms
            took_ms = sum(report.phase_ms.values())
            served.misses.append(abs(predicted_ms / (took_ms - report.phase_ms["learn"]) - 1))
            if self._waiting and report.plain_ms is not None:
                served.took_ms += took_ms
                served.plain_ms += report.plain_ms


class Arms:
    """An engine per arm."""

    def __init__(
        self, model: str, kv_cache_gib: float, fixed: list[int], dtype: str = "auto", arms: list[str] | None = None
    ) -> None:
        self._options = {"model": {"model": model, "dtype": dtype}, "cache": {"kv_cache_gib": kv_cache_gib}}
        self._resolved = resolve(model)
        # One for all: where in memory a copy of the weights happens to lie makes a step one or two percent longer.
        self._model = load_model(self._resolved, dtype)
        options: dict[str, dict[str, Any]] = {NONE: {"method": "none"}}
        options |= {f"fixed {k}": {"budget": f"fixed:{k}"} for k in fixed}
        options |= {FULL: {"budget": "full"}, AUTO: {}}
        self._arms = {name: made for name, made in options.items() if arms is None or name == NONE or name in arms}
        self.engines = {name: self._engine(speculation) for name, speculation in self._arms.items()}
        tokenizer = Tokenizer.load(self.engines[NONE].info.model_dir)
        assert tokenizer is not None
        self.tokenizer = tokenizer

    def _engine(self, speculation: dict[str, Any]) -> Engine:
        config = Config.model_validate({**self._options, "speculation": speculation})
        return build_engine(config, self._resolved, self._model)

    def renew(self, draw: random.Random) -> None:
        """Other engines in place of these, which know what these have learned."""
        budgets = {name: engine.budget for name, engine in self.engines.items()}
        known = {
            name: (engine.drafter.acceptance, engine.drafter.copies)
            for name, engine in self.engines.items()
            if isinstance(engine.drafter, PortfolioDrafter)
        }
        self.engines.clear()
        gc.unfreeze()
        gc.collect()  # before the new ones need the memory
        made = {name: self._engine(self._arms[name]) for name in draw.sample(list(self._arms), len(self._arms))}
        for name, engine in made.items():
            engine.budget = budgets[name]
            if isinstance(engine.drafter, PortfolioDrafter):
                engine.drafter.take_over(*known[name])
        self.engines = {name: made[name] for name in self._arms}
        gc.collect()
        gc.freeze()  # as the server does: a collection of everything takes a tenth of a second of some arm's time

    def serve_all(
        self, items: list[Item], arrivals_s: list[float], most: int, draw: random.Random, drain: bool = True
    ) -> dict[str, Served]:
        """All arms on the same requests, taking turns."""
        servings = {name: Serving(engine, items, arrivals_s, most, drain) for name, engine in self.engines.items()}
        while left := [serving for serving in servings.values() if not serving.done]:
            for serving in draw.sample(left, len(left)):
                serving.advance(_TURN_S)
        return {name: serving.served for name, serving in servings.items()}


@dataclass(frozen=True)
class Workload:
    """Prompts that are asked one after the other, again and again; with a temperature for every other request."""

    prompts: list[tuple[int, ...]]
    temperatures: tuple[float, float]
    new_tokens: int

    def items(self, first: int, count: int) -> list[Item]:
        """Requests by their number, which is their seed."""
        return [self._item(number) for number in range(first, first + count)]

    def _item(self, number: int) -> Item:
        turn, place = divmod(number, len(self.prompts))
        length = round(self.new_tokens * (0.5 + number * _GOLDEN % 1))
        return Item(self.prompts[place], self.temperatures[(turn + place) % 2], length, number)


def workloads(tokenizer: Tokenizer, prompts: Path | None, new_tokens: int, greedy: bool) -> dict[str, Workload]:
    found: dict[str, list[str]] = {}
    if prompts is None:
        found["sample"] = _turns(SHIPPED)
    else:
        found = {name: _turns(prompts / f"{name}.jsonl") for name in SETS}
        found["mix"] = [text for texts in zip(*found.values(), strict=False) for text in texts]
    words = sorted({word for texts in found.values() for text in texts for word in text.split()})
    draw = random.Random(0)
    hot = 0.0 if greedy else 1.0
    every = {name: (texts, (0.0, hot)) for name, texts in found.items()}
    every["hostile"] = [" ".join(draw.choices(words, k=40)) for _ in range(_PROMPTS)], (1.5, 1.5)
    return {
        name: Workload([_encode(tokenizer, text) for text in texts[:_PROMPTS]], temperatures, new_tokens)
        for name, (texts, temperatures) in every.items()
    }


def _turns(path: Path) -> list[str]:
    return [json.loads(line)["turns"][0] for line in path.read_text(encoding="utf-8").splitlines()]


def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True))


def compare(
    arms: Arms, workload: Workload, concurrency: int, rounds: int, poisson: bool, count: int | None = None
) -> dict[str, Any]:
    """Every arm on the same requests, `count` in a round. Ratios are of the same round."""
    count = count or max(_FEWEST, 2 * concurrency)
    results: dict[str, list[Served]] = {name: [] for name in arms.engines}
    draw = random.Random(concurrency)
    at_once, plain_rate = [0.0] * count, 0.0
    for turn in range(rounds):
        arms.renew(draw)
        chosen = workload.items(turn * count, count)
        # First, prompts into the prefix cache; and the budget meets such requests, as on a server that is up for long.
        arms.serve_all([replace(item, new_tokens=_WARM_TOKENS) for item in chosen], at_once, concurrency, draw)
        if poisson and not turn:
            plain_rate = arms.serve_all(chosen, at_once, concurrency, draw, drain=False)[NONE].rate
        arrivals = at_once
        if poisson:  # at four fifths of what the plain engine was seen to serve
            per_s = 0.8 * plain_rate / statistics.mean(item.new_tokens for item in chosen)
            gaps = [draw.expovariate(per_s) for _ in chosen]
            arrivals = list(itertools.accumulate(gaps, initial=0.0))[:count]
        for name, served in arms.serve_all(chosen, arrivals, concurrency, draw, drain=False).items():
            results[name].append(served)
    plain = results[NONE]
    same = all(_agree(a, b) for served in results.values() for a, b in zip(served, plain, strict=True))
    return {"same_text": same, **{name: _row(served, plain) for name, served in results.items()}}


def _agree(a: Served, b: Served) -> bool:
    """Equal texts, as far as both have come."""
    return all(x == y for index, text in a.texts.items() for x, y in zip(text, b.texts.get(index, ()), strict=False))


def _row(served: list[Served], plain: list[Served]) -> dict[str, Any]:
    """One arm's figures."""
    misses = [miss for each in served for miss in each.misses]
    estimates = [each.estimate for each in served if each.estimate is not None]
    speeds = [[statistics.mean(each.per_user) for each in arm] for arm in (served, plain)]
    return {
        "tokens_per_s": Spread.of([each.rate for each in served]),
        "of_none": Spread.of([a.rate / b.rate for a, b in zip(served, plain, strict=True)]),
        "per_user": Spread.of(speeds[0]),
        "per_user_of_none": Spread.of([a / b for a, b in zip(*speeds, strict=True)]),
        "kept_per_row": statistics.mean(statistics.mean(each.kept) for each in served),
        "predicted_off": statistics.median(misses) if misses else None,
        "estimate_of_none": Spread.of(estimates) if estimates else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--quick", action="store_true", help="concurrency 1, 8, 32; two workloads; fewer arms")
    parser.add_argument("--prompts", type=Path, help=f"directory of {', '.join(SETS)} as .jsonl")
    parser.add_argument("--concurrency", type=int, nargs="+")
    parser.add_argument("--workloads", nargs="+", help="of those there are; default: all")
    parser.add_argument("--arms", nargs="+", help=f"beside {NONE}: 'fixed K', {FULL}, {AUTO}; default: all")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument(
        "--requests", type=int, help=f"of a round; default: {_FEWEST}, or twice as many as are served at once"
    )
    parser.add_argument("--new-tokens", type=int, default=None)
    parser.add_argument("--poisson", action="store_true", help="Poisson arrivals instead of a closed loop")
    parser.add_argument("--greedy", action="store_true", help="no request at T=1")
    parser.add_argument("--dtype", default="auto", help="float32 widens the weights; auto serves them as stored")
    parser.add_argument(
        "--kv-cache-gib", type=float, default=1.5, help="of each arm: where pages run out, prompts are computed twice"
    )
    parser.add_argument("--plots", type=Path, help="directory for pictures")
    parser.add_argument("--json", type=Path, help="written after every cell")
    parser.add_argument("--resume", action="store_true", help="go on with the run whose results are in --json")
    options = parser.parse_args()
    if options.resume and options.json is None:
        parser.error("--resume goes on with what is in --json")
    fixed = [3] if options.quick else [1, 3, 5]
    loads = options.concurrency or ([1, 8, 32] if options.quick else [1, 2, 4, 8, 16, 32, 64])
    if options.requests is not None and options.requests <= max(loads):
        parser.error(
            f"--requests: what is measured ends when the last one begins, so more than {max(loads)} are needed"
        )
    known = {NONE, FULL, AUTO, *(f"fixed {count}" for count in fixed)}
    if unknown := set(options.arms or ()) - known:
        parser.error(f"--arms: there is no {min(unknown)!r}, only {', '.join(sorted(known))}")
    done = resumed(options)
    arms = Arms(options.model, options.kv_cache_gib, fixed, options.dtype, options.arms)
    supply = workloads(
        arms.tokenizer, options.prompts, options.new_tokens or _NEW_TOKENS[options.quick], options.greedy
    )
    names = options.workloads or ([*supply][-2:] if options.quick else [*supply])
    result: dict[str, Any] = {}
    about = facts()
    for name in names:
        for load in loads:
            table = done.get(name, {}).get(str(load))
            if table is None:
                rounds = options.rounds or _ROUNDS[options.quick]
                table = figures(compare(arms, supply[name], load, rounds, options.poisson, options.requests))
            result.setdefault(name, {})[str(load)] = table
            show(f"{name}, concurrency {load}", table)
            write_json(options.json, {"facts": about, "asked": asked(options), "load": result})
    print(about)
    conclude(result)
    if options.plots is not None:
        plots(result, options.plots)


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """What two runs must have in common to be one."""
    return {
        name: str(getattr(options, name))
        for name in ("model", "prompts", "new_tokens", "poisson", "greedy", "dtype", "rounds", "arms", "requests")
    }


def resumed(options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run left in --json, where --resume asks for it."""
    if not options.resume:
        return {}
    try:
        stored = json.loads(options.json.read_text())
    except FileNotFoundError:
        return {}
    if stored["asked"] != asked(options):
        raise SystemExit(f"{options.json} is of a run with other options: {stored['asked']}")
    found: dict[str, Any] = stored["load"]
    return found


if __name__ == "__main__":
    main()
