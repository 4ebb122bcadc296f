"""What a step and a draft cost on this machine: measured curves, corrected by every step, and their profile on disk.

Fed durations; has no clock of its own. Must not know: torch, models, requests, what the times are used for.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_EXACT = 64  # counts up to here have a bucket each, so that a cliff stays where it is
_BUCKETS_PER_OCTAVE = 12  # beyond: a bucket per 6 %
_WINDOW = 15  # measurements whose median is the machine's present slowdown
_TOGETHER = 8  # steps that were measured together count as no more than so many: all may have been disturbed
_GAIN, _DRAFT_GAIN = 0.03, 0.1  # of a bucket's correction, per measurement
# The first measurements of a bucket count for more, the n-th for 1 / (n + this), but not for much: what looks cheapest
# is chosen, so every count that is underestimated by chance is found.
_FIRST = 20.0
_SHARED = 8  # changes of buckets after which those near them follow
_MOST_SEEN = 200.0  # measurements of a bucket that count for that
_CONTEXT_GAIN = 2.0  # times a bucket's: what all counts of such rows and contexts have in common is learned sooner
_CLIP = 0.2  # a single measurement counts as at most this far off (in logarithms): the estimate is nearly a median
_LIMIT = math.log(8.0)  # of a correction
_FORMAT = 5

_CURVES = ("steps", "drafts", "greedy_steps", "greedy_drafts")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One measurement. `count`: tokens of a step, or rows of a draft.

    `context`: keys that are looked at: a row's once for all tokens of its prompt, and once more for every draft.
    """

    count: int
    rows: int
    context: int
    ms: float

    @property
    def usable(self) -> bool:
        return math.isfinite(self.ms) and self.ms > 0 and min(self.count, self.rows) > 0 and self.context >= 0


@dataclass(frozen=True)
class Profile:
    """A machine's measured curves: steps by tokens, drafts by rows (none where drafting costs nothing).

    Drawing a token can take much longer than taking the likeliest, so steps and drafts whose rows are all greedy have
    curves of their own; without them, the others serve.
    """

    steps: tuple[Point, ...]
    drafts: tuple[Point, ...] = ()
    greedy_steps: tuple[Point, ...] = ()
    greedy_drafts: tuple[Point, ...] = ()

    def __post_init__(self) -> None:
        if not any(point.usable for point in self.steps):
            raise ValueError("a profile needs at least one measured step")


