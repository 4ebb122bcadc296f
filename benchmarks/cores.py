"""Steps with and without a core for each thread, by turns, alone and beside a process that always wants a core."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from dspark_serve.config import Config  # isort: skip  (before torch: the package decides how threads wait)

import torch
import typer
from common import MODEL, Spread, facts, write_json
from rich.console import Console
from rich.table import Table

from dspark_serve.engine.build import build_engine
from dspark_serve.engine.cores import Cores
from dspark_serve.engine.runner import Runner
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.tensors import StepBatch

CONTEXT = 128
ROWS = (1, 8, 32)
TURNS, TURN_S = 24, 0.4


def anywhere() -> None:
    """All threads of this process may run on every core again."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(task), range(os.cpu_count() or 1))


def batch_of(rows: int, page_size: int) -> StepBatch:
    pages = -(-(CONTEXT + 1) // page_size)
    own = (tuple(range(1 + row * pages, 1 + (row + 1) * pages)) for row in range(rows))
    return probe_batch([Chunk((100,), CONTEXT, pages_of) for pages_of in own], page_size, "cpu")


def turn(runner: Runner, batch: StepBatch, bound: bool) -> list[float]:
    """Milliseconds of the steps of one turn."""
    cores, times, until = Cores(torch.device("cpu")), [], time.perf_counter() + TURN_S
    if not bound:
        anywhere()
    while not times or time.perf_counter() < until:
        with cores if bound else contextlib.nullcontext():
            began = time.perf_counter()
            runner.run(batch)
            times.append((time.perf_counter() - began) * 1e3)
    return times


def spin() -> None:
    while True:
        pass


@contextlib.contextmanager
def neighbour(present: bool) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    if present:
        process.start()
    try:
        yield
    finally:
        if present:
            process.kill()


def main(
    model: Annotated[str, typer.Option(help="Catalog name, directory, GGUF file or hub id.")] = MODEL,
    quick: Annotated[bool, typer.Option(help="Fewer turns, half a minute instead of two.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
) -> None:
    """Print milliseconds per step: the mean of each turn, median and quartiles over turns."""
    options = {"model": {"model": model}, "cache": {"kv_cache_gib": 0.5}, "speculation": {"method": "none"}}
    runner = build_engine(Config.model_validate(options)).runner
    table = Table(title="milliseconds per step: median [quartiles] of the turns' means")
    for column in ("rows", "neighbour", "a core each", "as the system likes", "slowest", "slowest, as it likes"):
        table.add_column(column, justify="right")
    found: list[dict[str, Any]] = []
    for present in (False, True):
        with neighbour(present):
            for rows in ROWS:
                batch = batch_of(rows, runner.store.page_size)
                turns = [
                    (turn(runner, batch, True), turn(runner, batch, False))
                    for _ in range(TURNS // 4 if quick else TURNS)
                ]
                sides = [Spread.of([sum(side) / len(side) for side in sides]) for sides in zip(*turns, strict=True)]
                worst = [max(max(side) for side in sides) for sides in zip(*turns, strict=True)]
                found.append({"rows": rows, "neighbour": present, "bound": sides[0], "free": sides[1], "worst": worst})
                table.add_row(str(rows), "busy" if present else "none", *map(str, sides), *(f"{w:.0f}" for w in worst))
    Console(width=140).print(table)
    write_json(json_path, {"facts": facts(), "model": model, "unit": "ms", "cores": found})


if __name__ == "__main__":
    typer.run(main)
