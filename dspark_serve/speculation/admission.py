"""Who drafts in a step, settled before anything is drafted: with a pass of a model, by looking up, or not at all.

Goes by what drafts of late were worth and by measured costs, so it is legal in every mode. Must not know: torch,
drafters, what becomes of this step's drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dspark_serve.speculation.budget import rows_worth_drafting
from dspark_serve.speculation.calibrate import DraftSignals
from dspark_serve.speculation.cost import CostModel
from dspark_serve.speculation.per_request import PerRequest
from dspark_serve.speculation.recent import Members, Recent
from dspark_serve.types import Plan, Row

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

LOOKUP = "ngram"  # the drafter that takes no pass of a model, beside one that does
# What drafts must promise over doing without. Of promises smaller than this, which come from the few places where the
# costs happen to be underestimated, as many were seen to be lost as kept; and a draft is work in places with no curve.
HURDLE = 0.05

_PROBE_SHARE = 0.005  # of the time: drafts for rows that would not earn them, to learn whether they would now
_PROBE_WEIGHT = 4  # a probe is rare, and is news
_HOLD = 8  # steps that a decision holds for while the rows are the same
_LOOKUP_MS = 0.02  # to look up and weigh one row's drafts, until it is measured
_LOOKUP_GAIN = 0.1  # of that estimate, per measurement


@dataclass(frozen=True)
class Load:
    """A plan without its drafts, as the cost model sees it."""

    tokens: int
    rows: int
    context: int
    greedy: bool  # all rows that sample
    keys_per_draft: float = 0.0  # that a draft sees, in the mean

    @staticmethod
    def of(plan: Plan, members: Members, context: int) -> Load:
        """members, context: of the rows that draft, which hold a token each."""
        rows, count = len(plan.rows), len(members.requests)
        if rows == count:
            return Load(rows, rows, context, members.greedy, context / max(count, 1))
        rest = [row for row in plan.rows if row.max_drafts <= 0]
        tokens, starts = sum([row.length for row in rest]), sum([row.start for row in rest])
        greedy = members.greedy and all([row.request.params.greedy for row in rest if row.samples])
        keys_per_draft = context / max(count, 1)
        return Load(count + tokens, rows, context + tokens + starts, greedy, keys_per_draft)

    def times(self, cost: CostModel, drafts: int) -> Floats:
        """What the step takes with 0, 1, ... drafts [drafts + 1], in milliseconds, as if every row held one token.

        A prompt has to be read whatever is drafted. Its time left in, and without the tokens that its row is about to
        give, every draft would seem to come for nothing, though it costs what it costs in any other step.
        """
        last = self.tokens + drafts
        times = cost.step_curve(self.tokens, last, self.rows, self.context, self.greedy, self.keys_per_draft)
        if self.rows < self.tokens:
            alone_ms = cost.step_ms(self.rows, self.rows, self.context, self.greedy)  # has been seen often
            times += min(alone_ms - float(times[0]), 0.0)
        return times


@dataclass
class Allowance:
    """A share of the time, saved up and spent on experiments."""

    share: float
    saved_ms: float = 0.0

    def earn(self, ms: float) -> None:
        self.saved_ms += self.share * ms

    def spend(self, cost_ms: float) -> bool:
        """True if the experiment can be paid; never saves up for more than two."""
        self.saved_ms = min(self.saved_ms, 2 * cost_ms)
        if self.saved_ms < cost_ms:
            return False
        self.saved_ms -= cost_ms
        return True


@dataclass(frozen=True)
class Admitted:
    """Which rows draft, [rows] each: with the drafter that takes a pass of a model; by looking up alone."""

    costly: Bools
    lookup: Bools
    probed: str | None = None  # the request that drafts only to see what comes of it

    @cached_property
    def drafting(self) -> int:
        """Rows that draft with the costly drafter."""
        return int(np.count_nonzero(self.costly))

    @cached_property
    def looking(self) -> int:
        """Rows that look up alone."""
        return int(np.count_nonzero(self.lookup))


class Admission:
    """Decides who drafts, and remembers what came of it.

    costly: the name of the drafter that takes a pass of a model. lookup: rows that do not earn it may look up.
    own: where what is known of each request is kept, beside what others keep.
    """

    def __init__(self, cost: CostModel, costly: str, lookup: bool, own: PerRequest | None = None) -> None:
        self._cost, self._costly, self._lookup = cost, costly, lookup
        own = PerRequest() if own is None else own
        self._drafted = Recent(own, "drafted")
        self._found = Recent(own, "found")  # the same of lookups, with those that found nothing
        self._probes, self._glances = Allowance(_PROBE_SHARE), Allowance(_PROBE_SHARE)
        self._lookup_ms = _LOOKUP_MS
        self._held: tuple[Members, Load, Admitted] | None = None
        self._until = 0  # the step at which what is held has to be decided anew

    def decide(self, rows: Sequence[Row], members: Members, load: Load, context: int, step: int) -> Admitted:
        """rows: those that may draft; members, context: theirs. load: the whole plan's. step: how many there have been.

        Rows of which too little is known draft.
        """
        if self._held is not None and step < self._until:
            of, then, admitted = self._held
            if of is members and then.rows == load.rows:
                return admitted
        limits = np.array([row.max_drafts for row in rows], dtype=np.int64)
        times = load.times(self._cost, int(limits.sum()))
        passes = self._cost.draft_curve(len(rows), context, load.greedy)
        kept, gain, unknown = self._drafted.expected(members, limits)
        costly = rows_worth_drafting(kept, gain, load.rows, passes, times, HURDLE)
        if unknown is not None:
            costly |= unknown
        lookup = np.zeros_like(costly)
        if self._lookup:
            lookup = ~costly & self._worth_looking(members, limits, load, times)
        self._held, self._until = (members, load, Admitted(costly, lookup)), step + _HOLD
        return self._experiment(rows, members, load, times, Admitted(costly, lookup))

    def _worth_looking(self, members: Members, limits: npt.NDArray[np.int64], load: Load, times: Floats) -> Bools:
        """Rows whose lookups earn something where nobody drafts otherwise, and those nothing is known of [rows]."""
        kept, gain, unknown = self._found.expected(members, limits)
        looks = self._lookup_ms * np.arange(len(limits) + 1.0)
        worth = rows_worth_drafting(kept, gain, load.rows, looks, times, HURDLE)
        return worth if unknown is None else worth | unknown

    def _experiment(
        self, rows: Sequence[Row], members: Members, load: Load, times: Floats, admitted: Admitted
    ) -> Admitted:
        """Lets the row that has not drafted for longest draft all the same, and rows look up, once that is saved up."""
        costly, lookup = admitted.costly, admitted.lookup
        if self._lookup and not (costly.any() or lookup.any()) and self._glances.spend(self._lookup_ms * len(rows)):
            lookup = ~costly
        if costly.all():
            return admitted
        index = int(np.where(costly, np.inf, self._drafted.last_steps(members.requests)).argmin())
        count, drafts = int(costly.sum()) + 1, rows[index].max_drafts
        passes = self._cost.draft_curve(count, (rows[index].start + 1) * count, load.greedy)
        probed = None
        if self._probes.spend(float(passes[-1] - passes[-2] + times[drafts] - times[0])):
            costly, lookup, probed = costly.copy(), lookup.copy(), members.requests[index]
            costly[index], lookup[index] = True, False
        return Admitted(costly, lookup, probed)

    def remember(
        self, signals: DraftSignals, survival: Floats, kept: npt.NDArray[np.int64], step: int, probed: bool
    ) -> None:
        """What the drafts of a step promised, survival [rows, width], and how many were kept of each row [rows]."""
        self._drafted.remember(signals, self._costly, survival, step, _PROBE_WEIGHT if probed else 1)
        if self._lookup:
            # What was found and not kept is worth nothing at this load. Another load is noticed soon enough: a glance
            # costs so little that there are many. Not so probes; so what the other drafter promises counts at any load.
            found = np.array([kind == LOOKUP for kind in signals.kinds])[:, None]
            used = np.arange(survival.shape[1]) < kept[:, None]
            self._remember_found(signals, survival * (found & used), step)

    def remember_nothing_found(self, signals: DraftSignals, width: int, step: int) -> None:
        """Rows that were to look up found nothing, none of them."""
        if self._lookup:
            self._remember_found(signals, np.zeros((len(signals.kinds), width)), step)

    def _remember_found(self, signals: DraftSignals, survival: Floats, step: int) -> None:
        rows, width = survival.shape
        whole = replace(signals, kinds=(LOOKUP,) * rows, n_draft=np.full(rows, width))
        self._found.remember(whole, LOOKUP, survival, step)

    def learn(self, spent_ms: float, looked_up: int, propose_ms: float, over_ms: float) -> None:
        """After a step expected to take `spent_ms`, in which so many rows did nothing but look up.

        over_ms: what a probe took beyond its price: a row that has not drafted for long has its context written first.
        """
        self._probes.earn(spent_ms)
        self._probes.saved_ms -= over_ms
        self._glances.earn(spent_ms)
        if looked_up:
            self._lookup_ms += _LOOKUP_GAIN * (propose_ms / looked_up - self._lookup_ms)

    def release(self, request_id: str) -> None:
        self._held = None
        self._drafted.release(request_id)
        self._found.release(request_id)