def load_profile(path: Path, key: Mapping[str, object]) -> Profile | None:
    """The profile kept under `path` for `key`; None, with a warning, when it is damaged or another's."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != _FORMAT or stored["key"] != dict(key):
            raise ValueError("it was measured on another machine or for another model")
        profile = Profile(**{name: tuple(Point(**point) for point in stored[name]) for name in _CURVES})
        if not all(point.usable for name in _CURVES for point in getattr(profile, name)):
            raise ValueError("it holds impossible times")
        return profile
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the cost profile %s is ignored and measured again: %s", path, error)
        return None


def save_profile(path: Path, key: Mapping[str, object], profile: Profile) -> None:
    """Write by one rename, so that no reader sees half a file. A cache that cannot be written costs a warning."""
    points = {name: [asdict(p) for p in getattr(profile, name)] for name in _CURVES}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({"format": _FORMAT, "key": dict(key), **points}), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        logger.warning("the cost profile cannot be kept in %s: %s", path, error)


class _Curve:
    """Time by count: measured points joined by lines, plus a time per row and per key, times a correction per bucket.

    The base is what the profile says; corrections are logarithms, learned from steps.
    """

    def __init__(self, points: Sequence[Point], max_count: int) -> None:
        points = _quickest(points)
        self._key_ms = _slope(points, "context")
        self._row_ms = _slope(points, "rows", self._key_ms)
        by_count: dict[int, list[float]] = {}
        for p in _shortest(points):  # long contexts tell what a key costs, and no more
            by_count.setdefault(p.count, []).append(p.ms - self._key_ms * p.context - self._row_ms * p.rows)
        counts = sorted(by_count)
        measured = np.array([max(statistics.median(by_count[count]), 1e-3) for count in counts])
        # What is done for more cannot take longer for less: a disturbed measurement gives way to those after it.
        times: list[float] = np.minimum.accumulate(measured[::-1])[::-1].tolist()
        last = max(max_count, counts[-1])
        self._base: Floats = np.interp(np.arange(last + 1), counts, times)
        if last > counts[-1]:  # beyond the last measured point the mean slope of the upper half goes on
            middle = len(counts) // 2 if len(counts) > 1 else 0
            span = max(counts[-1] - counts[middle], 1)
            slope = max((times[-1] - times[middle]) / span, times[-1] / counts[-1] / 2)
            self._base[counts[-1] :] = times[-1] + slope * np.arange(last + 1 - counts[-1])
        self._bucket = np.array([_bucket(count) for count in range(last + 1)])
        self._near = _nearness(self._bucket)
        # Keys are pairs: the octave of rows (0 for drafts), and the octave of the mean context.
        self._by_count: dict[int, _Factors] = {}
        self._by_context: dict[tuple[int, int], float] = {}

    def times(
        self, first: int, last: int, rows: int, context: float | Floats, key: tuple[int, int], slowdown: float
    ) -> Floats:
        """Milliseconds for first..last counts; the last known time goes on beyond."""
        times: Floats = _between(first, last, self._base) + (self._row_ms * rows + self._key_ms * context)
        learned = self._by_count.get(key[0])
        if learned is not None:
            times *= _between(first, last, learned.factor)
            slowdown *= math.exp(self._by_context.get(key, 0.0))
        times *= slowdown
        return times

    def time(self, count: int, rows: int, context: float, key: tuple[int, int]) -> float:
        """The same for one count, without the machine's slowdown."""
        count = min(count, len(self._base) - 1)
        base = float(self._base[count]) + self._row_ms * rows + self._key_ms * context
        learned = self._by_count.get(key[0])
        if learned is None:
            return base
        return base * float(learned.factor[count]) * math.exp(self._by_context.get(key, 0.0))

    def correct(self, count: int, key: tuple[int, int], error: float, gain: float, times: int = 1) -> None:
        """error: logarithm of measured over predicted time, the same in so many measurements."""
        error = min(max(error, -_CLIP), _CLIP)
        learned = self._by_count.get(key[0])
        if learned is None:
            learned = self._by_count[key[0]] = _Factors(self._bucket, self._near)
        learned.change(min(count, len(self._bucket) - 1), error, gain, times)
        change = (1 - (1 - _CONTEXT_GAIN * gain) ** times) * error
        self._by_context[key] = min(max(self._by_context.get(key, 0.0) + change, -_LIMIT), _LIMIT)


class _Factors:
    """A correction per bucket of counts, kept as a factor per count: read whole in every step, written in one place.

    Most steps are of a few counts. What is found of those goes for the counts near them, too, until they are measured
    themselves: mostly the machine differs from the profile, not the curve from its shape. Else every other count would
    look cheap where the usual one has turned out dear.
    """

    def __init__(self, bucket: Ints, near: Floats) -> None:
        """bucket [counts], ascending. near [buckets, buckets]: how much the second one says of the first."""
        self.factor: Floats = np.ones(len(bucket))
        self._bucket, self._near = bucket, near
        self._bounds: list[int] = bucket.searchsorted(np.arange(bucket[-1] + 2)).tolist()  # first count of each bucket
        self._value, self._seen, self._others = np.zeros((3, len(near)))  # correction; measurements; what others say
        self._changes = 0

    def change(self, count: int, error: float, gain: float, times: int) -> None:
        """Move the correction of this count's bucket by a part of the error, in logarithms, so many times."""
        bucket = int(self._bucket[count])
        change = (1 - (1 - max(gain, 1 / (self._seen[bucket] + _FIRST))) ** times) * error
        self._seen[bucket] += times
        moved = min(max(float(self._value[bucket]) + change, -_LIMIT), _LIMIT)
        self._value[bucket] = moved
        self._changes += 1
        if self._changes % _SHARED:
            self.factor[self._bounds[bucket] : self._bounds[bucket + 1]] = math.exp(moved)
        else:
            self._share()

    def _share(self) -> None:
        """Move every bucket as those near it have moved since the last time, the more the less was measured of it."""
        seen = np.minimum(self._seen, _MOST_SEEN)
        weight = self._near @ seen
        others = self._others.copy()
        np.divide(self._near @ (seen * self._value), weight, out=others, where=weight > 0)
        self._value += (others - self._others) * (_FIRST / (seen + _FIRST))
        self._others = others
        self.factor = np.exp(self._value)[self._bucket]


