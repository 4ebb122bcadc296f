"""Engine against Transformers, as it ships and without a drafter; prompt lookup and the default against none; host time
per step; memory.

Greedy, float32 arithmetic, CPU; weights in the model file's own blocks, as served, and widened to float32. The
sides of each comparison alternate within one run, so that machine drift hits all.
"""

from __future__ import annotations

import concurrent.futures as futures
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from dspark_serve.config import Config  # isort: skip  (before torch: the package decides how its threads wait)

import httpx
import psutil
import typer
from common import MODEL, Spread, facts, prompts, write_json
from reference import Reference
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dspark_serve.engine.build import build_engine
from dspark_serve.engine.engine import Engine
from dspark_serve.reports import StepReport
from dspark_serve.types import Request, SamplingParams

NEW_TOKENS = 128
HOST_PHASES = ("plan", "propose", "build", "verify", "commit", "learn")
COPY_TEXTS = [
    "The old lighthouse stood at the edge of the cliff. Every evening, Martha climbed its ninety-two steps to light "
    "the lamp. From the top she could see the fishing boats returning to the harbour, their sails orange in the low "
    "sun. She counted them one by one, as her father had done before her, and wrote the number in a small blue book.",
    "def moving_average(values, window):\n    if window <= 0:\n        raise ValueError('window must be positive')\n"
    "    result = []\n    total = 0.0\n    for index, value in enumerate(values):\n        total += value\n"
    "        if index >= window:\n            total -= values[index - window]\n        if index >= window - 1:\n"
    "            result.append(total / window)\n    return result\n",
    "The committee met on Tuesday to discuss the budget for the coming year. The treasurer reported that income had "
    "risen by four percent, while the cost of heating had risen by eleven percent. It was agreed that the roof of the "
    "library should be repaired before the winter, and that the repair should be paid for from the reserve fund.",
]


class Bench:
    """The two sides of every comparison, loaded once."""

    def __init__(self, model: str, quick: bool) -> None:
        self.model, self.quick = model, quick
        self.new_tokens = NEW_TOKENS
        self.engines = {method: self._engine(method) for method in ("none", "ngram")}
        self.engines["default"] = self._engine(None)  # head, lookup and budget, as it ships
        self.engines["float32"] = self._engine("none", "float32")
        self.crowded: list[StepReport] = []  # steps of 16 decoding rows
        path = self.engines["none"].info.model_dir
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        self.reference = Reference(path)
        self._count = 0

    def _engine(self, method: str | None, dtype: str = "auto") -> Engine:
        # No prefix cache: every repetition has to do all of its work, as the reference does.
        options = {
            "cache": {"kv_cache_gib": 0.4, "enable_prefix_caching": False},
            "speculation": {"method": method},
            "model": {"model": self.model, "dtype": dtype, "device": "cpu"},
        }
        return build_engine(Config.model_validate(options))

    def encode(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer.encode(rendered, add_special_tokens=False))

    def ours(self, name: str, batch: Sequence[list[int]]) -> tuple[float, list[list[int]], list[StepReport]]:
        """Seconds, tokens and step reports of serving the prompts together."""
        engine = self.engines[name]
        params = SamplingParams(temperature=0.0, max_tokens=self.new_tokens, ignore_eos=True)
        tokens: dict[str, list[int]] = {}
        reports: list[StepReport] = []
        start = time.perf_counter()
        for prompt in batch:
            self._count += 1
            tokens[str(self._count)] = []
            engine.add(Request(str(self._count), tuple(prompt), params, seed=0))
        while engine.has_work:
            report = engine.step()
            reports.append(report)
            for delta in report.deltas:
                tokens[delta.request_id].extend(delta.token_ids)
        if name == "none":
            self.crowded += [r for r in reports if len(r.rows) == 16 and not r.num_prefill_tokens]
        return time.perf_counter() - start, list(tokens.values()), reports

    def theirs(self, batch: Sequence[list[int]]) -> tuple[float, list[list[int]]]:
        """Seconds and tokens of Transformers on the same prompts as one static batch."""
        answer = self.reference.ask(prompts=batch, new_tokens=self.new_tokens)
        return answer["seconds"], answer["tokens"]

    # ---- the comparisons

    def compare(self, rounds: Sequence[Any], sides: dict[str, Callable[[Any], tuple[float, Any]]]) -> dict[str, Any]:
        """Tokens/s per side, and what each is times the first; sides alternate, and warm up once."""
        rates: dict[str, list[float]] = {name: [] for name in sides}
        equal: list[bool] = []
        self.new_tokens = 16
        for side in sides.values():
            side(rounds[0])
        self.new_tokens = NEW_TOKENS
        for number, item in enumerate(rounds):
            order = list(sides) if number % 2 == 0 else list(reversed(sides))
            outputs = {}
            for name in order:
                seconds, outputs[name] = sides[name](item)
                rates[name].append(sum(map(len, outputs[name])) / seconds)
            equal.append(all(tokens == outputs[order[0]] for tokens in outputs.values()))
        base = next(iter(rates.values()))
        return {
            "tokens_per_s": {name: Spread.of(values) for name, values in rates.items()},
            "ratio": {
                name: Spread.of([b / a for a, b in zip(base, values, strict=True)]) for name, values in rates.items()
            },
            "same_tokens": f"{sum(equal)} of {len(equal)}",
        }

    def _engine_side(self, name: str) -> Callable[[Any], tuple[float, Any]]:
        return lambda batch: self.ours(name, batch)[:2]

    def _accepted_length(self, name: str, items: Sequence[Any]) -> float:
        rows = [row for item in items for report in self.ours(name, item)[2] for row in report.rows]
        return statistics.mean(row.n_accepted + 1 for row in rows)

    def single(self) -> dict[str, Any]:
        items = [[self.encode(text)] for text in prompts()[:: 11 if self.quick else 3]]
        sides = {
            "transformers": self.theirs,
            "float32": self._engine_side("float32"),
            "as served": self._engine_side("none"),
            "default": self._engine_side("default"),
        }
        return self.compare(items, sides)

    def copying(self) -> dict[str, Any]:
        texts = [f"Rewrite this text exactly, word for word:\n\n{text}" for text in COPY_TEXTS]
        items = [[self.encode(text)] for text in texts * (1 if self.quick else 3)]
        sides = {"no drafter": self._engine_side("none"), "ngram": self._engine_side("ngram")}
        return self.compare(items, sides) | {"accepted_length": self._accepted_length("ngram", items[:3])}

    def drafting(self) -> dict[str, Any]:
        items = [[self.encode(text)] for text in prompts()[:: 11 if self.quick else 2]]
        sides = {"no drafter": self._engine_side("none"), "default": self._engine_side("default")}
        return self.compare(items, sides) | {"accepted_length": self._accepted_length("default", items[:3])}

    def batched(self) -> dict[str, Any]:
        everything = [self.encode(text) for text in prompts()]
        items = [everything[:16], everything[16:32]] * (1 if self.quick else 3)
        sides = {
            "transformers": self.theirs,
            "as served": self._engine_side("none"),
            "default": self._engine_side("default"),
        }
        return self.compare(items, sides)

    def host(self) -> dict[str, Any]:
        """Milliseconds of everything but the target's forward, in the steps of `batched` that had 16 decoding rows."""
        full = [report.phase_ms for report in self.crowded]
        total = Spread.of([sum(phases[name] for name in HOST_PHASES) for phases in full])
        by_phase = {name: Spread.of([phases[name] for phases in full]) for name in (*HOST_PHASES, "forward")}
        return {"host_ms": total, "phases_ms": by_phase}


