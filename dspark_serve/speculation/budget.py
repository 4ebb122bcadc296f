"""How many drafts deserve verification, and which rows deserve a draft: the arithmetic, on plain arrays.

Every function is deterministic, ties included, and keeps prefixes. Must not know: torch, requests, where survival and
times come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEVELS: Floats = np.arange(10) / 10  # survival from which a draft would be kept


def best_of_curve(survival: Floats, base: float, draft_ms: float, step_ms: Floats, margin: float = 0.0) -> Ints:
    """Drafts to keep per row [rows] so that expected tokens per second are highest. Looks at every confidence.

    survival [rows, width]: probability that a draft and all before it are accepted, falling along a row; 0 where a row
    has no draft. base: tokens that come out without drafts. step_ms [at least drafts + 1]: the step's time with 0, 1,
    ... drafts in all. Trims only where that gains more than `margin` over keeping everything.
    """
    order, gains = _sorted(survival)
    rates = _rates(gains, base, draft_ms, step_ms)
    best = int(rates.argmax())  # of equal ones the fewest drafts
    if rates[best] <= rates[-1] * (1 + margin):
        best = len(gains)
    return _per_row(order[:best], len(survival))


def early_stop(survival: Floats, base: float, draft_ms: float, step_ms: Floats) -> Ints:
    """The same without looking ahead: admits in order of survival and stops at the first draft that does not pay.

    Whether a draft is kept depends on no confidence behind it (DSpark paper, 3.2.2), so it is legal where the text
    must not depend on the drafts (`rejection`). Steps in the times would stop it too soon; their lower convex hull,
    which depends on no draft at all, takes the place of the times.
    """
    order, gains = _sorted(survival)
    rates = _rates(gains, base, draft_ms, convex_hull(step_ms[: len(gains) + 1]))
    improves = rates[1:] > rates[:-1]
    kept = len(gains) if improves.all() else int(improves.argmin())
    return _per_row(order[:kept], len(survival))


def _sorted(survival: Floats) -> tuple[Ints, Floats]:
    """Rows of the drafts in order of admission, and their survival: highest first, ties by slot, then by row."""
    rows = survival.shape[0]
    flat = np.minimum.accumulate(survival, axis=1).T.ravel()  # slot by slot, so that a stable sort settles ties
    order = np.argsort(-flat, kind="stable")[: int(np.count_nonzero(flat > 0))]
    return order % rows, flat[order]


def _rates(gains: Floats, base: float, draft_ms: float, step_ms: Floats) -> Floats:
    """Expected tokens per millisecond with the first 0, 1, ... drafts."""
    expected = np.empty(len(gains) + 1)
    expected[0] = base
    np.cumsum(gains, out=expected[1:])
    expected[1:] += base
    rates: Floats = expected / (step_ms[: len(expected)] + draft_ms)
    return rates


def _per_row(admitted: Ints, rows: int) -> Ints:
    return np.bincount(admitted, minlength=rows).astype(np.int64)


def convex_hull(times: Floats) -> Floats:
    """The largest convex curve nowhere above `times` [n]."""
    corners, last = [0], len(times) - 1
    while corners[-1] < last:
        here = corners[-1]
        slopes = (times[here + 1 :] - times[here]) / np.arange(1, last - here + 1)
        least = slopes.min()
        # The farthest point of the least slope, give or take rounding: measured curves have long straight pieces.
        corners.append(here + 1 + int(np.flatnonzero(slopes <= least + 1e-9 * abs(least))[-1]))
    hull: Floats = np.interp(np.arange(last + 1), corners, times[corners])
    return hull


def lift_slow_rows(kept: Ints, survival: Floats, draft_ms: float, step_ms: Floats, tokens_per_s: float) -> Ints:
    """Gives more drafts to rows that fall short of `tokens_per_s`, as far as their confidences let them reach it.

    Rows that cannot reach it whatever they keep are left alone, and so is everything if the step gets so much longer
    that fewer rows reach it than before. Looks at every confidence.
    """

    def reached(counts: Ints) -> tuple[npt.NDArray[np.bool_], float]:
        total_ms = draft_ms + float(step_ms[min(int(counts.sum()), len(step_ms) - 1)])
        return expected[np.arange(len(counts)), counts] >= tokens_per_s * total_ms / 1e3, total_ms

    expected = np.concatenate([np.ones((len(survival), 1)), 1 + survival.cumsum(1)], axis=1)  # [rows, width + 1]
    able = np.count_nonzero(survival > 0, axis=1)
    before, _ = reached(kept)
    lifted = kept
    for _ in range(3):  # more drafts take more time, in which more tokens are needed
        _, total_ms = reached(lifted)
        needed = (expected < tokens_per_s * total_ms / 1e3).sum(1)  # fewest drafts that reach it
        lifted = np.where((needed > lifted) & (needed <= able), needed, lifted)
    after, _ = reached(lifted)
    return lifted if after.sum() > before.sum() else kept


@dataclass(frozen=True)
class Drafted:
    """Survival seen lately, from which the worth of a draft is judged before it is made.

    Keeping what survives with at least t, a row keeps `kept(t)` drafts and has `gain(t)` accepted, in the mean.
    """

    survival: Floats  # ascending, all slots of all samples
    sums: Floats  # sums[i]: of survival[i:], per sample
    by_limit: Floats  # share of the whole that the first n slots have, [width + 1]
    samples: int

    @staticmethod
    def of(samples: Floats) -> Drafted:
        """samples [n, width], each row falling."""
        flat = np.sort(samples.ravel())
        sums = np.concatenate([flat[::-1].cumsum()[::-1], [0.0]]) / len(samples)
        slots = samples.mean(0).cumsum()
        share = slots / slots[-1] if slots[-1] > 0 else np.ones_like(slots)
        return Drafted(flat, sums, np.concatenate([[0.0], share]), len(samples))

    def at(self, levels: Floats, scale: Floats, limits: Ints) -> tuple[Floats, Floats]:
        """Drafts kept and accepted, [rows, levels], of rows whose survival is `scale` [rows] times the usual."""
        first = np.searchsorted(self.survival, levels / np.maximum(scale, 1e-6)[:, None])
        share = self.by_limit[np.minimum(limits, len(self.by_limit) - 1)][:, None]
        kept = (len(self.survival) - first) / self.samples * share
        gain = self.sums[first] * scale[:, None] * share
        return np.minimum(kept, limits[:, None]), np.minimum(gain, limits[:, None])


def rows_worth_drafting(
    kept: Floats, gain: Floats, base: float, draft_ms: Floats, step_ms: Floats, margin: float = 0.0
) -> npt.NDArray[np.bool_]:
    """Which rows earn a draft [rows], decided before it is made.

    kept, gain [rows, levels]: drafts a row would keep and have accepted if everything above a level of survival were
    kept. draft_ms [rows + 1]: the time to draft for 0, 1, ... rows. step_ms as above. The rows with the most to gain
    come first; nobody drafts only where that gains more than `margin`.
    """
    rows = len(gain)
    order = np.argsort(-gain[:, 0], kind="stable")
    total_kept = np.concatenate([np.zeros((1, gain.shape[1])), kept[order].cumsum(0)])  # [rows + 1, levels]
    total_gain = np.concatenate([np.zeros((1, gain.shape[1])), gain[order].cumsum(0)])
    # Between whole tokens the line is right: it is a mean over steps.
    steps = np.interp(total_kept, np.arange(len(step_ms)), step_ms)
    rates = ((base + total_gain) / (draft_ms[:, None] + steps)).max(1)  # [rows + 1]
    some = 1 + int(rates[1:].argmax()) if rows else 0
    chosen = np.zeros(rows, dtype=np.bool_)
    if rates[some] * (1 + margin) >= rates[0]:
        chosen[order[:some]] = True
    return chosen