def _nearness(buckets: Ints) -> Floats:
    """How much each bucket says of each other [buckets, buckets]: a quarter of it where counts differ by twice."""
    first = np.log2(np.maximum(buckets.searchsorted(np.arange(buckets[-1] + 1)), 1))
    near: Floats = 0.25 ** np.abs(first[:, None] - first)
    np.fill_diagonal(near, 0.0)
    return near


class CostModel:
    """Predicts steps and drafts in milliseconds, and learns from those that were measured.

    A slowdown common to all buckets follows the machine within a few steps (another process takes a core, the clock
    drops); corrections per bucket follow the shape of the curves slowly. Measurements that cannot be are dropped.
    """

    def __init__(self, profile: Profile, max_tokens: int, max_rows: int) -> None:
        greedy = (profile.greedy_steps or profile.steps, profile.greedy_drafts or profile.drafts)
        self._steps = tuple(_Curve(points, max_tokens) for points in (profile.steps, greedy[0]))  # [drawing, greedy]
        self._drafts: tuple[_Curve, ...] = ()  # likewise, where drafts cost anything
        if any(p.usable for p in profile.drafts):
            self._drafts = tuple(_Curve(points, max_rows) for points in (profile.drafts, greedy[1]))
        self._recent: deque[float] = deque(maxlen=_WINDOW)  # logarithm of measured over uncorrected time
        self._slowdown = 0.0
        self._noise = 0.1

    @property
    def slowdown(self) -> float:
        """How much slower the machine is now than when it was profiled."""
        return math.exp(self._slowdown)

    @property
    def noise(self) -> float:
        """Typical relative error of a prediction."""
        return self._noise

    def step_ms(self, tokens: int, rows: int, context: int, greedy: bool = False, draft_keys: float = 0.0) -> float:
        """A step with this many tokens (drafts and prompt chunks included) in this many rows.

        context: keys that the rows see without their drafts. draft_keys: those that the drafts see, each its row's.
        """
        key = _step_key(rows, context)
        return self._steps[greedy].time(tokens, rows, context + draft_keys, key) * self.slowdown

    def step_curve(
        self, first: int, last: int, rows: int, context: int, greedy: bool = False, keys_per_draft: float = 0.0
    ) -> Floats:
        """step_ms for first..last tokens -> [last - first + 1], the first without drafts."""
        contexts: Floats = context + keys_per_draft * np.arange(last - first + 1.0)
        times = self._steps[greedy].times(first, last, rows, contexts, _step_key(rows, context), self.slowdown)
        # More tokens take no less time. Where fewer seem to take longer, they are what was measured of late, and the
        # others have not been: drafts would seem to save time even where none is accepted.
        found: Floats = np.maximum.accumulate(times)
        return found

    def draft_ms(self, rows: int, context: int, greedy: bool = False) -> float:
        """A draft pass for this many rows; 0 where drafting costs nothing."""
        if not self._drafts or not rows:
            return 0.0
        return self._drafts[greedy].time(rows, 1, context, _draft_key(rows, context)) * self.slowdown

    def draft_curve(self, rows: int, context: int, greedy: bool = False) -> Floats:
        """draft_ms for 0..rows rows whose mean context is that of all -> [rows + 1]."""
        curve: Floats = np.zeros(rows + 1)
        if self._drafts and rows:
            contexts: Floats = context / rows * np.arange(1.0, rows + 1)
            key = _draft_key(rows, context)
            curve[1:] = self._drafts[greedy].times(1, rows, 1, contexts, key, self.slowdown)
        return curve

    def observe_step(
        self,
        tokens: int,
        rows: int,
        context: int,
        ms: float,
        greedy: bool = False,
        draft_keys: float = 0.0,
        times: int = 1,
    ) -> float:
        """A step took `ms`, drafting not included, or so many steps did, mostly. Returns what one was expected to take:
        step_ms until now."""
        key, curve = _step_key(rows, context), self._steps[greedy]
        usual_ms = curve.time(tokens, rows, context + draft_keys, key)
        expected_ms = usual_ms * self.slowdown
        if _sane(tokens, rows, ms):
            ratio = math.log(ms / usual_ms)
            self._noise += _GAIN * (min(abs(ratio - self._slowdown), 1.0) - self._noise)
            # What the common part did not explain is the bucket's own. Before this step has a say in the common part:
            # two kinds of steps by turns would else each take it for its own, and teach their buckets nothing.
            times = min(times, _TOGETHER)
            curve.correct(tokens, key, ratio - self._slowdown, _GAIN, times)
            self._recent.append(ratio)
            if times > 1:  # as if they had come one after the other: the bucket has its part by now
                left = math.log(ms / curve.time(tokens, rows, context + draft_keys, key))
                self._recent.extend([left] * (times - 1))
            self._slowdown = statistics.median(self._recent)
        return expected_ms

    def observe_draft(self, rows: int, context: int, ms: float, greedy: bool = False) -> None:
        """A draft pass took `ms`."""
        if self._drafts and _sane(rows, rows, ms):
            key, curve = _draft_key(rows, context), self._drafts[greedy]
            ratio = math.log(ms / curve.time(rows, 1, context, key))
            # Steps alone say how slow the machine is: there is one of them whether drafts are made or not.
            curve.correct(rows, key, ratio - self._slowdown, _DRAFT_GAIN)


