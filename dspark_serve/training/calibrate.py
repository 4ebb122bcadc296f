"""From a head's signals to probabilities: fits per slot on held-out text, judged on text they were not fitted to.

Candidates: the paper's sequential temperatures, and a scale and offset per slot on the confidence logit, on the largest
draft probability, on both. The best measured one is kept. Must not know: heads, records, files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
BINS = 20
FOLDS = 8
_GRID = np.exp(np.linspace(-2, 2, 81))  # temperatures tried, 1 among them
_SHRINK = 1e-3  # pulls a fit on few examples towards zero
_EDGE = 1e-4  # probabilities are kept this far from 0 and 1 before their logit is taken


@dataclass(frozen=True)
class Signals:
    """What a head said at many anchors, and how far it was right. Slots past a rejection were never reached."""

    confidence: Floats  # [anchors, size] logits
    largest: Floats  # [anchors, size] largest draft probability
    accepted: Flags  # [anchors, size] the slot would be accepted, given that those before it were
    group: npt.NDArray[np.int64]  # [anchors] the text an anchor comes from: halves are made of whole texts

    @property
    def prefix(self) -> Flags:
        """Whether slot k and all before it are accepted, [anchors, size]."""
        return np.logical_and.accumulate(self.accepted, axis=1)

    @property
    def reached(self) -> Flags:
        prefix = self.prefix
        return np.concatenate([np.ones((len(prefix), 1), dtype=np.bool_), prefix[:, :-1]], axis=1)

    def part(self, chosen: Flags) -> Signals:
        return Signals(self.confidence[chosen], self.largest[chosen], self.accepted[chosen], self.group[chosen])


@dataclass(frozen=True)
class SlotMap:
    """probability = sigmoid(confidence * logit + largest * logit(largest draft probability) + offset)."""

    confidence: float
    largest: float
    offset: float


@dataclass(frozen=True)
class Calibration:
    """One SlotMap per slot, and the name of the method that made them."""

    method: str
    slots: tuple[SlotMap, ...]

    def conditional(self, signals: Signals) -> Floats:
        """Probability of acceptance given the slots before, [anchors, size]."""
        largest = logit(signals.largest)
        columns = [
            sigmoid(m.confidence * signals.confidence[:, k] + m.largest * largest[:, k] + m.offset)
            for k, m in enumerate(self.slots)
        ]
        return np.stack(columns, axis=1)

    def survival(self, signals: Signals) -> Floats:
        return self.conditional(signals).cumprod(1)


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


def logit(probability: Floats) -> Floats:
    clipped = np.clip(probability, _EDGE, 1 - _EDGE)
    return np.log(clipped / (1 - clipped))


def calibration_error(predicted: Floats, happened: Flags) -> float:
    """Expected calibration error over equal bins of [0, 1]: mean gap of prediction and frequency, by bin size."""
    bins = np.minimum((predicted * BINS).astype(np.int64), BINS - 1)
    said = np.bincount(bins, predicted, BINS)
    came = np.bincount(bins, happened.astype(np.float64), BINS)
    return float(np.abs(said - came).sum() / max(len(predicted), 1))


def log_loss(predicted: Floats, happened: Flags) -> float:
    said = np.clip(predicted, _EDGE, 1 - _EDGE)
    return float(-np.log(np.where(happened, said, 1 - said)).mean()) if len(said) else 0.0


def area_under_curve(score: Floats, happened: Flags) -> float:
    """Probability that something that happened scored above something that did not; ties count half."""
    positive, negative = int(happened.sum()), int((~happened).sum())
    if not positive or not negative:
        return 0.5
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]  # mean rank among ties, from 1
    return float((ranks[happened].sum() - positive * (positive + 1) / 2) / (positive * negative))


def raw(size: int) -> Calibration:
    """The confidence head as it is."""
    return Calibration("raw", (SlotMap(1.0, 0.0, 0.0),) * size)


def fit_temperatures(signals: Signals) -> Calibration:
    """Sequential temperature scaling: slot by slot, the temperature whose product so far is best calibrated."""
    prefix, survival = signals.prefix, np.ones(len(signals.accepted))
    slots = []
    for k in range(signals.accepted.shape[1]):
        errors = [calibration_error(survival * sigmoid(signals.confidence[:, k] / t), prefix[:, k]) for t in _GRID]
        temperature = float(_GRID[int(np.argmin(errors))])
        survival = survival * sigmoid(signals.confidence[:, k] / temperature)
        slots.append(SlotMap(1 / temperature, 0.0, 0.0))
    return Calibration("temperatures", tuple(slots))


def fit_offsets(signals: Signals, use: Sequence[str]) -> Calibration:
    """Platt's scale and offset per slot, on the slots that were reached; `use` names the signals."""
    largest, slots = logit(signals.largest), []
    for k in range(signals.accepted.shape[1]):
        rows = signals.reached[:, k]
        columns = {"confidence": signals.confidence[rows, k], "largest": largest[rows, k]}
        scales, offset = _logistic(np.stack([columns[name] for name in use], axis=1), signals.accepted[rows, k])
        by_name = dict(zip(use, scales.tolist(), strict=True))
        slots.append(SlotMap(by_name.get("confidence", 0.0), by_name.get("largest", 0.0), offset))
    return Calibration("+".join(use), tuple(slots))


