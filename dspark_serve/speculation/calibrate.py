"""From a drafter's signals to probabilities that stay true: what is stored with a head, then what verification says.

Must not know: torch, drafters, budgets. Signals come as arrays [rows, width]; labels are kept drafts only, so somebody
must see to it that full blocks are verified now and then.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dspark_serve.speculation.per_request import PerRequest
from dspark_serve.types import VerifyMode

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_EDGE = 1e-4  # probabilities are kept this far from 0 and 1
_SLOW = 0.02  # smallest gain of a slot's offset, per label
_OWN_GAIN = 0.15  # of a request's own offset, per label: it has to follow the text
_OWN_DECAY = 0.98
_OWN_LIMIT, _LIMIT = 2.0, 4.0
_BINS = 10
_MANY = 1 << 30
_BIN_DECAY = 0.996
_COUNTED = 4  # one step in so many counts for the calibration error: it is for people to look at

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlotMap:
    """logit of acceptance = confidence * logit(confidence) + largest * logit(largest draft probability) + offset."""

    confidence: float = 1.0
    largest: float = 0.0
    offset: float = 0.0


def stored_maps(head_dir: Path) -> dict[str, tuple[SlotMap, ...]]:
    """Calibration in dspark.json beside a head, by mode ("greedy", "rejection", "coupled"); {} where there is none.

    What cannot be read costs a warning and is left out: a head works without.
    """
    path = head_dir / "dspark.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["calibration"]
        maps = {mode: tuple(SlotMap(**slot) for slot in fit["slots"]) for mode, fit in stored.items()}
        values = [v for slots in maps.values() for s in slots for v in (s.confidence, s.largest, s.offset)]
        if not np.isfinite(np.array(values, dtype=np.float64)).all():
            raise ValueError("it holds values that are not finite")
        return maps
    except (FileNotFoundError, KeyError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("the calibration in %s is ignored: %s", path, error)
        return {}


@dataclass(frozen=True)
class DraftSignals:
    """What is known of a step's drafts before they are verified; arrays are [rows, width]."""

    requests: tuple[str, ...]  # [rows]
    kinds: tuple[str, ...]  # [rows] who drafted
    ranges: npt.NDArray[np.int64]  # [rows] see temperature_range
    confidence: Floats | None  # probabilities as the drafter states them
    largest: Floats | None  # largest draft probability
    n_draft: npt.NDArray[np.int64]  # [rows]

    @cached_property
    def fewest(self) -> int:
        """Drafts of the row that has the fewest."""
        return int(self.n_draft.min(initial=_MANY))

    @cached_property
    def groups(self) -> Mapping[tuple[str, int], slice | Ints]:
        """Rows by drafter and temperature range; mostly there is one of each, and no row has to be picked."""
        rows = len(self.kinds)
        if rows and self.kinds.count(self.kinds[0]) == rows and (self.ranges == self.ranges[0]).all():
            return {(self.kinds[0], int(self.ranges[0])): slice(None)}
        found: dict[tuple[str, int], list[int]] = {}
        for row, key in enumerate(zip(self.kinds, self.ranges.tolist(), strict=True)):
            found.setdefault(key, []).append(row)
        return {key: np.array(index) for key, index in found.items()}


@dataclass(frozen=True)
class _Slots:
    """A stored map as arrays [width]; the last slot's goes on beyond."""

    confidence: Floats
    largest: Floats
    offset: Floats

    @staticmethod
    def of(slots: Sequence[SlotMap], width: int) -> _Slots:
        table = np.array([(s.confidence, s.largest, s.offset) for s in slots], dtype=np.float64)
        return _Slots(*table[np.minimum(np.arange(width), len(slots) - 1)].T.copy())

    @cached_property
    def uses_confidence(self) -> bool:
        return bool(self.confidence.any())

    @cached_property
    def uses_largest(self) -> bool:
        return bool(self.largest.any())


@dataclass
class _Offsets:
    """Learned for one drafter and temperature range: an offset per slot, and how many labels each has had."""

    offset: Floats
    labels: Floats