def _step_key(rows: int, context: int) -> tuple[int, int]:
    return _octave(rows), _octave(context // max(rows, 1))


def _draft_key(rows: int, context: int) -> tuple[int, int]:
    return 0, _octave(context // rows)


def _sane(count: int, rows: int, ms: float) -> bool:
    """False for a clock that was set back, and for a step that did nothing."""
    return math.isfinite(ms) and ms > 0 and count > 0 and rows > 0


def _quickest(points: Sequence[Point]) -> list[Point]:
    """Of points measured more than once the quickest: whatever disturbs a measurement makes it longer."""
    least: dict[tuple[int, int, int], Point] = {}
    for p in sorted((p for p in points if p.usable), key=lambda p: p.ms):
        least.setdefault((p.count, p.rows, p.context), p)
    return list(least.values())


def _shortest(points: Sequence[Point]) -> list[Point]:
    """Of points that differ in context only the one with the shortest."""
    least: dict[tuple[int, int], Point] = {}
    for p in sorted(points, key=lambda p: p.context):
        least.setdefault((p.count, p.rows), p)
    return list(least.values())


def _slope(points: Sequence[Point], of: str, key_ms: float = 0.0) -> float:
    """Time per row, or per key: the median over pairs of points that differ in it and are equal in count.

    Where keys are asked for, rows must be equal too; where rows are asked for, `key_ms` is taken out first.
    """
    slopes = []
    for i, a in enumerate(points):
        for b in points[:i]:
            distance = getattr(a, of) - getattr(b, of)
            if a.count == b.count and distance and (of == "rows" or a.rows == b.rows):
                keys = key_ms * (a.context - b.context)
                slopes.append((a.ms - b.ms - (keys if of == "rows" else 0.0)) / distance)
    return max(0.0, statistics.median(slopes)) if slopes else 0.0


def _between(first: int, last: int, values: Floats) -> Floats:
    """values[first..last], the last of all going on beyond; not to be changed."""
    if last < len(values):
        return values[first : last + 1]
    return values[np.minimum(np.arange(first, last + 1), len(values) - 1)]


def _octave(value: int) -> int:
    return max(value, 0).bit_length()


def _bucket(count: int) -> int:
    return count if count <= _EXACT else _EXACT + math.ceil(_BUCKETS_PER_OCTAVE * math.log2(count / _EXACT))