def _logistic(inputs: Floats, happened: Flags) -> tuple[Floats, float]:
    """Logistic regression by Newton's method: scales [columns] and offset. Few examples give a flat answer."""
    # One example of each kind in advance keeps the offset finite where all or none was accepted.
    design = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    centre = design.mean(0, keepdims=True) if len(design) else np.eye(1, design.shape[1], design.shape[1] - 1)
    design = np.concatenate([design, centre, centre])
    labels = np.concatenate([happened.astype(np.float64), [0.0, 1.0]])
    weights = np.zeros(design.shape[1])
    shrink = np.full(design.shape[1], _SHRINK * len(design))
    shrink[-1] = 0.0
    for _ in range(50):
        said = sigmoid(design @ weights)
        gradient = design.T @ (said - labels) + shrink * weights
        curvature = (design.T * np.maximum(said * (1 - said), 1e-6)) @ design + np.diag(shrink + 1e-9)
        change = np.linalg.solve(curvature, gradient)
        weights = weights - change
        if np.abs(change).max() < 1e-8:
            break
    return weights[:-1], float(weights[-1])


METHODS: dict[str, Callable[[Signals], Calibration]] = {
    "temperatures": fit_temperatures,
    "confidence": lambda signals: fit_offsets(signals, ("confidence",)),
    "largest": lambda signals: fit_offsets(signals, ("largest",)),
    "confidence+largest": lambda signals: fit_offsets(signals, ("confidence", "largest")),
}


def judge(conditional: Floats, signals: Signals) -> dict[str, Any]:
    """What probabilities [anchors, size] of acceptance, given the slots before, are worth: calibration error, log loss
    and AUC of survival per slot, and their own AUC."""
    survival, prefix, reached = conditional.cumprod(1), signals.prefix, signals.reached
    size = range(prefix.shape[1])
    return {
        "ece": [round(calibration_error(survival[:, k], prefix[:, k]), 4) for k in size],
        "log_loss": [round(log_loss(survival[:, k], prefix[:, k]), 4) for k in size],
        "auc": [round(area_under_curve(survival[:, k], prefix[:, k]), 4) for k in size],
        "auc_conditional": [
            round(area_under_curve(conditional[reached[:, k], k], signals.accepted[reached[:, k], k]), 4) for k in size
        ],
    }


def cross_fit(signals: Signals, fit: Callable[[Signals], Calibration]) -> Floats:
    """Probabilities [anchors, size] for every text from a fit to other texts.

    Anchors of one text fail together, so an error measured on few texts says more of them than of the fit. Hence many
    folds: each fit has nearly all texts, and the error is taken once, over all of them.
    """
    _, text = np.unique(signals.group, return_inverse=True)
    conditional = np.zeros(signals.accepted.shape)
    for fold in range(FOLDS):
        test = text % FOLDS == fold
        if test.any():
            conditional[test] = fit(signals.part(~test)).conditional(signals.part(test))
    return conditional


def calibrate(signals: Signals, has_confidence: bool = True) -> tuple[Calibration, dict[str, Any]]:
    """The best method, chosen on texts it was not fitted to and then fitted to all; and what every method measured.

    Best means the smallest log loss of survival, summed over slots: calibration error alone would keep a method that
    says the same of every draft.
    """
    methods = {name: fit for name, fit in METHODS.items() if has_confidence or name == "largest"}
    report: dict[str, Any] = {}
    if has_confidence:
        report["raw"] = judge(raw(signals.accepted.shape[1]).conditional(signals), signals)
    for name, fit in methods.items():
        report[name] = judge(cross_fit(signals, fit), signals)
    best = min(methods, key=lambda name: sum(report[name]["log_loss"]))
    return methods[best](signals), {"kept": best, "anchors": len(signals.group), "methods": report}
