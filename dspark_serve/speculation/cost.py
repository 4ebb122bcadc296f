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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dspark_serve.speculation.factors import MOST, Factors, nearness

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_EXACT = 64  # counts up to here have a bucket each, so that a cliff stays where it is
_BUCKETS_PER_OCTAVE = 12  # beyond: a bucket per 6 %
_WINDOW = 15  # measurements whose median is the machine's present slowdown
_TOGETHER = 8  # steps that were measured together count as no more than so many: all may have been disturbed
_GAIN, _DRAFT_GAIN = 0.03, 0.1  # of a bucket's correction, per measurement
_CONTEXT_GAIN = 2.0  # times a bucket's: what all counts of such rows and contexts have in common is learned sooner
_CLIP = 0.2  # a single measurement counts as at most this far off (in logarithms): the estimate is nearly a median
_LEAST_MS = 1e-3  # that anything is expected to take, however little a disturbed profile says
_FORMAT = 6

_CURVES = ("steps", "drafts", "greedy_steps", "greedy_drafts")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One measurement. `count`: tokens of a step, or rows of a draft.

    `context`: keys that its rows see, a row's once for all tokens of its prompt. `draft_keys`: those that the step's
    drafts see, each its row's once more. `silent`: tokens after which nothing is drawn, as in a prompt.
    """

    count: int
    rows: int
    context: int
    ms: float
    draft_keys: int = 0
    silent: int = 0

    @property
    def usable(self) -> bool:
        least = min(self.count - 1, self.rows - 1, self.context, self.draft_keys, self.silent)
        return math.isfinite(self.ms) and self.ms > 0 and least >= 0


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
    """Time by count: measured points joined by lines, plus what rows, keys and silent tokens take, times a correction
    per bucket.

    The base is what the profile says; corrections are logarithms, learned from steps.
    """

    def __init__(self, points: Sequence[Point], max_count: int) -> None:
        points = _quickest(points)
        self._per = per = _Slopes.of(points)
        by_count: dict[int, list[float]] = {}
        for p in _shortest(points):  # long contexts tell what a key costs, and no more
            ms = p.ms - per.ms(p.rows, p.context, p.draft_keys, p.silent)
            by_count.setdefault(p.count, []).append(ms)
        counts = sorted(by_count)
        measured = np.array([max(statistics.median(by_count[count]), _LEAST_MS) for count in counts])
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
        self._near = nearness(self._bucket)
        # Keys are pairs: the octave of rows (0 for drafts), and the octave of the mean context.
        self._by_count: dict[int, Factors] = {}
        self._by_context: dict[tuple[int, int], float] = {}

    def times(
        self,
        first: int,
        last: int,
        rows: int,
        context: float,
        key: tuple[int, int],
        slowdown: float,
        context_each: float = 0.0,
        draft_keys_each: float = 0.0,
        silent: int = 0,
    ) -> Floats:
        """Milliseconds for first..last counts; the last known time goes on beyond. context: of the first count; each
        further one has so much more, and so many more keys of drafts."""
        times: Floats = np.arange(last - first + 1.0)
        times *= self._per.ms(0, context_each, draft_keys_each, 0)
        times += self._per.ms(rows, context, 0.0, silent)
        times += _between(first, last, self._base)
        if silent:
            np.maximum(times, _LEAST_MS, out=times)
        learned = self._by_count.get(key[0])
        if learned is not None:
            times *= _between(first, last, learned.factor)
            slowdown *= math.exp(self._by_context.get(key, 0.0))
        times *= slowdown
        return times

    def time(
        self,
        count: int,
        rows: int,
        context: float,
        key: tuple[int, int],
        draft_keys: float = 0.0,
        silent: int = 0,
    ) -> float:
        """The same for one count, without the machine's slowdown."""
        count = min(count, len(self._base) - 1)
        base = max(float(self._base[count]) + self._per.ms(rows, context, draft_keys, silent), _LEAST_MS)
        learned = self._by_count.get(key[0])
        if learned is None:
            return base
        return base * float(learned.factor[count]) * math.exp(self._by_context.get(key, 0.0))

    def correct(self, count: int, key: tuple[int, int], error: float, gain: float, times: int = 1) -> None:
        """error: logarithm of measured over predicted time, the same in so many measurements."""
        error = min(max(error, -_CLIP), _CLIP)
        learned = self._by_count.get(key[0])
        if learned is None:
            learned = self._by_count[key[0]] = Factors(self._bucket, self._near)
        learned.change(min(count, len(self._bucket) - 1), error, gain, times)
        change = (1 - (1 - _CONTEXT_GAIN * gain) ** times) * error
        self._by_context[key] = min(max(self._by_context.get(key, 0.0) + change, -MOST), MOST)


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

    def step_ms(
        self, tokens: int, rows: int, context: int, greedy: bool = False, draft_keys: float = 0.0, silent: int = 0
    ) -> float:
        """A step with this many tokens (drafts and prompt chunks included) in this many rows.

        context: keys that the rows see without their drafts. draft_keys: those that the drafts see, each its row's.
        silent: tokens after which nothing is drawn.
        """
        key = _step_key(rows, context)
        return self._steps[greedy].time(tokens, rows, context, key, draft_keys, silent) * self.slowdown

    def step_curve(
        self,
        first: int,
        last: int,
        rows: int,
        context: int,
        greedy: bool = False,
        keys_per_draft: float = 0.0,
        silent: int = 0,
    ) -> Floats:
        """step_ms for first..last tokens -> [last - first + 1], the first without drafts."""
        key = _step_key(rows, context)
        times = self._steps[greedy].times(first, last, rows, context, key, self.slowdown, 0.0, keys_per_draft, silent)
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
            each, key = context / rows, _draft_key(rows, context)
            curve[1:] = self._drafts[greedy].times(1, rows, 1, each, key, self.slowdown, each)
        return curve

    def observe_step(
        self,
        tokens: int,
        rows: int,
        context: int,
        ms: float,
        greedy: bool = False,
        draft_keys: float = 0.0,
        silent: int = 0,
        times: int = 1,
    ) -> float:
        """A step took `ms`, drafting not included, or so many steps did, mostly. Returns what one was expected to take:
        step_ms until now."""
        key, curve = _step_key(rows, context), self._steps[greedy]
        usual_ms = curve.time(tokens, rows, context, key, draft_keys, silent)
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
                left = math.log(ms / curve.time(tokens, rows, context, key, draft_keys, silent))
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


