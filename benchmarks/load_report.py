"""What a run of load.py comes to: its tables, how far the budget kept its promises, pictures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

NONE, AUTO = "none", "budget"
_NOT_WORSE, _OF_BEST = 0.98, 0.97  # than no speculation, than the best fixed number of drafts


def show(label: str, table: dict[str, Any]) -> None:
    print(f"\n{label}; texts {'identical' if table['same_text'] else 'DIFFER'}")
    for name, row in _arms(table).items():
        estimate, rate, gain = row["estimate_of_none"], row["tokens_per_s"], row["of_none"]
        print(
            f"  {name:9} {rate['median']:7.1f} [{rate['low']:.1f}, {rate['high']:.1f}] tokens/s"
            f"   of none {gain['median']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]"
            + (f" (estimated {estimate['median']:.3f})" if estimate else "")
            + f"   per user {row['per_user']['median']:.1f} ({row['per_user_of_none']['median']:.3f} of none)"
            f"   kept {row['kept_per_row']:.2f}",
            flush=True,
        )


def _arms(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: row for name, row in table.items() if name != "same_text"}


def conclude(result: dict[str, Any]) -> None:
    """The budget over no speculation and over the best fixed number of drafts: the worst cell, the means, the texts."""
    cells = {(name, load): table for name, by_load in result.items() for load, table in by_load.items()}
    differ = [f"{name} at {load}" for (name, load), table in cells.items() if not table["same_text"]]
    print("\ntexts: " + (f"DIFFER in {', '.join(differ)}" if differ else f"identical in all of {len(cells)} cells"))
    if any(AUTO not in table for table in cells.values()):
        return
    of_none = {cell: table[AUTO]["of_none"]["median"] for cell, table in cells.items()}
    _worst("budget / no speculation", of_none, _NOT_WORSE)
    for load in dict.fromkeys(load for _, load in cells):
        mean = statistics.mean(gain for (_, at), gain in of_none.items() if at == load)
        print(f"  mean at concurrency {load}: {mean:.3f}" + ("" if mean >= 1 else "   BELOW 1"))
    of_best = {
        cell: table[AUTO]["of_none"]["median"] / max(row["of_none"]["median"] for row in others)
        for cell, table in cells.items()
        if (others := [row for name, row in _arms(table).items() if name not in (NONE, AUTO)])
    }
    if of_best:
        _worst("budget / best fixed number of drafts", of_best, _OF_BEST)


def _worst(what: str, ratios: dict[tuple[str, str], float], least: float) -> None:
    below = [f"{name} at {load}: {ratio:.3f}" for (name, load), ratio in ratios.items() if ratio < least]
    print(f"{what}: {min(ratios.values()):.3f} to {max(ratios.values()):.3f}", end="; ")
    print(f"BELOW {least} in {', '.join(below)}" if below else f"nowhere below {least}")


def plots(result: dict[str, Any], directory: Path) -> None:
    """Throughput against concurrency and against per-user speed; mean budget against concurrency."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    directory.mkdir(parents=True, exist_ok=True)
    for workload, by_load in result.items():
        figure = Figure(figsize=(13, 4), layout="constrained")
        panels = figure.subplots(1, 3)
        loads = [int(load) for load in by_load]
        for name in _arms(next(iter(by_load.values()))):
            rows = [table[name] for table in by_load.values()]
            rates = [row["tokens_per_s"]["median"] for row in rows]
            panels[0].plot(loads, rates, marker="o", label=name)
            panels[1].plot([row["per_user"]["median"] for row in rows], rates, marker="o")
            panels[2].plot(loads, [row["kept_per_row"] for row in rows], marker="o")
        panels[0].set(xlabel="concurrency", ylabel="tokens/s", xscale="log", title=workload)
        panels[1].set(xlabel="tokens/s per user", ylabel="tokens/s", xscale="log")
        panels[2].set(xlabel="concurrency", ylabel="drafts verified per row", xscale="log")
        panels[0].legend()
        figure.savefig(directory / f"load-{workload}.png", dpi=120)
