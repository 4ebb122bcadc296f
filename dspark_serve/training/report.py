"""The last part of a graft: calibrate an exported head on held-out text, and say what it is worth, as JSON and PNG.

Must not know: training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspark_serve.training.calibrate import Calibration, Signals, calibrate
from dspark_serve.training.evaluate import acceptance_by_slot, score
from dspark_serve.training.export import load_exported, write_json
from dspark_serve.training.passages import PassageSource
from dspark_serve.training.signals import accepted_length, collect_signals
from dspark_serve.training.target import TargetWeights

FACTS, REPORT, PLOT = "dspark.json", "report.json", "report.png"
_TEXTS = 400  # held-out conversations used at most

logger = logging.getLogger(__name__)


def calibrate_head(directory: Path, source: PassageSource, weights: TargetWeights, say: Callable[[str], None]) -> None:
    """Fit every mode's calibration, and write it to dspark.json and all measurements to report.json.

    Raises ValueError when nothing is held out, or the head belongs to another target.
    """
    facts = _facts(directory)
    if facts.get("target_fingerprint", weights.fingerprint) != weights.fingerprint:
        raise ValueError(f"{directory} was trained for another target than {weights.directory}")
    head, target = load_exported(directory, weights.embedding, weights.head)
    chosen = source.held_out[-_TEXTS:]  # the newest: nothing was chosen by them
    if not chosen:
        raise ValueError("no conversation is held out to calibrate on")
    passages = [(c, source.load(c)) for c in chosen]
    by_mode = collect_signals(head, passages, target)
    kept: dict[str, Calibration] = {}
    report: dict[str, Any] = {}
    for mode, signals in by_mode.items():
        kept[mode], report[mode] = calibrate(signals, head.confidence is not None)
        report[mode]["accepted_length"] = round(accepted_length(signals), 4)
        report[mode]["acceptance_by_slot"] = _by_slot(signals)
        errors = report[mode]["methods"][report[mode]["kept"]]["ece"]
        say(f"{mode}: accepted length {report[mode]['accepted_length']:.3f}, {report[mode]['kept']}, ECE {errors}")
    overall = score(head, ((c.temperature, p) for c, p in passages), target)
    expected = {"greedy": overall.greedy, **{m: r["accepted_length"] for m, r in report.items() if m != "greedy"}}
    facts["expected_accepted_length"] = {mode: round(value, 4) for mode, value in expected.items()}
    facts["calibration"] = {mode: asdict(calibration) for mode, calibration in kept.items()}
    write_json(directory / FACTS, facts)
    write_json(directory / REPORT, {"texts": len(chosen), "greedy_rounds": asdict(overall), "modes": report})
    if by_mode:
        _plot(directory / PLOT, by_mode, kept)
    else:
        say("the held-out text is too short to calibrate on: let the target write more")


def _by_slot(signals: Signals) -> list[float]:
    return [round(a, 4) for a in acceptance_by_slot(signals.prefix.sum(1), signals.accepted.shape[1])]


def _facts(directory: Path) -> dict[str, Any]:
    path = directory / FACTS
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return facts


def _plot(path: Path, by_mode: dict[str, Signals], kept: dict[str, Calibration], bins: int = 10) -> None:
    """Survival said against survival seen, one panel per mode and one line per slot; needs the [train] extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no %s: matplotlib is not installed", path.name)
        return
    figure = Figure(figsize=(4 * len(by_mode), 4), layout="constrained")
    panels = figure.subplots(1, len(by_mode), squeeze=False)[0]
    for panel, (mode, signals) in zip(panels, by_mode.items(), strict=True):
        survival, prefix = kept[mode].survival(signals), signals.prefix
        for slot in range(prefix.shape[1]):
            place = (survival[:, slot] * bins).astype(int).clip(0, bins - 1)
            full = [b for b in range(bins) if (place == b).sum() >= 20]
            said = [survival[place == b, slot].mean() for b in full]
            seen = [prefix[place == b, slot].mean() for b in full]
            panel.plot(said, seen, marker="o", markersize=3, label=f"slot {slot}")
        panel.plot([0, 1], [0, 1], color="grey", linewidth=0.5)
        panel.set(title=f"{mode}: {accepted_length(signals):.2f} accepted", xlabel="said", ylabel="seen")
    panels[0].legend()
    figure.savefig(path, dpi=120)
