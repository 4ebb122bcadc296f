"""Drafts that take no pass of a model: what texts copy from themselves, and how much of it deserves verification.

Known before anything is drafted and from committed tokens alone, so legal in every mode. Plain Python: it is asked in
every step, mostly about nothing. Must not know: torch, how copies are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dspark_serve.types import Row

Floats = npt.NDArray[np.float64]
Promised = Sequence[tuple[int, Sequence[float]]]

MOST = 256  # drafts of a step
_SEVERAL = 16  # drafts that copies of one row may have, and those of a batch hardly more: few rows copy at a time
_MARGIN = 0.1  # of what drafts add to a step: costs are known to a few percent


class Lookups(Protocol):
    def promised(self, rows: Sequence[Row], least: float) -> Promised:
        """The rows, by index, whose copy goes on with at least this chance, with the chances that its first 1, 2, ...
        tokens are all right: as many as have that chance, and as the row may draft."""
        ...

    def quiet(self, rows: Sequence[Row]) -> int:
        """For how many steps after one for which nothing of these rows was promised that is sure to stay so, if each
        goes on by a token per step; 0 if that is not known."""
        ...


@dataclass(frozen=True)
class Prices:
    """What steps with such drafts take, and so what the drafts must promise."""

    base: int  # tokens that come out without drafts
    times: Sequence[float]  # with 0, 1, ... drafts, and whatever else they must be worth
    # A draft must have at least this chance of being right: they all have in the mean, if they pay, and where as many
    # as come cheapest are verified the last one has.
    least: float

    @staticmethod
    def of(base: int, step_ms: Floats, over_ms: float) -> Prices:
        """step_ms [n]: with 0, 1, ... drafts. over_ms: what any must save besides the time that they take."""
        times = step_ms[0] + (1 + _MARGIN) * (step_ms - step_ms[0]) + over_ms
        times[0] = step_ms[0]
        # What the chances of so many drafts have to be in the mean for them to be worth their time.
        count = min(len(times), 1 + max(base, _SEVERAL))
        each = (times[1:count] / times[0] - 1) * base / np.arange(1, count)
        return Prices(base, times.tolist(), float(each.min(initial=1.0)))

    def worth(self, promised: Promised) -> list[tuple[int, int]]:
        """The rows, by index, and how many drafts of each make expected tokens per second highest.

        Ties go by slot, then by row. None of them where that is no more than without."""
        drafts = sorted((-chance, slot, row) for row, chances in promised for slot, chance in enumerate(chances, 1))
        expected, rate, best = float(self.base), self.base / self.times[0], 0
        for count, (less, _, _) in enumerate(drafts[: len(self.times) - 1], 1):
            expected -= less
            if expected / self.times[count] > rate:
                rate, best = expected / self.times[count], count
        kept: dict[int, int] = {}
        for _, slot, row in drafts[:best]:
            kept[row] = slot  # chances fall along a row: its last is its highest slot
        return sorted(kept.items())
