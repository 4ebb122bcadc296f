"""Numbers kept for every live request, in arrays, so that a batch of requests is read and written in one operation.

Must not know: what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_FIRST = 16  # lines to begin with
_BATCHES = 4  # whose lines are remembered


class PerRequest:
    """A line per request, in columns by name; zeros at first. Lines of finished requests are used again."""

    def __init__(self) -> None:
        self._line: dict[str, int] = {}
        self._free: list[int] = []
        self._columns: dict[str, Floats] = {}
        self._size = _FIRST
        self._asked: dict[tuple[str, ...], Ints] = {}  # the last batches, which mostly come again, and their lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._line)

    def __len__(self) -> int:
        return len(self._line)

    def lines(self, requests: tuple[str, ...]) -> Ints:
        """Where these requests are in every column [requests]; a request not seen before gets a line of zeros."""
        lines = self._asked.get(requests)
        if lines is None:
            places = map(self._line.get, requests, repeat(-1))
            lines = np.fromiter(places, dtype=np.int64, count=len(requests))
            for index in (lines < 0).nonzero()[0].tolist():
                lines[index] = self.line(requests[index])
            self.know(requests, lines)
        return lines

    def know(self, requests: tuple[str, ...], lines: Ints) -> None:
        """What `lines` has to say of these requests, until one is released."""
        if len(self._asked) >= _BATCHES:
            self._asked.clear()
        self._asked[requests] = lines

    def column(self, name: str) -> Floats:
        """One number per line [lines]; to be changed in place, and not to be kept: `lines` may replace it."""
        found = self._columns.get(name)
        if found is None:
            found = self._columns[name] = np.zeros(self._size)
        return found

    def release(self, request: str) -> None:
        """Forget a request; unknown ones are fine."""
        line = self._line.pop(request, None)
        if line is not None:
            self._asked.clear()
            self._free.append(line)
            for column in self._columns.values():
                column[line] = 0.0

    def line(self, request: str) -> int:
        """Where this request is in every column; one not seen before gets a line of zeros."""
        line = self._line.get(request)
        if line is None:
            line = self._free.pop() if self._free else len(self._line)
            self._line[request] = line
            if line >= self._size:
                self._size *= 2
                self._columns = {name: np.pad(column, (0, len(column))) for name, column in self._columns.items()}
        return line
