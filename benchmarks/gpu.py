"""On a CUDA machine: each kernel's share of the roofline, a step by rows, a whole model end to end, and energy.

Peaks are measured in the same run, by a copy and a large product. Kernels and steps have the shapes of Qwen3-4B, its
weights are random and made on the spot; `--model DIR` adds a checkpoint of one's own. Needs no network.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Callable
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
from dspark_serve.models.base import TargetModel
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.models.loader import load_model, resolve
from dspark_serve.types import SpeculationParams

COPY_BYTES, SQUARE = 1 << 30, 8192
FLUSH_BYTES = 512 << 20  # more than any cache holds
CONTEXT = 2048
STEPS = ((1, 1), (1, 8), (2, 1), (4, 1), (8, 1), (8, 8), (16, 1), (32, 1), (32, 8), (64, 1), (128, 1))  # rows, tokens
STEP_CONTEXT = 128
GRAPHS = "not measured: CUDA graphs are not built yet"
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


def step_seconds(model: TargetModel, rows: int, tokens: int, repeats: int) -> list[float]:
    """Wall clock of one forward of `rows` sequences, each with `tokens` new ones after STEP_CONTEXT cached."""
    needed = -(-(STEP_CONTEXT + tokens) // PAGE)
    store = KVStore(model.info.kv_layers, 1 + rows * needed, PAGE, model.info.dtype, model.device)
    chunks = [
        Chunk(tuple(range(100, 100 + tokens)), STEP_CONTEXT, tuple(range(1 + row * needed, 1 + (row + 1) * needed)))
        for row in range(rows)
    ]
    batch, found = probe_batch(chunks, PAGE, model.device), []
    for turn in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.forward(batch, store)
        torch.cuda.synchronize()
        if turn > 1:  # libraries choose their algorithms in the first ones
            found.append(time.perf_counter() - start)
    return found


def step_shares(peaks: Peaks, layers: int, repeats: int) -> dict[str, Share]:
    """The engine's forward by the kernels that serve here unless told otherwise, by rows and tokens per row."""
    with tempfile.TemporaryDirectory() as directory:
        path = shapes.write_checkpoint(Path(directory) / "qwen3", SHAPE, layers)
        model = load_model(resolve(str(path)), "bfloat16", DEVICE.type)
    shares = {}
    for rows, tokens in STEPS:
        cost = shapes.step_cost([(tokens, STEP_CONTEXT + tokens)] * rows, SHAPE, layers, SIZE)
        shares[f"{rows} x {tokens}"] = Share.of(step_seconds(model, rows, tokens, repeats), cost, peaks)
    return shares


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
    result["steps"] = step_shares(peaks, 2 if quick else 8, repeats)
    result["graphs"] = GRAPHS
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
    for label in ("graphs", "energy"):
        console.print(f"{label}: {result[label]}")
    ends = result["end_to_end"]
    for name, values in ends.items() if isinstance(ends, dict) else [("end to end", {"": ends})]:
        console.print(f"{name}: " + ", ".join(f"{key} {value}".strip() for key, value in values.items()))
    console.print(result["facts"])


if __name__ == "__main__":
    typer.run(main)
