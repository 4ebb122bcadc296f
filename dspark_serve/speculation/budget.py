"""How many drafts deserve verification, and which rows deserve a draft: the arithmetic, on plain arrays.

Every function is deterministic, ties included, and keeps prefixes. Must not know: torch, requests, where survival and
times come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEVELS: Floats = np.arange(10) / 10  # survival from which a draft would be kept

_SIEVES = 4
_END = np.ones(1, dtype=np.bool_)


def best_of_curve(
    survival: Floats, base: float, draft_ms: float, step_ms: Floats, margin: float = 0.0, hurdle: float = 0.0
) -> Ints:
    """Drafts to keep per row [rows] so that expected tokens per second are highest. Looks at every confidence.

    survival [rows, width]: probability that a draft and all before it are accepted, falling along a row; 0 where a row
    has no draft. base: tokens that come out without drafts. step_ms [at least drafts + 1]: the step's time with 0, 1,
    ... drafts in all. Keeps none unless that gains more than `hurdle` over keeping none, and trims only where that
    gains more than `margin` over keeping everything.
    """
    gains = _highest_first(survival)
    rates = _rates(gains, base, draft_ms, step_ms)
    best = int(rates.argmax())  # of equal ones the fewest drafts
    if rates[best] <= rates[0] * (1 + hurdle):
        return np.zeros(len(survival), dtype=np.int64)
    if rates[best] <= rates[-1] * (1 + margin):
        best = len(gains)
    return _first(best, survival, gains)


def early_stop(survival: Floats, base: float, draft_ms: float, step_ms: Floats) -> Ints:
    """The same without looking ahead: admits in order of survival and stops at the first draft that does not pay.

    Whether a draft is kept depends on no confidence behind it (DSpark paper, 3.2.2), so it is legal where the text
    must not depend on the drafts (`rejection`). Steps in the times would stop it too soon; their lower convex hull,
    which depends on no draft at all, takes the place of the times.
    """
    gains = _highest_first(survival)
    rates = _rates(gains, base, draft_ms, convex_hull(step_ms[: len(gains) + 1]))
    improves = rates[1:] > rates[:-1]
    kept = len(gains) if improves.all() else int(improves.argmin())
    return _first(kept, survival, gains)


def survival_of(probabilities: Floats) -> Floats:
    """Of drafts [rows, width], given that the ones before are accepted: that all of them are."""
    survival = probabilities.copy(order="F")
    for before, slot in pairwise(survival.T):  # cumprod takes several times as long
        slot *= before
    return survival


def _highest_first(survival: Floats) -> Floats:
    """Survival of all drafts there are [drafts], in the order in which they are admitted."""
    ascending = survival.T.flatten()
    ascending.sort()
    return ascending[ascending.searchsorted(0.0, side="right") :][::-1]


def _first(count: int, survival: Floats, gains: Floats) -> Ints:
    """How many of the first `count` drafts in order of admission are each row's; ties go by slot, then by row.

    Only the last of them has to be known for that. Sorting the drafts themselves, and not just their survival, takes
    several times as long as all the rest.
    """
    if not count:
        return np.zeros(len(survival), dtype=np.int64)
    last = gains[count - 1]
    kept: Ints = (survival >= last).sum(1, dtype=np.int64)
    if count < len(gains) and gains[count] == last:
        tied = np.flatnonzero((survival == last).T)  # slot by slot
        kept -= np.bincount(tied[count - int(kept.sum()) :] % len(survival), minlength=len(survival))
    return kept


def _rates(gains: Floats, base: float, draft_ms: float, step_ms: Floats) -> Floats:
    """Expected tokens per millisecond with the first 0, 1, ... drafts."""
    expected = np.empty(len(gains) + 1)
    expected[0] = 0.0
    gains.cumsum(out=expected[1:])
    expected += base
    rates: Floats = expected / (step_ms[: len(expected)] + draft_ms)
    return rates


def convex_hull(times: Floats) -> Floats:
    """The largest convex curve nowhere above `times` [n]."""
    places = np.arange(len(times))
    corners, slopes = places, times[1:] - times[:-1]
    for _ in range(_SIEVES):
        # On or above the line between its neighbours, a point is no corner; nor is it, where measured curves are
        # straight, for lying below by a rounding error.
        bends = slopes[1:] - slopes[:-1] > 1e-9 * np.abs(slopes[1:])
        if bends.all():
            break
        kept = corners[np.concatenate([_END, bends, _END])[: len(corners)]]
        corners, y = kept, times[kept]
        slopes = (y[1:] - y[:-1]) / (kept[1:] - kept[:-1])
    else:
        corners = _wrapped(corners, times[corners])
    hull: Floats = np.interp(places, corners, times[corners])
    return hull


def _wrapped(x: Ints, y: Floats) -> Ints:
    """The corners of the hull among these points, one after the other."""
    found, last = [0], len(x) - 1
    while found[-1] < last:
        here = found[-1]
        slopes = (y[here + 1 :] - y[here]) / (x[here + 1 :] - x[here])
        least = slopes.min()
        # The farthest point of the least slope, give or take rounding.
        found.append(here + 1 + int((slopes <= least + 1e-9 * abs(least)).nonzero()[0][-1]))
    return x[found]


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
        flat = np.sort(samples, axis=None)
        sums = np.zeros(len(flat) + 1)
        sums[:-1] = flat[::-1].cumsum()[::-1]
        sums /= len(samples)
        by_limit = np.zeros(samples.shape[1] + 1)
        samples.sum(0).cumsum(out=by_limit[1:])
        if by_limit[-1] > 0:
            by_limit /= by_limit[-1]
        else:
            by_limit[1:] = 1.0
        return Drafted(flat, sums, by_limit, len(samples))

    def usual(self, limits: Ints) -> Floats:
        """Drafts accepted of all that rows may have [rows], if their survival is the usual."""
        usual: Floats = self._share(limits) * self.sums[0]
        return usual

    def _share(self, limits: Ints) -> Floats:
        share: Floats = self.by_limit[np.minimum(limits, len(self.by_limit) - 1)]
        return share

    def at(self, levels: Floats, scale: Floats, limits: Ints) -> tuple[Floats, Floats]:
        """Drafts kept and accepted, [rows, levels], of rows whose survival is `scale` [rows] times the usual."""
        # Computed level by level: sums over many rows run along memory.
        order = (-scale).argsort()  # so that what is searched for ascends: it is found in a third of the time
        first = np.empty((len(levels), len(scale)), dtype=np.int64)
        first[:, order] = self.survival.searchsorted(levels[:, None] / np.maximum(scale[order], 1e-6))
        share = self._share(limits)
        kept = (len(self.survival) - first) / self.samples * share
        gain = self.sums[first] * (scale * share)
        return np.minimum(kept, limits, out=kept).T, np.minimum(gain, limits, out=gain).T


def rows_worth_drafting(
    kept: Floats, gain: Floats, base: float, draft_ms: Floats, step_ms: Floats, hurdle: float = 0.0
) -> npt.NDArray[np.bool_]:
    """Which rows earn a draft [rows], decided before it is made.

    kept, gain [rows, levels]: drafts a row would keep and have accepted if everything above a level of survival were
    kept. draft_ms [rows + 1]: the time to draft for 0, 1, ... rows. step_ms as above. The rows with the most to gain
    come first; nobody drafts unless that gains more than `hurdle`.
    """
    rows, levels = gain.shape
    order = (-gain[:, 0]).argsort(kind="stable")
    total = np.zeros((2, levels, rows + 1))
    kept.T.take(order, axis=1).cumsum(1, out=total[0, :, 1:])
    gain.T.take(order, axis=1).cumsum(1, out=total[1, :, 1:])
    rates = (base + total[1]) / (draft_ms + _means(step_ms, total[0]))
    best = rates.max(0)  # [rows + 1]
    some = 1 + int(best[1:].argmax()) if rows else 0
    chosen = np.zeros(rows, dtype=np.bool_)
    if best[some] > best[0] * (1 + hurdle):
        chosen[order[:some]] = True
    return chosen


def _means(times: Floats, counts: Floats) -> Floats:
    """Times at counts that are means over steps: between whole numbers the line is right. As np.interp, but quicker."""
    whole = counts.astype(np.int64)
    slopes = np.zeros(len(times))
    np.subtract(times[1:], times[:-1], out=slopes[:-1])
    part: Floats = counts - whole
    part *= slopes.take(whole, mode="clip")
    part += times.take(whole, mode="clip")
    return part
