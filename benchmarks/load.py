"""Throughput under load: no speculation, fixed numbers of drafts, the budget. All arms in one run, interleaved.

Every arm is an engine of its own. They take turns of a quarter of a second, each on a clock that runs while it works,
so that a machine that slows down slows down all of them. All serve the same requests, so texts are compared as well:
every other one greedy, the rest at T=1 (hostile: all at 1.5), or all greedy with --greedy. Answers differ in length,
and tokens per second are those of the time in which the load was steady: until the last request started. Prompts: a
directory of JSON lines with "turns", else the sample here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dspark_serve.config import Config  # isort: skip  (before torch: the package decides how threads wait)

from common import MODEL, Spread, facts, write_json

from dspark_serve.bench.workload import SHIPPED
from dspark_serve.engine.build import build_engine
from dspark_serve.engine.engine import Engine
from dspark_serve.text import Tokenizer
from dspark_serve.types import Request, SamplingParams, StepReport

SETS = ("gsm8k", "humaneval", "mt-bench")
NONE, FULL, AUTO = "none", "full", "budget"
_TURN_S = 0.04
_numbers = itertools.count()  # of requests
_LENGTHS = (4, 2, 5, 3, 6)  # of answers, in quarters of the mean
_FEWEST = 6  # requests
_WARM_TOKENS = 8


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

    seconds: float = 0.0  # from the first step until the last request was admitted
    tokens: int = 0  # in that time
    texts: dict[int, list[int]] = field(default_factory=dict)
    per_user: list[float] = field(default_factory=list)  # tokens per second of each request, from its first step
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

    At most `most` requests at once, none before its time; closed loop where all times are 0.
    """

    def __init__(self, engine: Engine, items: list[Item], arrivals_s: list[float], most: int) -> None:
        self.served = Served()
        self._engine, self._arrivals_s, self._most = engine, arrivals_s, most
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
            served.misses.append(abs(predicted_ms / took_ms - 1))
            if self._waiting and report.plain_ms is not None:
                served.took_ms += took_ms
                served.plain_ms += report.plain_ms


class Arms:
    """An engine per arm."""

    def __init__(
        self, model: str, kv_cache_gib: float, fixed: list[int], dtype: str = "auto", arms: list[str] | None = None
    ) -> None:
        self._options = {"model": {"model": model, "dtype": dtype}, "cache": {"kv_cache_gib": kv_cache_gib}}
        options: dict[str, dict[str, Any]] = {NONE: {"method": "none"}}
        options |= {f"fixed {k}": {"budget": f"fixed:{k}"} for k in fixed}
        options |= {FULL: {"budget": "full"}, AUTO: {}}
        wanted = [name for name in options if arms is None or name == NONE or name in arms]
        self.engines = {name: self._engine(options[name]) for name in wanted}
        tokenizer = Tokenizer.load(self.engines[NONE].info.model_dir)
        assert tokenizer is not None
        self.tokenizer = tokenizer

    def _engine(self, speculation: dict[str, Any]) -> Engine:
        return build_engine(Config.model_validate({**self._options, "speculation": speculation}))

    def serve(self, arm: str, items: list[Item], most: int) -> Served:
        """One arm alone, closed loop."""
        serving = Serving(self.engines[arm], items, [0.0] * len(items), most)
        serving.advance(math.inf)
        return serving.served

    def serve_all(
        self, items: list[Item], arrivals_s: list[float], most: int, draw: random.Random
    ) -> dict[str, Served]:
        """All arms on the same requests, taking turns."""
        servings = {name: Serving(engine, items, arrivals_s, most) for name, engine in self.engines.items()}
        while left := [serving for serving in servings.values() if not serving.done]:
            for serving in draw.sample(left, len(left)):
                serving.advance(_TURN_S)
        return {name: serving.served for name, serving in servings.items()}


def workloads(arms: Arms, prompts: Path | None, new_tokens: int, greedy: bool) -> dict[str, list[Item]]:
    """Requests by workload, an endless supply of each being made by going round."""
    found: dict[str, list[str]] = {}
    if prompts is None:
        found["sample"] = _turns(SHIPPED)
    else:
        found = {name: _turns(prompts / f"{name}.jsonl") for name in SETS}
        found["mix"] = [text for texts in zip(*found.values(), strict=False) for text in texts]
    hot = 0.0 if greedy else 1.0
    items = {
        name: [_item(arms, text, (0.0, hot)[number % 2], new_tokens, number) for number, text in enumerate(texts)]
        for name, texts in found.items()
    }
    words = sorted({word for texts in found.values() for text in texts for word in text.split()})
    draw = random.Random(0)
    nonsense = [" ".join(draw.choices(words, k=40)) for _ in range(64)]
    items["hostile"] = [_item(arms, text, 1.5, new_tokens, number) for number, text in enumerate(nonsense)]
    return items


def _turns(path: Path) -> list[str]:
    return [json.loads(line)["turns"][0] for line in path.read_text(encoding="utf-8").splitlines()]


