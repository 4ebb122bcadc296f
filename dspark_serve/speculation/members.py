"""What does not change about the requests of a batch: made once, and remembered while batches come again.

Must not know: torch, more of a request than its id and temperature, what the facts are for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from dspark_serve.speculation.per_request import PerRequest
from dspark_serve.types import TEMPERATURE_RANGES, Request, Row, temperature_range

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_RANGES = len(TEMPERATURE_RANGES) + 1
_request: Callable[[Row], Request] = itemgetter(Row._fields.index("request"))
_BATCHES = 4  # that are remembered: the same few come again and again


@dataclass(frozen=True)
class Members:
    """What does not change about the requests of a batch."""

    batch: tuple[Request, ...]  # [rows]
    requests: tuple[str, ...]  # [rows] their ids
    ranges: Ints  # [rows] see temperature_range
    by_range: Mapping[int, slice | Ints]  # rows of each; mostly all are of one
    greedy: bool  # all of them

    @staticmethod
    def of(requests: tuple[Request, ...], ranges: Ints | None = None) -> Members:
        """ranges: those of the requests, where they are known."""
        if ranges is None:
            ranges = np.array([temperature_range(request.params.temperature) for request in requests], dtype=np.int64)
        return Members._of(requests, tuple([request.request_id for request in requests]), ranges)

    @staticmethod
    def _of(requests: tuple[Request, ...], ids: tuple[str, ...], ranges: Ints) -> Members:
        if len(ids) and (ranges == ranges[0]).all():
            level = int(ranges[0])
            return Members(requests, ids, ranges, {level: slice(None)}, level == 0)
        rows = {level: np.flatnonzero(ranges == level) for level in sorted(set(ranges.tolist()))}
        return Members(requests, ids, ranges, rows, not ids)

    def some(self, chosen: Bools) -> Members:
        """Those for which this says so [rows]."""
        which, ranges = chosen.tolist(), self.ranges[chosen]
        requests, ids = tuple(compress(self.batch, which)), tuple(compress(self.requests, which))
        if ids and len(self.by_range) == 1:  # so of these all are of one, too
            return Members(requests, ids, ranges, self.by_range, self.greedy)
        return Members._of(requests, ids, ranges)


class Batches:
    """The last few batches.

    own: where what is known of each request is kept; it is told where those of a batch are.
    """

    def __init__(self, own: PerRequest) -> None:
        self._own = own
        self._members: dict[tuple[Request, ...], Members] = {}  # the least recently used first
        # Of every live request in one number, its line there and its temperature range: where somebody comes or goes
        # in every step, it is the others whose facts take the time.
        self._facts: dict[Request, int] = {}
        self._live: dict[str, Request] = {}
        self._part: tuple[Members, Bools, Members] | None = None  # the last: of which batch, who of it, they

    def of(self, rows: Sequence[Row]) -> Members:
        return self._of(tuple(map(_request, rows)))

    def _of(self, requests: tuple[Request, ...]) -> Members:
        members = self._members.pop(requests, None)
        if members is None:
            lines, ranges = self._facts_of(requests)
            members = Members.of(requests, ranges)
            self._own.know(members.requests, lines)
            if len(self._members) >= _BATCHES:
                del self._members[next(iter(self._members))]
        self._members[requests] = members
        return members

    def _facts_of(self, requests: tuple[Request, ...]) -> tuple[Ints, Ints]:
        """Lines and temperature ranges [requests]."""
        facts = np.fromiter(map(self._facts.get, requests, repeat(-1)), dtype=np.int64, count=len(requests))
        for index in (facts < 0).nonzero()[0].tolist():
            request = requests[index]
            line, level = self._own.line(request.request_id), temperature_range(request.params.temperature)
            facts[index] = self._facts[request] = line * _RANGES + level
            before = self._live.get(request.request_id)
            if before is not None:  # nobody was told that it is gone
                del self._facts[before]
            self._live[request.request_id] = request
        return facts // _RANGES, facts % _RANGES

    def part(self, rows: Sequence[Row], members: Members, chosen: Bools) -> Members:
        """The same; but these rows are mostly those that were chosen of a batch, whose facts are there already."""
        requests = tuple(map(_request, rows))
        if self._part is None or self._part[0] is not members or self._part[1] is not chosen:
            some = members.some(chosen)
            self._own.know(some.requests, self._own.lines(members.requests)[chosen])
            self._part = members, chosen, some
        some = self._part[2]
        return some if some.batch == requests else self._of(requests)

    def release(self, request_id: str) -> None:
        """The request is gone; unknown ids are fine."""
        request = self._live.pop(request_id, None)
        if request is not None:
            del self._facts[request]
        self._members.clear()
        self._part = None
