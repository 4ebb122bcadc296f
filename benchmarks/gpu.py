"""On a CUDA machine: each kernel's share of the roofline, steps with and without graphs, a model end to end, energy.

Peaks are measured in the same run, by a copy and a large product. Kernels and steps have the shapes of Qwen3-4B, its
weights are random and made on the spot; `--model DIR` adds a checkpoint of one's own. Needs no network.
"""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dspark_serve.llm import LLM, SamplingParams  # isort: skip  (before torch: the package decides how its threads wait)

import shapes
import torch
import typer
from common import Spread, facts, prompts, write_json
from kernel_cases import DEVICE, DRAFTS, PAGE, SHAPE, SIZE, attention_case, layer_cases, sampling_cases
from rich.console import Console
from rich.table import Table
from shapes import Cost

from dspark_serve.cache.store import KVStore
from dspark_serve.engine.graph_check import with_graphs
from dspark_serve.engine.padding import Limits
from dspark_serve.engine.recorders import CudaRecorder, Recorder
from dspark_serve.engine.runner import Runner
from dspark_serve.models.base import TargetModel
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.models.loader import load_model, resolve
from dspark_serve.tensors import StepBatch
from dspark_serve.types import SpeculationParams

COPY_BYTES, SQUARE = 1 << 30, 8192
FLUSH_BYTES = 512 << 20  # more than any cache holds
CONTEXT = 2048
STEPS = ((1, 1), (1, 8), (2, 1), (4, 1), (8, 1), (8, 8), (16, 1), (32, 1), (32, 8), (64, 1), (128, 1))  # rows, tokens
STEP_CONTEXT = 128
NO_CUDA = "gpu.py measures a CUDA GPU, and torch sees none here; install the [gpu] extra on a machine that has one."


@dataclass(frozen=True)
class Peaks:
    """What this device was seen to do, not what its data sheet says."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Share:
    """A kernel's time, and how much of it the roofline accounts for."""

    micros: Spread
    share: float  # of the median
    bound: str  # which of the two peaks is the nearer one

    @staticmethod
    def of(seconds: list[float], cost: Cost, peaks: Peaks) -> Share:
        spread = Spread.of([each * 1e6 for each in seconds])
        memory = cost.num_bytes / peaks.bytes_per_s >= cost.flops / peaks.flops_per_s
        share = cost.seconds(peaks.bytes_per_s, peaks.flops_per_s) * 1e6 / spread.median
        return Share(spread, share, "memory" if memory else "arithmetic")


