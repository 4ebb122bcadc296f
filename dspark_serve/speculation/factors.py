"""Corrections of a measured curve, learned bucket by bucket of counts.

Must not know: what is counted, what the curve is of.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MOST = math.log(8.0)  # of a correction
# The first measurements of a bucket count for more, the n-th for 1 / (n + this), but not for much: what looks cheapest
# is chosen, so every count that is underestimated by chance is found.
_FIRST = 20.0
_SHARED = 8  # changes of buckets after which those near them follow
_MOST_SEEN = 200.0  # measurements of a bucket that count for that


class Factors:
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
        moved = min(max(float(self._value[bucket]) + change, -MOST), MOST)
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


def nearness(buckets: Ints) -> Floats:
    """How much each bucket says of each other [buckets, buckets]: a quarter of it where counts differ by twice."""
    first = np.log2(np.maximum(buckets.searchsorted(np.arange(buckets[-1] + 1)), 1))
    near: Floats = 0.25 ** np.abs(first[:, None] - first)
    np.fill_diagonal(near, 0.0)
    return near