@dataclass
class Calibrator:
    """Probabilities of acceptance, given that the drafts before are accepted.

    Three layers of logits: what is stored with the head (or what the drafter states, or an even chance), a slow offset
    per drafter, temperature range and slot, and a quick one per request and drafter. Drafters named in `adaptive` state
    running rates of each request already, and get no quick one.
    """

    mode: VerifyMode
    width: int
    stored: Mapping[str, tuple[SlotMap, ...]] = field(default_factory=dict)
    head: str = ""  # the drafter that `stored` is for
    adaptive: frozenset[str] = frozenset()
    _offsets: dict[tuple[str, int], _Offsets] = field(default_factory=dict)
    own: PerRequest = field(default_factory=PerRequest)  # a column per drafter: offsets
    _maps: dict[tuple[str, int], _Slots | None] = field(default_factory=dict)  # (mode, width), made when asked for
    _learned: int = 0  # steps
    _bins: Floats = field(default_factory=lambda: np.zeros((2, _BINS)))
    error: float = field(
        default=0.0, init=False
    )  # expected calibration error of late: mean distance of stated probability and frequency

    def probabilities(self, signals: DraftSignals) -> Floats:
        """[rows, width]; 0 beyond a row's drafts."""
        rows, width = len(signals.kinds), self.width
        if signals.confidence is not None:
            width = signals.confidence.shape[1]
        elif signals.largest is not None:
            width = signals.largest.shape[1]
        said = np.empty((rows, width), order="F")
        for (kind, level), index in signals.groups.items():
            said[index] = self._logits(kind, level, signals, index, width)
        sigmoid(said, out=said)
        if signals.fewest < width:
            said[np.arange(width) >= signals.n_draft[:, None]] = 0.0
        return said

    def _logits(self, kind: str, level: int, signals: DraftSignals, index: slice | Ints, width: int) -> Floats:
        """[rows of the group, width], or what broadcasts to that."""
        slots = self._stored(level, width) if kind == self.head else None
        logits: Floats = np.zeros((1, width)) if signals.confidence is None else logit(signals.confidence[index])
        if slots is not None and (signals.confidence is not None or not slots.uses_confidence):
            logits *= slots.confidence
            logits += slots.offset
            if signals.largest is not None and slots.uses_largest:
                logits = logits + logit(signals.largest[index]) * slots.largest
        learned = self._offsets.get((kind, level))
        if learned is not None:
            logits += learned.offset[:width]
        if kind not in self.adaptive:
            lines = self.own.lines(signals.requests)[index]
            logits = logits + self.own.column(kind)[lines][:, None]
        return logits

    def _stored(self, level: int, width: int) -> _Slots | None:
        mode = "greedy" if level == 0 else self.mode
        if (mode, width) not in self._maps:
            slots = self.stored.get(mode)
            self._maps[mode, width] = _Slots.of(slots, width) if slots else None
        return self._maps[mode, width]

    def learn(
        self, signals: DraftSignals, said: Floats, n_kept: npt.NDArray[np.int64], n_accepted: npt.NDArray[np.int64]
    ) -> None:
        """Labels are the drafts up to the first rejected one, as far as they were kept: the rest was never judged."""
        slot = np.arange(said.shape[1])[:, None]
        judged = (slot < np.minimum(n_kept, n_accepted + 1)).T  # [rows, width], as it lies in memory: slot by slot
        came = (slot < n_accepted).T
        error = (came - said) * judged
        for (kind, level), index in signals.groups.items():
            self._learn_slots((kind, level), judged[index], error[index])
            if kind not in self.adaptive:
                lines, offset = self.own.lines(signals.requests)[index], self.own.column(kind)
                own = _OWN_DECAY * offset[lines] + _OWN_GAIN * error[index].sum(1)
                offset[lines] = _within(own, _OWN_LIMIT)
        self._learned += 1
        if self._learned % _COUNTED == 0:
            self._count(said, judged, error)

    def _learn_slots(self, key: tuple[str, int], judged: npt.NDArray[np.bool_], error: Floats) -> None:
        mine = self._offsets.get(key)
        if mine is None:
            width = max(self.width, error.shape[1])
            mine = self._offsets[key] = _Offsets(np.zeros(width), np.zeros(width))
        labels, offset = mine.labels[: error.shape[1]], mine.offset[: error.shape[1]]
        labels += judged.sum(0)
        # The first labels move an offset by much, later ones by little, and a large batch is still one step.
        offset += _within(np.maximum(_SLOW, 4.0 / (labels + 8.0)) * error.sum(0), 0.5)
        offset[:] = _within(offset, _LIMIT)

    def _count(self, said: Floats, judged: npt.NDArray[np.bool_], error: Floats) -> None:
        """error: what came minus what was said, 0 where nothing was judged."""
        bins = np.minimum((said * _BINS).astype(np.int64), _BINS - 1).ravel("F")
        self._bins *= _BIN_DECAY
        self._bins[0] += np.bincount(bins, error.ravel("F"), _BINS)
        self._bins[1] += np.bincount(bins, judged.ravel("F"), _BINS)
        total = float(self._bins[1].sum())
        if total:
            self.error = float(np.abs(self._bins[0]).sum()) / total

    def release(self, request_id: str) -> None:
        self.own.release(request_id)


def sigmoid(x: Floats, out: Floats | None = None) -> Floats:
    out = np.negative(x, out=out)
    np.exp(out, out=out)
    out += 1
    return np.reciprocal(out, out=out)


def logit(probability: Floats) -> Floats:
    clipped = np.minimum(np.maximum(probability, _EDGE), 1 - _EDGE)
    result: Floats = np.log(clipped / (1 - clipped))
    return result


def _within(values: Floats, limit: float) -> Floats:
    """As clip, which takes several times as long for a few numbers."""
    return np.minimum(np.maximum(values, -limit), limit)
