"""A benchmark as a picture: how latencies are distributed, what throughput is against concurrency.

Must not know: how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_serve.bench.client import BenchError
from dspark_serve.bench.compare import Comparison
from dspark_serve.bench.figures import Spread
from dspark_serve.bench.report import Measured


def require_matplotlib() -> None:
    """Raises BenchError without it; asked before a long run, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise BenchError("a plot needs matplotlib: install the [train] extra") from None


def plot(measured: Sequence[Measured], path: Path) -> None:
    """Left: the share of requests within a time, to the first token and to the last. Right: throughput by load."""
    figure, (left, right) = _figure()
    for number, each in enumerate(measured):
        samples = [sample for one in each.passes for sample in one.run.succeeded]
        first = cumulative([sample.ttft_s for sample in samples])
        whole = cumulative([sample.ended_s - sample.started_s for sample in samples])
        for what, style, curve in (("first token", "--", first), ("answer", "-", whole)):
            left.plot(*curve, label=f"{_name(each)}: {what}", color=f"C{number}", linestyle=style)
    left.set(xlabel="ms", ylabel="share of requests", title="latency", xscale="log")
    left.legend(fontsize="small")
    spreads = [Spread.of([one.figures.output_tokens_per_s for one in each.passes]) for each in measured]
    loads = [each.concurrency or 0 for each in measured]
    middle = [s.median for s in spreads]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    right.errorbar(loads, middle, yerr=errors, marker="o", capsize=3)
    right.set(xlabel="concurrency (0: unlimited)", ylabel="output tok/s", title="throughput")
    figure.savefig(path, dpi=120)


def plot_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    """Left: speed-up by workload and concurrency, with its interval. Right: tokens per second with and without."""
    figure, (left, right) = _figure()
    for number, name in enumerate(dict.fromkeys(each.workload for each in comparisons)):
        known = [each for each in comparisons if each.workload == name and each.ratio is not None]
        loads = [each.concurrency for each in known]
        ratios = [each.ratio for each in known if each.ratio is not None]
        # An interval may lie beside its value where pairs are few; a bar cannot.
        errors = [[max(0.0, r.value - r.low) for r in ratios], [max(0.0, r.high - r.value) for r in ratios]]
        colour = f"C{number}"
        left.errorbar(loads, [r.value for r in ratios], yerr=errors, marker="o", capsize=3, label=name, color=colour)
        for label, style, arms in (("on", "-", [e.on for e in known]), ("off", "--", [e.off for e in known])):
            rates = [sum(tokens for tokens, _ in arm) / sum(seconds for _, seconds in arm) for arm in arms]
            right.plot(loads, rates, linestyle=style, marker="o", label=f"{name}, {label}", color=colour)
    left.axhline(1.0, color="grey", linewidth=0.5)
    left.set(xlabel="concurrency", ylabel="times the tokens per second without", title="speed-up")
    right.set(xlabel="concurrency", ylabel="output tok/s", title="throughput")
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def cumulative(seconds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted milliseconds, and the share of values that are no larger."""
    ms = np.sort(np.array(seconds)) * 1e3
    return ms, np.arange(1, len(ms) + 1) / max(len(ms), 1)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    return figure, figure.subplots(1, 2)


def _name(measured: Measured) -> str:
    load = "unlimited" if measured.concurrency is None else f"{measured.concurrency} at once"
    return load if measured.rate is None else f"{measured.rate:g}/s, {load}"