def device_seconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Time on the device alone, with cold caches. The flush keeps it busy while the host queues the launches."""
    call()  # compiles
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    found = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1e3)
    return found


def measured_peaks(repeats: int) -> Peaks:
    """The best of some copies, which read and write each byte, and of some bfloat16 products."""
    source, target = (torch.ones(COPY_BYTES // SIZE, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    copy = min(device_seconds(lambda: target.copy_(source), repeats))
    a, b = (torch.randn(SQUARE, SQUARE, device=DEVICE).bfloat16() for _ in range(2))
    product = min(device_seconds(lambda: a @ b, repeats))
    return Peaks(2 * COPY_BYTES / copy, 2 * SQUARE**3 / product)


def kernel_shares(peaks: Peaks, repeats: int) -> dict[str, Share]:
    """Every kernel at shapes that occur: decoding, verification, a prompt."""
    cases = {
        f"attention, 1 row decoding at {CONTEXT}": attention_case([(1, CONTEXT)]),
        f"attention, 32 rows decoding at {CONTEXT}": attention_case([(1, CONTEXT)] * 32),
        f"attention, 32 rows verifying {DRAFTS} drafts": attention_case([(DRAFTS + 1, CONTEXT)] * 32),
        f"attention, a prompt of {CONTEXT}": attention_case([(CONTEXT, CONTEXT)]),
        **layer_cases(8),
        **layer_cases(CONTEXT),
        **sampling_cases(1),
        **sampling_cases(16),
    }
    return {name: Share.of(device_seconds(call, repeats), cost, peaks) for name, (call, cost) in cases.items()}


def step_of(model: TargetModel, rows: int, tokens: int) -> StepBatch:
    """`rows` sequences, each with `tokens` new ones after STEP_CONTEXT cached, on pages from page 1 on."""
    needed = -(-(STEP_CONTEXT + tokens) // PAGE)
    chunks = [
        Chunk(tuple(range(100, 100 + tokens)), STEP_CONTEXT, tuple(range(1 + row * needed, 1 + (row + 1) * needed)))
        for row in range(rows)
    ]
    return probe_batch(chunks, PAGE, model.device)


def step_store(model: TargetModel) -> KVStore:
    """Room for the largest of STEPS."""
    pages = 1 + max(rows * -(-(STEP_CONTEXT + tokens) // PAGE) for rows, tokens in STEPS)
    return KVStore(model.info.kv_layers, pages, PAGE, model.info.dtype, model.device)


def wall_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Wall clock of each call until the device is done, taking turns."""
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 2):
        for call, times in zip(calls, found, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if turn > 1:  # libraries choose their algorithms in the first ones
                times.append(time.perf_counter() - start)
    return found


def step_model(layers: int) -> TargetModel:
    """Of random weights, with the kernels that serve here unless told otherwise."""
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write_checkpoint(Path(directory) / "qwen3", SHAPE, layers)
        return load_model(resolve(str(path)), "bfloat16", DEVICE.type)


def step_shares(model: TargetModel, peaks: Peaks, repeats: int) -> dict[str, Share]:
    """The engine's forward, launch by launch, by rows and tokens per row."""
    store, shares = step_store(model), {}
    for rows, tokens in STEPS:
        cost = shapes.step_cost([(tokens, STEP_CONTEXT + tokens)] * rows, SHAPE, model.info.num_layers, SIZE)
        batch = step_of(model, rows, tokens)
        [seconds] = wall_seconds([functools.partial(model.forward, batch, store)], repeats)
        shares[f"{rows} x {tokens}"] = Share.of(seconds, cost, peaks)
    return shares


@dataclass(frozen=True)
class Gain:
    """Microseconds of a step launch by launch and from a CUDA graph, and the ratio of the medians."""

    eager: Spread
    graph: Spread
    speedup: float


def graph_gains(model: TargetModel, recorder: Recorder, repeats: int) -> dict[str, Gain] | str:
    """The same steps as the engine plays them, padding and the LM head included; or why there is nothing to play."""
    store = step_store(model)
    limits = Limits(
        max_num_seqs=max(rows for rows, _ in STEPS),
        max_tokens=max(rows * tokens for rows, tokens in STEPS),
        max_model_len=STEP_CONTEXT + max(tokens for _, tokens in STEPS),
    )
    runner, warnings = with_graphs(Runner(model, store), limits, recorder)
    if runner.graphs is None:
        return f"not measured: {' '.join(warnings) or 'attention runs in plain torch here, which cannot be recorded'}"
    gains = {}
    for rows, tokens in STEPS:
        batch = step_of(model, rows, tokens)
        calls = [functools.partial(model.forward, batch, store), functools.partial(runner.run, batch)]
        eager, graph = (Spread.of([each * 1e6 for each in times]) for times in wall_seconds(calls, repeats))
        gains[f"{rows} x {tokens}"] = Gain(eager, graph, eager.median / graph.median)
    return gains


def energy_meter() -> Callable[[], float] | str:
    """A reading of the joules the GPU has used so far, or the sentence that says why there is none."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return "not measured: nvidia-ml-py is not installed"
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        return f"not measured: {error}"
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def end_to_end(model: Path, head: str | None, quick: bool) -> dict[str, dict[str, Any]]:
    """Tokens per second of one engine, requests with and without speculation taking turns; joules where readable."""
    meter, found = energy_meter(), {}
    options = {"head": head, "device": DEVICE.type, "enable_prefix_caching": False}
    params = SamplingParams(temperature=0.0, max_tokens=32 if quick else 128, ignore_eos=True)
    with LLM(str(model), **options) as llm:
        asked = prompts() if llm.tokenizer is not None else [[100 + i] * 64 for i in range(16)]
        for concurrency in (1, 16):
            arms: dict[str, list[float]] = {"plain": [], "speculating": []}
            joules: dict[str, list[float]] = {name: [] for name in arms}
            for turn in range((2 if quick else 6) + 1):
                for name in arms:
                    used = None if isinstance(meter, str) else meter()
                    start = time.perf_counter()
                    some = asked[turn * concurrency % len(asked) :][:concurrency]
                    speculation = SpeculationParams(enabled=name == "speculating")
                    outputs = llm.generate(some, params, use_tqdm=False, speculation=speculation)
                    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
                    if turn:  # the first one warms up
                        arms[name].append(tokens / (time.perf_counter() - start))
                        if used is not None and not isinstance(meter, str):
                            joules[name].append((meter() - used) / tokens)
            for name, rates in arms.items():
                energy = Spread.of(joules[name]) if joules[name] else meter
                found[f"{concurrency} at once, {name}"] = {"tokens_per_s": Spread.of(rates), "joules_per_token": energy}
        found["engine"] = {
            "drafter": llm.info.drafter,
            "dtype": llm.info.dtype,
            "row_invariant": llm.info.row_invariant,
        }
    return found


def main(
    quick: Annotated[bool, typer.Option(help="Fewer repetitions and layers, about two minutes.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
    model: Annotated[Path | None, typer.Option(help="A checkpoint directory to measure end to end.")] = None,
    head: Annotated[str | None, typer.Option(help="Draft head for it; without one, prompt lookup.")] = None,
) -> None:
    """Measure and print tables; exits 0 whatever the figures say, 1 without a CUDA GPU."""
    if not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        raise SystemExit(1)
    repeats = 10 if quick else 50
    peaks = measured_peaks(repeats)
    result: dict[str, Any] = {"facts": facts(), "peaks": peaks, "kernels": kernel_shares(peaks, repeats)}
    layers = step_model(2 if quick else 8)
    result["steps"] = step_shares(layers, peaks, repeats)
    result["graphs"] = graph_gains(layers, CudaRecorder(DEVICE), repeats)
    meter = energy_meter()
    result["energy"] = meter if isinstance(meter, str) else "readable; joules per token come with --model"
    result["end_to_end"] = "not measured: no --model" if model is None else end_to_end(model, head, quick)
    show(result)
    write_json(json_path, result)


def show(result: dict[str, Any]) -> None:
    console, peaks = Console(), result["peaks"]
    for part, title in (("kernels", "Kernels, cold caches"), ("steps", "A step, rows x new tokens, eager")):
        table = Table("", "microseconds", "share of the roofline", "bound by", title=title)
        for name, share in result[part].items():
            table.add_row(name, str(share.micros), f"{share.share:.0%}", share.bound)
        console.print(table)
    console.print(f"peaks: {peaks.bytes_per_s / 1e9:.0f} GB/s, {peaks.flops_per_s / 1e12:.0f} TFLOPS bfloat16")
    if isinstance(result["graphs"], str):
        console.print(f"graphs: {result['graphs']}")
    else:
        table = Table("", "eager", "CUDA graph", "faster by", title="A step, rows x new tokens, microseconds")
        for name, gain in result["graphs"].items():
            table.add_row(name, str(gain.eager), str(gain.graph), f"{gain.speedup:.2f} x")
        console.print(table)
    console.print(f"energy: {result['energy']}")
    ends = result["end_to_end"]
    for name, values in ends.items() if isinstance(ends, dict) else [("end to end", {"": ends})]:
        console.print(f"{name}: " + ", ".join(f"{key} {value}".strip() for key, value in values.items()))
    console.print(result["facts"])


if __name__ == "__main__":
    typer.run(main)
