"""A whole step of the target by rows: weights as served, widened, oneDNN's products, Transformers. CPU, context 128.

Arms alternate within one run. Also the machine's read bandwidth, and what a draft costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from dspark_serve.config import Config  # isort: skip  (before torch: the package decides how its threads wait)

import torch
import typer
from common import MODEL, Spread, facts, write_json
from reference import Reference
from rich.console import Console
from rich.table import Table

from dspark_serve.cache.store import KVStore
from dspark_serve.engine.build import build_engine
from dspark_serve.models.base import TargetModel
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.models.loader import load_model, resolve
from dspark_serve.types import Request, SamplingParams

CONTEXT, PAGE = 128, 16
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 32, 64)
READ_BYTES = 1 << 30


def step_of(model: TargetModel) -> Callable[[int], float]:
    """Seconds of one forward with logits for every row, after CONTEXT cached tokens."""
    pages = tuple(range(1, 1 + -(-(CONTEXT + max(ROWS)) // PAGE)))
    store = KVStore(model.info.kv_layers, 1 + len(pages), PAGE, model.info.dtype, model.device)

    def run(rows: int) -> float:
        batch = probe_batch([Chunk(tuple(range(100, 100 + rows)), CONTEXT, pages)], PAGE)
        start = time.perf_counter()
        model.forward(batch, store)
        return time.perf_counter() - start

    return run


def drafting() -> Callable[[], list[float]]:
    """Milliseconds of the default head's draft passes while it answers a request."""
    options = {
        "model": {"model": MODEL},
        "cache": {"kv_cache_gib": 0.2},
        "speculation": {"method": "dspark", "budget": "full"},
    }
    engine = build_engine(Config.model_validate(options))
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)

    def run() -> list[float]:
        engine.add(Request("a", tuple(range(100, 100 + CONTEXT)), params, seed=0))
        found = []
        while engine.has_work:
            report = engine.step()
            if any(row.n_draft for row in report.rows):
                found.append(report.phase_ms["propose"])
        return found[3:]  # the first writes the prompt's context

    return run


def read_bandwidth() -> float:
    """Bytes per second of summing a block far larger than the caches, by all threads; the best of a few."""
    block = torch.ones(READ_BYTES // 4)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return READ_BYTES / min(times)


def main(
    quick: Annotated[bool, typer.Option(help="Fewer repetitions, about two minutes on two cores.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
) -> None:
    """Measure, print a table, exit 0 whatever the figures say."""
    resolved = resolve(MODEL)
    models = {
        "as served": load_model(resolved),
        "float32": load_model(resolved, "float32"),
        "oneDNN": load_model(resolved, "float32", kernels="torch"),
    }
    reference, draft = Reference(str(resolved.path)), drafting()
    arms = {name: step_of(model) for name, model in models.items()}
    arms["transformers"] = lambda rows: float(reference.ask(rows=rows, context=CONTEXT)["seconds"])
    times: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in arms}
    bandwidth: list[float] = []
    drafts: list[float] = []
    for turn in range((6 if quick else 25) + 1):
        bandwidth.append(read_bandwidth() / 1e9)
        time.sleep(0.03)
        drafts += draft() if turn else draft()[:0]
        for rows in ROWS:
            for name, arm in arms.items():
                time.sleep(0.03)  # the other process's threads stop spinning meanwhile
                arm(rows)
                seconds = arm(rows)
                if turn:  # the first one warms up
                    times[name][rows].append(seconds * 1e3)
    reference.close()
    weights = sum(p.numel() for p in _linears(resolved.path))
    steps = {name: {rows: Spread.of(values) for rows, values in by.items()} for name, by in times.items()}
    result = {
        "facts": facts(),
        "step_ms": steps,
        "draft_ms": Spread.of(drafts),
        "read_gb_per_s": Spread.of(bandwidth),
        "weights": weights,
    }
    show(result)
    write_json(json_path, result)


def _linears(directory: Path) -> list[torch.Tensor]:
    """What a step multiplies by: every matrix once, the tied embedding as the LM head."""
    from dspark_serve.models.loader import iterate_weights

    return [tensor for _, tensor in iterate_weights(directory, progress=False) if tensor.dim() == 2]


def show(result: dict[str, Any]) -> None:
    console, steps = Console(), result["step_ms"]
    table = Table("rows", *(f"{name}, ms" for name in steps), "float32 GFLOPS", title="SmolLM2, one step, context 128")
    for rows in ROWS:
        rate = 2 * result["weights"] * rows / steps["float32"][rows].median / 1e6
        table.add_row(str(rows), *(str(by[rows]) for by in steps.values()), f"{rate:.0f}")
    console.print(table)

    def ratio(name: str, rows: int, other: str, others: int = 1) -> str:
        return f"{steps[name][rows].median / steps[other][others].median:.2f}"

    read = 4e-6 * result["weights"] / steps["float32"][1].median  # GB/s of float32 weights
    facts_ = {
        "1 row as served / Transformers": ratio("as served", 1, "transformers"),
        "4 rows / 1 row, as served and float32": ", ".join(ratio(name, 4, name) for name in ("as served", "float32")),
        "float32 1 row, share of the read bandwidth": f"{read / result['read_gb_per_s'].median:.0%} of "
        f"{result['read_gb_per_s'].median:.1f} GB/s",
        "32 and 64 rows float32 / oneDNN, speed": ", ".join(
            f"{steps['oneDNN'][rows].median / steps['float32'][rows].median:.2f}" for rows in (32, 64)
        ),
        "draft, ms": str(result["draft_ms"]),
        "draft / 1-row step, as served and float32": ", ".join(
            f"{result['draft_ms'].median / steps[name][1].median:.2f}" for name in ("as served", "float32")
        ),
        "slower than a larger count": _inversions(steps),
    }
    for label, value in facts_.items():
        console.print(f"{label}: {value}")
    console.print(result["facts"])


def _inversions(steps: dict[str, dict[int, Spread]]) -> str:
    """Row counts up to 16 whose step takes 5 % longer than that of a larger one."""
    found = []
    for name in ("as served", "float32"):
        few = [rows for rows in ROWS if rows <= 16]
        for index, rows in enumerate(few[:-1]):
            least = min(steps[name][more].median for more in few[index + 1 :])
            if steps[name][rows].median > 1.05 * least:
                found.append(f"{name} {rows}")
    return ", ".join(found) or "none"


if __name__ == "__main__":
    typer.run(main)
