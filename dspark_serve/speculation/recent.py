"""What blocks of drafts promised of late, from which the worth of the next is judged before it is made.

Must not know: torch, more of a request than its id and temperature, what drafting and verifying cost.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dspark_serve.speculation.budget import LEVELS, Drafted
from dspark_serve.speculation.calibrate import DraftSignals
from dspark_serve.speculation.members import Members
from dspark_serve.speculation.per_request import PerRequest

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SAMPLES = 64  # rows whose survival is remembered per temperature range
_ENOUGH = 24  # of them before they decide anything: what is given up too soon is probed again only now and then
_OWN_GAIN = 0.2  # of the estimate of a request's own survival, per draft
_OTHERS = 4.0  # drafts of a request's own at which they count as much as those of all
_MOST = 10.0  # times the usual survival


class Recent:
    """Survival of the last blocks per temperature range, and of each request's own against that."""

    def __init__(self, own: PerRequest | None = None, name: str = "") -> None:
        self._samples: dict[int, _Last] = {}  # by temperature range
        self._summaries: dict[int, Drafted] = {}  # the same as the decision needs it, made when it is needed
        self.width = 1  # drafts of the largest block so far
        # Survival of a block in the mean, summed over it; how many; when the last one was made.
        self._own = PerRequest() if own is None else own
        self._survival, self._blocks, self._step = f"{name} survival", f"{name} blocks", f"{name} step"  # columns

    def expected(self, members: Members, limits: Ints) -> tuple[Floats, Floats, npt.NDArray[np.bool_] | None]:
        """Drafts that rows would keep and have accepted, [rows, levels] each; which rows too little is known of [rows],
        None if of none. limits [rows]: drafts that a row may have.
        """
        unknown = np.zeros(len(limits), dtype=np.bool_)
        kept, gain = np.zeros((2, len(LEVELS), len(limits)))
        for level, rows in members.by_range.items():
            summary = self._summary(level)
            if summary is None:
                unknown[rows] = True
            else:
                scale = self._scale(members.requests, max(float(summary.sums[0]), 1e-6))
                mine = summary.at(LEVELS, scale[rows], limits[rows])
                if len(members.by_range) == 1:
                    return *mine, None
                kept[:, rows], gain[:, rows] = mine[0].T, mine[1].T
        return kept.T, gain.T, unknown

    def whole(self, members: Members, limits: Ints) -> Floats:
        """Drafts that rows would have accepted if all of them were kept [rows]; infinite where too little is known."""
        gain = np.full(len(limits), np.inf)
        for level, rows in members.by_range.items():
            summary = self._summary(level)
            if summary is not None:
                usual = float(summary.sums[0])
                scale = self._scale(members.requests, max(usual, 1e-6))[rows]
                gain[rows] = np.minimum(summary.usual(limits[rows]) * scale, limits[rows])
        return gain

    def _summary(self, level: int) -> Drafted | None:
        samples = self._samples.get(level)
        if samples is None or samples.count < _ENOUGH:
            return None
        if level not in self._summaries:
            self._summaries[level] = Drafted.of(samples.blocks[: samples.count])
        return self._summaries[level]

    def _scale(self, requests: tuple[str, ...], usual: float) -> Floats:
        """Each request's survival in times of the usual; the less it has drafted, the nearer to 1."""
        lines = self._own.lines(requests)
        blocks = self._own.column(self._blocks)[lines]
        scale: Floats = (blocks * self._own.column(self._survival)[lines] / usual + _OTHERS) / (blocks + _OTHERS)
        return np.minimum(scale, _MOST, out=scale)

    def last_steps(self, requests: tuple[str, ...]) -> Floats:
        """When each of these drafted last [requests]; 0: never."""
        lines = self._own.lines(requests)
        return self._own.column(self._step)[lines]

    def remember(self, signals: DraftSignals, drafter: str, survival: Floats, step: int, weight: int = 1) -> None:
        """Blocks that this drafter has made in a step; survival [rows, width]. Each counts `weight` times."""
        for (kind, level), rows in signals.groups.items():
            if kind == drafter:
                n_draft, blocks = signals.n_draft[rows], survival[rows]
                lines = self._own.lines(signals.requests)[rows]
                self.width = max(self.width, int(n_draft.max(initial=0)))
                if signals.fewest == blocks.shape[1]:  # as nearly always
                    self._remember_all(level, blocks, weight)
                    self._remember_each(lines, blocks.sum(1), step)
                    continue
                drafted = n_draft > 0
                lines, n_draft, blocks = lines[drafted], n_draft[drafted], blocks[drafted]
                if len(n_draft):
                    # Beside another drafter's the arrays may be wider than any block of this one.
                    self._remember_all(level, blocks[n_draft == self.width, : self.width], weight)
                    self._remember_each(lines, _as_whole(blocks, n_draft), step)

    def _remember_all(self, level: int, blocks: Floats, weight: int) -> None:
        """Of whole blocks only: how the others would have gone on is not known."""
        if weight > 1:
            blocks = blocks.repeat(weight, axis=0)
        samples = self._samples.get(level)
        if samples is None:
            samples = self._samples[level] = _Last(blocks.shape[1])
        self._summaries.pop(level, None)
        samples.add(blocks)

    def _remember_each(self, lines: Ints, whole: Floats, step: int) -> None:
        """whole [lines]: survival of each one's block, summed over it."""
        survival, blocks = self._own.column(self._survival), self._own.column(self._blocks)
        own, count = survival[lines], blocks[lines] + 1
        survival[lines] = own + np.maximum(_OWN_GAIN, 1 / count) * (whole - own)
        blocks[lines] = count
        self._own.column(self._step)[lines] = step

    def release(self, request_id: str) -> None:
        self._own.release(request_id)


class _Last:
    """The last blocks of many, in no order."""

    def __init__(self, width: int) -> None:
        self.blocks: Floats = np.zeros((_SAMPLES, width))
        self.count = 0  # the first so many are there
        self._next = 0  # place that the next one takes

    def add(self, blocks: Floats) -> None:
        """blocks [n, width]: each in the place of the oldest."""
        if blocks.shape[1] > self.blocks.shape[1]:
            self.blocks = _widen(self.blocks, blocks.shape[1])
        blocks = blocks[-_SAMPLES:]
        first, width = min(len(blocks), _SAMPLES - self._next), blocks.shape[1]
        for place, part in ((self._next, blocks[:first]), (0, blocks[first:])):
            if len(part):
                self.blocks[place : place + len(part), :width] = part
                self.blocks[place : place + len(part), width:] = 0.0
        self._next = (self._next + len(blocks)) % _SAMPLES
        self.count = min(self.count + len(blocks), _SAMPLES)


def _as_whole(blocks: Floats, n_draft: Ints) -> Floats:
    """Survival summed over each block: a request that may draft little is judged as if it had drafted whole blocks, as
    all others are."""
    usual = (blocks.sum(0) / len(blocks)).cumsum()
    share = usual / max(float(usual[-1]), 1e-6)
    whole: Floats = blocks.sum(1) / np.maximum(share[n_draft - 1], 1e-3)
    return whole


def _widen(samples: Floats, width: int) -> Floats:
    return np.pad(samples, ((0, 0), (0, width - samples.shape[1]))) if samples.shape[1] < width else samples