@dataclass(frozen=True)
class _Slopes:
    """What a step takes beside its tokens, in milliseconds each."""

    row: float
    key: float
    draft_key: float
    silent: float  # that a token takes less if nothing is drawn after it

    @staticmethod
    def of(points: Sequence[Point]) -> _Slopes:
        plain = [p for p in points if not p.draft_keys]
        key = _slope(plain, "context", lambda p: p.ms, ("rows", "silent")) or 0.0
        # What a row has read is at hand for its drafts: on a CPU their keys cost a quarter to a third of its own.
        found = _slope(points, "draft_keys", lambda p: p.ms - key * p.context, ("rows", "silent"))
        draft_key = key if found is None else min(found, key)
        row = _slope(points, "rows", lambda p: p.ms - key * p.context - draft_key * p.draft_keys, ("silent",)) or 0.0
        rest = _Slopes(row, key, draft_key, 0.0)

        def less(p: Point) -> float:
            return rest.ms(p.rows, p.context, p.draft_keys, 0) - p.ms

        return replace(rest, silent=_slope(points, "silent", less) or 0.0)

    def ms(self, rows: int, context: float, draft_keys: float, silent: int) -> float:
        return self.row * rows + self.key * context + self.draft_key * draft_keys - self.silent * silent


def _quickest(points: Sequence[Point]) -> list[Point]:
    """Of points measured more than once the quickest: whatever disturbs a measurement makes it longer."""
    least: dict[Point, Point] = {}
    for p in sorted((p for p in points if p.usable), key=lambda p: p.ms):
        least.setdefault(replace(p, ms=0.0), p)
    return list(least.values())


def _shortest(points: Sequence[Point]) -> list[Point]:
    """Of points that differ in context only the one with the shortest."""
    least: dict[tuple[int, int, int], Point] = {}
    for p in sorted(points, key=lambda p: p.context):
        least.setdefault((p.count, p.rows, p.silent), p)
    return list(least.values())


def _slope(points: Sequence[Point], of: str, ms: Callable[[Point], float], equal: Sequence[str] = ()) -> float | None:
    """Time `ms` per one of what `of` names, 0 or more: the median over pairs of points that differ in it and are equal
    in count, and in all that `equal` names. None without such pairs."""
    slopes = [
        (ms(a) - ms(b)) / distance
        for a, b in combinations(points, 2)
        if (distance := getattr(a, of) - getattr(b, of))
        and all(getattr(a, name) == getattr(b, name) for name in ("count", *equal))
    ]
    return max(0.0, statistics.median(slopes)) if slopes else None


def _between(first: int, last: int, values: Floats) -> Floats:
    """values[first..last], the last of all going on beyond; not to be changed."""
    if last < len(values):
        return values[first : last + 1]
    return values[np.minimum(np.arange(first, last + 1), len(values) - 1)]


def _octave(value: int) -> int:
    return max(value, 0).bit_length()


def _bucket(count: int) -> int:
    return count if count <= _EXACT else _EXACT + math.ceil(_BUCKETS_PER_OCTAVE * math.log2(count / _EXACT))