def _item(arms: Arms, text: str, temperature: float, new_tokens: int, seed: int) -> Item:
    tokens = arms.tokenizer.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True)
    return Item(tuple(tokens), temperature, new_tokens * _LENGTHS[seed % len(_LENGTHS)] // 4, seed)


def compare(arms: Arms, items: list[Item], concurrency: int, rounds: int, poisson: bool) -> dict[str, Any]:
    """Every arm on the same requests. Ratios are of the same round."""
    count = max(_FEWEST, 2 * concurrency)
    results: dict[str, list[Served]] = {name: [] for name in arms.engines}
    draw = random.Random(concurrency)
    for turn in range(rounds):
        chosen = [items[(turn * count + i) % len(items)] for i in range(count)]
        arrivals = [0.0] * count
        if poisson and results[NONE]:  # at four fifths of what the plain engine was seen to serve
            per_s = 0.8 * results[NONE][-1].rate / statistics.mean(item.new_tokens for item in chosen)
            gaps = [draw.expovariate(per_s) for _ in chosen]
            arrivals = [sum(gaps[:index]) for index in range(count)]
        # First, prompts into the prefix cache; and the budget meets such requests, as on a server that is up for long.
        arms.serve_all([replace(item, new_tokens=_WARM_TOKENS) for item in chosen], [0.0] * count, concurrency, draw)
        for name, served in arms.serve_all(chosen, arrivals, concurrency, draw).items():
            results[name].append(served)
    plain = results[NONE]
    same = all(a.texts == b.texts for served in results.values() for a, b in zip(served, plain, strict=True))
    table: dict[str, Any] = {"same_text": same}
    for name, served in results.items():
        misses = [miss for each in served for miss in each.misses]
        estimates = [each.estimate for each in served if each.estimate is not None]
        table[name] = {
            "tokens_per_s": Spread.of([each.rate for each in served]),
            "per_user": Spread.of([statistics.mean(each.per_user) for each in served]),
            "of_none": Spread.of([a.rate / b.rate for a, b in zip(served, plain, strict=True)]),
            "kept_per_row": statistics.mean(statistics.mean(each.kept) for each in served),
            "predicted_off": statistics.median(misses) if misses else None,
            "estimate_of_none": Spread.of(estimates) if estimates else None,
        }
    return table


def show(label: str, table: dict[str, Any]) -> None:
    print(f"\n{label}; texts {'identical' if table['same_text'] else 'DIFFER'}")
    for name, row in table.items():
        if name != "same_text":
            estimate = row["estimate_of_none"]
            print(
                f"  {name:9} {row['tokens_per_s']!s:>34} tokens/s   of none {row['of_none'].median:.3f}"
                + (f" (estimated {estimate.median:.3f})" if estimate else "")
                + f"   per user {row['per_user'].median:.1f}   kept {row['kept_per_row']:.2f}"
            )


def plots(result: dict[str, Any], directory: Path) -> None:
    """Throughput against concurrency and against per-user speed; mean budget against concurrency."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    for workload, by_load in result.items():
        figure = Figure(figsize=(13, 4), layout="constrained")
        panels = figure.subplots(1, 3)
        loads = [int(load) for load in by_load]
        for name in (n for n in next(iter(by_load.values())) if n != "same_text"):
            rates = [by_load[load][name]["tokens_per_s"].median for load in by_load]
            panels[0].plot(loads, rates, marker="o", label=name)
            panels[1].plot([by_load[load][name]["per_user"].median for load in by_load], rates, marker="o")
            panels[2].plot(loads, [by_load[load][name]["kept_per_row"] for load in by_load], marker="o")
        panels[0].set(xlabel="concurrency", ylabel="tokens/s", title=workload)
        panels[1].set(xlabel="tokens/s per user", ylabel="tokens/s")
        panels[2].set(xlabel="concurrency", ylabel="drafts verified per row")
        panels[0].legend()
        figure.savefig(directory / f"load-{workload}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--quick", action="store_true", help="concurrency 1, 8, 32; two workloads; fewer arms")
    parser.add_argument("--prompts", type=Path, help=f"directory of {', '.join(SETS)} as .jsonl")
    parser.add_argument("--concurrency", type=int, nargs="+")
    parser.add_argument("--workloads", nargs="+", help="of those there are; default: all")
    parser.add_argument("--arms", nargs="+", help=f"beside {NONE}: 'fixed K', {FULL}, {AUTO}; default: all")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--new-tokens", type=int, default=None)
    parser.add_argument("--poisson", action="store_true", help="Poisson arrivals instead of a closed loop")
    parser.add_argument("--greedy", action="store_true", help="no request at T=1")
    parser.add_argument("--dtype", default="auto", help="float32 widens the weights; auto serves them as stored")
    parser.add_argument(
        "--kv-cache-gib", type=float, default=1.5, help="of each arm: where pages run out, prompts are computed twice"
    )
    parser.add_argument("--plots", type=Path, help="directory for pictures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    fixed = [3] if options.quick else [1, 3, 5]
    known = {NONE, FULL, AUTO, *(f"fixed {count}" for count in fixed)}
    if unknown := set(options.arms or ()) - known:
        parser.error(f"--arms: there is no {min(unknown)!r}, only {', '.join(sorted(known))}")
    arms = Arms(options.model, options.kv_cache_gib, fixed, options.dtype, options.arms)
    supply = workloads(arms, options.prompts, options.new_tokens or (24 if options.quick else 96), options.greedy)
    names = options.workloads or ([*supply][-2:] if options.quick else [*supply])
    loads = options.concurrency or ([1, 8, 32] if options.quick else [1, 2, 4, 8, 16, 32, 64])
    result: dict[str, Any] = {}
    for name in names:
        for load in loads:
            rounds = options.rounds or (2 if options.quick else 5)
            table = compare(arms, supply[name], load, rounds, options.poisson)
            result.setdefault(name, {})[str(load)] = table
            show(f"{name}, concurrency {load}", table)
    about = facts()
    print(about)
    if options.plots is not None:
        plots(result, options.plots)
    write_json(options.json, {"facts": about, "poisson": options.poisson, "load": result})


if __name__ == "__main__":
    main()