def memory(model: str, quick: bool) -> dict[str, Any]:
    """Resident MiB of a real server after 20 and after 200 mixed requests over HTTP, 8 at a time."""
    total, port = 60 if quick else 200, _free_port()
    command = [sys.executable, "-m", "dspark_serve.cli", "serve", model, "--port", port, "--kv-cache-gib", "0.5"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    base = f"http://127.0.0.1:{port}"
    try:
        _await_ready(base, server)
        process = psutil.Process(server.pid)
        texts = prompts()
        levels: dict[int, float] = {}

        def one(index: int) -> None:
            body: dict[str, Any] = {
                "model": model,
                "messages": [{"role": "user", "content": texts[index % len(texts)]}],
                "max_tokens": 8 + 24 * (index % 3),
                "temperature": (0.0, 0.8, 1.0)[index % 3],
                "seed": index,
                "stream": index % 2 == 0,
            }
            if index % 5 == 0:
                body |= {"top_p": 0.9, "frequency_penalty": 0.5}
            if index % 7 == 0:
                body |= {"logprobs": True, "top_logprobs": 3}
            httpx.post(f"{base}/v1/chat/completions", json=body, timeout=300).raise_for_status()

        with futures.ThreadPoolExecutor(8) as pool:
            for start, stop in ((0, 20), (20, total)):
                list(pool.map(one, range(start, stop)))
                levels[stop] = process.memory_info().rss / 2**20
        return {"requests": total, "rss_mib": levels, "growth_mib": levels[total] - levels[20]}
    finally:
        server.terminate()
        server.wait(60)


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _await_ready(base: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode} before it was ready")
        try:
            if httpx.get(f"{base}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the server was not ready within a minute")


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("measured", "side", "tokens/s", "times the first", "same tokens", title="greedy")
    for key, label in (
        ("single", "concurrency 1; `default` drafts, the others do not"),
        ("copying", "copy-heavy, concurrency 1"),
        ("drafting", "chat and code, concurrency 1"),
        ("batched", "concurrency 16 (Transformers: a static batch)"),
    ):
        for side, rate in result[key]["tokens_per_s"].items():
            first = side == next(iter(result[key]["ratio"]))
            ratio = "" if first else str(result[key]["ratio"][side])
            table.add_row(label if first else "", side, str(rate), ratio, result[key]["same_tokens"] if first else "")
    table.add_row("host time per step at 16 rows, ms", "", str(result["host"]["host_ms"]), "", "")
    memory_ = result["memory"]
    table.add_row(
        f"resident memory after {memory_['requests']} requests over 20, MiB", "", f"{memory_['growth_mib']:.1f}", "", ""
    )
    console.print(table)
    console.print({key: value for key, value in result["facts"].items()})


def main(
    model: Annotated[str, typer.Option(help="Catalog name, directory, GGUF file or hub id.")] = MODEL,
    quick: Annotated[bool, typer.Option(help="Fewer repetitions, under five minutes on two cores.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
) -> None:
    """Measure, print a table, exit 0 whatever the figures say."""
    bench = Bench(model, quick)
    result: dict[str, Any] = {"facts": facts(), "model": model}
    for name in ("single", "copying", "drafting", "batched", "host"):
        result[name] = getattr(bench, name)()
    bench.reference.close()
    del bench
    result["memory"] = memory(model, quick)
    show(result)
    write_json(json_path, result)


if __name__ == "__main__":
    typer.run(main)
