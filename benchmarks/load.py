"""Throughput under load: no speculation, fixed numbers of drafts, the budget. All arms in one run, interleaved.

Two engines share the run, one without a drafter and one whose budget is exchanged between arms. Every arm serves the
same requests, so texts are compared as well: every other one greedy, the rest at T=1 (hostile: all at 1.5), or all
greedy with --greedy. Answers differ in length, and tokens per second are those of the time in which the load was
steady: until the last request started. Prompts: a directory of JSON lines with "turns", else the sample here.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dspark_serve.config import Config  # isort: skip  (before torch: the package decides how threads wait)

from common import HERE, Spread, facts, write_json

from dspark_serve.engine.build import build_engine
from dspark_serve.engine.engine import Engine
from dspark_serve.speculation.policies import Budget, FixedBudget, KeepAll
from dspark_serve.text import Tokenizer
from dspark_serve.types import Request, SamplingParams

MODEL = "smollm2-135m-instruct"
SETS = ("gsm8k", "humaneval", "mt-bench")
NONE, AUTO = "none", "budget"
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

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Arms:
    def __init__(self, kv_cache_gib: float, fixed: list[int], dtype: str = "auto") -> None:
        self.plain = self._engine(kv_cache_gib, dtype, {"method": "none"})
        self.drafting = self._engine(kv_cache_gib, dtype, {})
        auto = self.drafting.budget
        self.budgets: dict[str, Budget] = {f"fixed {k}": FixedBudget(k) for k in fixed}
        self.budgets |= {"full": KeepAll(), AUTO: auto}
        tokenizer = Tokenizer.load(self.plain.info.model_dir)
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self._count = 0

    @staticmethod
    def _engine(kv_cache_gib: float, dtype: str, speculation: dict[str, Any]) -> Engine:
        model = {"model": MODEL, "dtype": dtype}
        options = {"model": model, "cache": {"kv_cache_gib": kv_cache_gib}, "speculation": speculation}
        return build_engine(Config.model_validate(options))

    def serve(self, arm: str, items: list[Item], arrivals_s: list[float], most: int) -> Served:
        """At most `most` requests at once, none before its time; closed loop where all times are 0."""
        engine = self.plain if arm == NONE else self.drafting
        if arm != NONE:
            engine.budget = self.budgets[arm]
        served, began = Served(), time.perf_counter()
        waiting, running, started = list(enumerate(items)), {}, {}
        while waiting or running:
            now_s = time.perf_counter() - began
            while waiting and len(running) < most and arrivals_s[waiting[0][0]] <= now_s:
                index, item = waiting.pop(0)
                self._count += 1
                running[str(self._count)], started[index] = index, now_s
                params = SamplingParams(temperature=item.temperature, max_tokens=item.new_tokens, ignore_eos=True)
                engine.add(Request(str(self._count), item.prompt, params, seed=item.seed))
            if not waiting and not served.seconds and served.texts:
                served.seconds, served.tokens = now_s, sum(map(len, served.texts.values()))
            if not running:
                time.sleep(max(0.0, arrivals_s[waiting[0][0]] - now_s))
                continue
            self._note(engine, served, running, started, began)
        return served

    @staticmethod
    def _note(engine: Engine, served: Served, running: dict[str, int], started: dict[int, float], began: float) -> None:
        report = engine.step()
        for delta in report.deltas:
            text = served.texts.setdefault(running[delta.request_id], [])
            text.extend(delta.token_ids)
            if delta.finish_reason is not None:
                index = running.pop(delta.request_id)
                served.per_user.append(len(text) / (time.perf_counter() - began - started[index]))
        if report.rows:
            served.kept.append(sum(row.n_kept for row in report.rows) / len(report.rows))
        if report.budget is not None:
            predicted_ms = report.budget.predicted_step_ms + report.budget.predicted_draft_ms
            served.misses.append(abs(predicted_ms / sum(report.phase_ms.values()) - 1))


def workloads(arms: Arms, prompts: Path | None, new_tokens: int, greedy: bool) -> dict[str, list[Item]]:
    """Requests by workload, an endless supply of each being made by going round."""
    found: dict[str, list[str]] = {}
    if prompts is None:
        found["sample"] = _turns(HERE / "prompts.jsonl")
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
    """Every arm on the same requests, in a new order each round. Ratios are of the same round, so drift hits both."""
    names, count = [NONE, *arms.budgets], max(_FEWEST, 2 * concurrency)
    results: dict[str, list[Served]] = {name: [] for name in names}
    draw = random.Random(concurrency)
    for turn in range(rounds):
        chosen = [items[(turn * count + i) % len(items)] for i in range(count)]
        arrivals = [0.0] * len(chosen)
        if poisson and results[NONE]:  # at four fifths of what the plain engine was seen to serve
            per_s = 0.8 * results[NONE][-1].rate / statistics.mean(item.new_tokens for item in chosen)
            arrivals = [0.0]
            for _ in chosen[1:]:
                arrivals.append(arrivals[-1] + draw.expovariate(per_s))
        # Arms share an engine and its prefix cache: all find their prompts there, or the first would pay for all. And
        # the budget has met such requests before, as it has on a server that has been up for a minute.
        for name in (NONE, AUTO):
            short = [replace(item, new_tokens=_WARM_TOKENS) for item in chosen]
            arms.serve(name, short, [0.0] * len(chosen), concurrency)
        for name in draw.sample(names, len(names)):
            results[name].append(arms.serve(name, chosen, arrivals, concurrency))
    plain = results[NONE]
    same = all(a.texts == b.texts for served in results.values() for a, b in zip(served, plain, strict=True))
    table: dict[str, Any] = {"same_text": same}
    for name, served in results.items():
        misses = [miss for each in served for miss in each.misses]
        table[name] = {
            "tokens_per_s": Spread.of([each.rate for each in served]),
            "per_user": Spread.of([statistics.mean(each.per_user) for each in served]),
            "of_none": Spread.of([a.rate / b.rate for a, b in zip(served, plain, strict=True)]),
            "kept_per_row": statistics.mean(statistics.mean(each.kept) for each in served),
            "predicted_off": statistics.median(misses) if misses else None,
        }
    return table


def show(label: str, table: dict[str, Any]) -> None:
    print(f"\n{label}; texts {'identical' if table['same_text'] else 'DIFFER'}")
    for name, row in table.items():
        if name != "same_text":
            print(
                f"  {name:9} {row['tokens_per_s']!s:>34} tokens/s   of none {row['of_none'].median:.3f}"
                f"   per user {row['per_user'].median:.1f}   kept {row['kept_per_row']:.2f}"
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
    parser.add_argument("--quick", action="store_true", help="concurrency 1, 8, 32; two workloads; fewer arms")
    parser.add_argument("--prompts", type=Path, help=f"directory of {', '.join(SETS)} as .jsonl")
    parser.add_argument("--concurrency", type=int, nargs="+")
    parser.add_argument("--workloads", nargs="+", help="of those there are; default: all")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--new-tokens", type=int, default=None)
    parser.add_argument("--poisson", action="store_true", help="Poisson arrivals instead of a closed loop")
    parser.add_argument("--greedy", action="store_true", help="no request at T=1")
    parser.add_argument("--dtype", default="auto", help="float32 widens the weights; auto serves them as stored")
    parser.add_argument("--kv-cache-gib", type=float, default=0.6)
    parser.add_argument("--plots", type=Path, help="directory for pictures")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    arms = Arms(options.kv_cache_gib, [3] if options.quick else [1, 3, 5], options.dtype)
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
