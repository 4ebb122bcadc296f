"""What watching a step costs: the metrics' share of the time of real steps, by rows, and the time of a scrape.

The default engine decodes made-up prompts; every report goes to the metrics as the server's event loop would hand it
over. Both are timed in one run, step by step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import MODEL, Spread, facts, prompts, write_json
from rich.console import Console
from rich.table import Table

from dspark_serve.config import load_config
from dspark_serve.engine.build import build_engine, find_model
from dspark_serve.server.metrics import Metrics
from dspark_serve.text import Tokenizer
from dspark_serve.types import Request, SamplingParams

_ROWS = (1, 8, 64)


def main(
    model: Annotated[str, typer.Option(help="Catalog name, directory, GGUF file or hub id.")] = MODEL,
    quick: Annotated[bool, typer.Option(help="Fewer steps, about a minute.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
) -> None:
    """Print milliseconds of steps and of watching them: median and quartiles."""
    if threads is not None:
        torch.set_num_threads(threads)
    config = load_config({"model": model})
    resolved = find_model(config)
    engine, tokenizer = build_engine(config, resolved), Tokenizer.load(resolved.path)
    texts = [tokenizer.encode(text)[:64] for text in prompts()]
    metrics = Metrics("benchmark", vllm_names=True)
    metrics.on_loaded(engine.info, engine.stats())
    table = Table(title="watching a step, ms: median [quartiles]")
    for column in ("rows", "step", "watching", "share of the step"):
        table.add_column(column, justify="right")
    found: list[dict[str, Any]] = []
    steps = 30 if quick else 150
    for rows in _ROWS:
        requests = [
            Request(f"{rows}-{row}", tuple(texts[row % len(texts)]), SamplingParams(ignore_eos=True), seed=row)
            for row in range(rows)
        ]
        for request in requests:
            engine.add(request)
            metrics.on_submit(request)
        times: list[tuple[float, float]] = []
        while len(times) < steps:
            started = time.perf_counter()
            report = engine.step()
            stepped = time.perf_counter()
            metrics.on_step(report, engine.stats(), time.monotonic())
            watched = time.perf_counter()
            if not report.num_prefill_tokens:
                times.append(((stepped - started) * 1e3, (watched - stepped) * 1e3))
        for request in requests:
            engine.cancel(request.request_id)
            metrics.on_end(request.request_id, "abort")
        step, watching = (Spread.of(part) for part in zip(*times, strict=True))
        share = Spread.of([watched_ms / step_ms for step_ms, watched_ms in times])
        found.append({"rows": rows, "step_ms": step, "watching_ms": watching, "share": share})
        shares = f"{share.median:.3%} [{share.low:.3%}, {share.high:.3%}]"
        table.add_row(str(rows), *(f"{s.median:.3f} [{s.low:.3f}, {s.high:.3f}]" for s in (step, watching)), shares)
    scrapes = []
    for _ in range(20):
        started = time.perf_counter()
        metrics.render()
        scrapes.append((time.perf_counter() - started) * 1e3)
    Console(width=130).print(table)
    print(f"a scrape, vLLM's names included: {Spread.of(scrapes)} ms")
    write_json(json_path, {"facts": facts(), "model": model, "steps": found, "scrape_ms": Spread.of(scrapes)})


if __name__ == "__main__":
    typer.run(main)
