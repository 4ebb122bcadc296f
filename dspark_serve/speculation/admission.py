"""Who drafts with a pass of a model in a step, settled before anything is drafted.

Goes by what drafts of late were worth and by measured costs, so it is legal in every mode. Must not know: torch,
drafters, what becomes of this step's drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from dspark_serve.speculation.budget import rows_worth_drafting
from dspark_serve.speculation.calibrate import DraftSignals
from dspark_serve.speculation.cost import CostModel
from dspark_serve.speculation.members import Members
from dspark_serve.speculation.per_request import PerRequest
from dspark_serve.speculation.recent import Recent
from dspark_serve.types import Plan, Row

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# What drafts must promise over doing without: costs are known to a few percent, and a draft is work in places that have
# no curve.
HURDLE = 0.02

_PROBE_SHARE = 0.003  # of the time: drafts for rows that would not earn them, to learn whether they would now
_LEAST_PRICE = 0.1  # of a probe, in times of what it takes: what it is expected to save is only expected
_AT_BEST = 0.9  # chance of a draft, those before it accepted, that drafting may be found to have at most
_PROBE_WEIGHT = 4  # a probe is rare, and is news
HOLD = 64  # steps that a decision holds for while the rows are the same, if nobody is to draft;
_HOLD_ONE, _HOLD_SEVERAL = 32, 16  # if one row is, or several: their blocks soon say whether that was right.
_BLOCKS = 64  # so many do; with many rows that begin to draft, after a few steps
ALIKE = 4  # it holds, too, while no more than one row in so many came or went
_LESSON_GAIN = 0.05
_ODD_MS = 5.0


_start: Callable[[Row], int] = itemgetter(Row._fields.index("start"))


def context_of(rows: Sequence[Row]) -> int:
    """Keys that rows of one token see together, that token's own included."""
    return sum(map(_start, rows)) + len(rows)


def all_greedy(rows: Sequence[Row]) -> bool:
    return all([row.request.params.greedy for row in rows])


@dataclass(frozen=True)
class Load:
    """A plan without its drafts, as the cost model sees it."""

    tokens: int
    rows: int
    context: int
    greedy: bool  # all rows that sample
    keys_per_draft: float = 0.0  # that a draft sees, in the mean
    silent: int = 0  # tokens after which nothing is drawn: of prompts, all but the last

    @staticmethod
    def of(plan: Plan, greedy: bool, context: int) -> Load:
        """greedy, context: of the rows that draft, which hold a token each."""
        rows, count = len(plan.rows), len(plan.drafting)
        if rows == count:
            return Load(rows, rows, context, greedy, context / max(count, 1))
        rest = [row for row in plan.rows if row.max_drafts <= 0]
        tokens, starts = sum([row.length for row in rest]), sum([row.start for row in rest])
        greedy = greedy and all_greedy([row for row in rest if row.samples])
        silent = tokens - sum([row.samples for row in rest])
        return Load(count + tokens, rows, context + tokens + starts, greedy, context / max(count, 1), silent)

    @property
    def decoding(self) -> Load:
        """The same once all have read their prompts."""
        return replace(self, tokens=self.rows, silent=0)

    def like(self, other: Load) -> bool:
        """Whether they differ in no more than how far the rows have come."""
        return (self.rows, self.greedy) == (other.rows, other.greedy)

    def step_ms(self, cost: CostModel, drafts: int = 0) -> float:
        """What the step takes with so many drafts."""
        keys = drafts * self.keys_per_draft
        return cost.step_ms(self.tokens + drafts, self.rows, self.context, self.greedy, keys, self.silent)

    def plain_ms(self, cost: CostModel) -> float:
        """The first of `times`."""
        plain_ms = self.step_ms(cost)
        if self.rows < self.tokens:
            plain_ms = min(plain_ms, cost.step_ms(self.rows, self.rows, self.context, self.greedy))
        return plain_ms

    def times(self, cost: CostModel, drafts: int) -> Floats:
        """What the step takes with 0, 1, ... drafts [drafts + 1], in milliseconds, as if every row held one token.

        A prompt has to be read whatever is drafted. Its time left in, and without the tokens that its row is about to
        give, every draft would seem to come for nothing, though it costs what it costs in any other step.
        """
        last = self.tokens + drafts
        each = self.keys_per_draft
        times = cost.step_curve(self.tokens, last, self.rows, self.context, self.greedy, each, self.silent)
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


@dataclass
class Lesson:
    """How much longer it takes to learn from a step with drafts than from one without."""

    with_ms: float = 0.0
    without_ms: float = 0.0

    def add(self, drafted: bool, ms: float) -> None:
        if not 0 < ms < _ODD_MS:  # none yet, or the process was stopped meanwhile
            return
        if drafted:
            self.with_ms += _LESSON_GAIN * (ms - self.with_ms)
        else:
            self.without_ms += _LESSON_GAIN * (ms - self.without_ms)

    @property
    def ms(self) -> float:
        return max(self.with_ms - self.without_ms, 0.0)


@dataclass(frozen=True)
class Admitted:
    """Which rows draft with the drafter that takes a pass of a model [rows]."""

    costly: Bools
    probed: str | None = None  # the request that drafts only to see what comes of it

    @cached_property
    def drafting(self) -> int:
        """How many they are."""
        return int(np.count_nonzero(self.costly))

    def rows(self, plan: Plan) -> tuple[Row, ...]:
        """The plan's rows, of which no others draft."""
        not_now = (~self.costly).nonzero()[0].tolist()
        if len(self.costly) < len(plan.rows):
            places = [place for place, row in enumerate(plan.rows) if row.max_drafts > 0]
            not_now = [places[index] for index in not_now]
        rows = list(plan.rows)
        for place in not_now:
            rows[place] = plan.bare[place]
        return tuple(rows)


_DECISION = "decision"  # column: one of these, or 0 for a request about which there is none
_NO, _YES = 1, 2


class _Held:
    """A decision, for some steps: in a column of what is known of each request."""

    def __init__(self, own: PerRequest, members: Members, rows: int, admitted: Admitted, step: int, hold: int) -> None:
        """rows: of the plan. hold: after so many steps, beginning with `step`, it has to be made anew."""
        self.until, self.hold = step + hold, hold
        self._own, self._rows, self._count = own, rows, len(members.requests)
        self._last = members, rows, admitted
        lines = own.lines(members.requests)
        column = own.column(_DECISION)
        column[:] = 0
        column[lines] = np.where(admitted.costly, _YES, _NO)
        self._usual = _YES if admitted.drafting > self._count / 2 else _NO

    def still(self, members: Members, rows: int, step: int) -> Admitted | None:
        """The decision as it goes for these rows; None if it has to be made anew.

        A decision reads a dozen cold arrays, which takes as long as a percent of a step, and with many rows one ends
        every few steps. Rows that are new since then are treated as most of the others.
        """
        if step >= self.until:
            return None
        if members is not self._last[0] or rows != self._last[1]:
            lines = self._own.lines(members.requests)
            decided = self._own.column(_DECISION)[lines]
            known = int(np.count_nonzero(decided))
            if max(self._count - known, len(decided) - known, abs(rows - self._rows)) * ALIKE > self._count:
                return None
            decided[decided == 0] = self._usual
            self._last = members, rows, Admitted(decided == _YES)
        return self._last[2]


def _may_pay(gain: Floats, load: Load, plain_ms: float, least_ms: float) -> bool:
    """Whether any rows might earn a draft, where whole blocks have `gain` [rows] drafts accepted: if those of all came
    for nothing but the least time that drafting takes. Mostly they could not even then, and a dozen cold arrays need
    not be read to see it."""
    return float(gain.sum()) * plain_ms > ((1 + HURDLE) * (plain_ms + least_ms) - plain_ms) * load.rows


class Admission:
    """Decides who drafts, and remembers what came of it.

    costly: the name of the drafter that takes a pass of a model. own: where what is known of each request is kept,
    beside what others keep.
    """

    def __init__(self, cost: CostModel, costly: str, own: PerRequest | None = None) -> None:
        self._cost, self._costly = cost, costly
        self._own = own = PerRequest() if own is None else own
        self._drafted = Recent(own, "drafted")
        self._probes = Allowance(_PROBE_SHARE)
        self.lesson = Lesson()
        self._held: _Held | None = None
        self._best: tuple[tuple[object, ...], int, bool] | None = None  # see _pays_at_best: of what, until when

    def decide(self, rows: Sequence[Row], members: Members, load: Load, context: int, step: int) -> Admitted:
        """rows: those that may draft; members, context: theirs. load: the whole plan's. step: how many there have been.

        Rows of which too little is known draft, if that could pay at all.
        """
        held = None if self._held is None else self._held.still(members, load.rows, step)
        if held is not None:
            return held
        limits, plain_ms = np.array([row.max_drafts for row in rows], dtype=np.int64), load.plain_ms(self._cost)
        least_ms = self._cost.draft_ms(1, context // len(rows), load.greedy)
        pays = self._pays_at_best(load.decoding, len(rows), max(int(limits.sum()) // len(rows), 1), context, step)
        gain = self._drafted.whole(members, limits)
        if not pays:
            gain[np.isinf(gain)] = 0.0
        if _may_pay(gain, load, plain_ms, least_ms):
            admitted = Admitted(self._worth(members, limits, load, context, pays))
        else:
            admitted = Admitted(np.zeros(len(rows), dtype=np.bool_))
        hold = self._hold(admitted.drafting)
        self._held = _Held(self._own, members, load.rows, admitted, step, hold)
        return self._experiment(rows, members, load, plain_ms, gain, admitted) if pays else admitted

    def _hold(self, drafting: int) -> int:
        """How long a decision holds that lets so many rows draft."""
        if drafting < 2:
            return _HOLD_ONE if drafting else HOLD
        held = self._held
        if held is not None and held.hold <= _HOLD_SEVERAL:  # several did before: it was right
            return min(2 * held.hold, _HOLD_SEVERAL)
        return min(max(_BLOCKS // drafting, 2), _HOLD_SEVERAL)

    def _worth(self, members: Members, limits: npt.NDArray[np.int64], load: Load, context: int, all_new: bool) -> Bools:
        """Rows whose drafts earn something where nobody drafts otherwise [rows], with those too little is known of if
        `all_new`."""
        draft_ms = self._cost.draft_curve(len(limits), context, load.greedy)
        draft_ms[1:] += self.lesson.ms
        kept, gain, unknown = self._drafted.expected(members, limits)
        times = load.times(self._cost, int(limits.sum()))
        worth = rows_worth_drafting(kept, gain, load.rows, draft_ms, times, HURDLE)
        return worth | unknown if all_new and unknown is not None else worth

    def _pays_at_best(self, load: Load, rows: int, most: int, context: int, step: int) -> bool:
        """Whether it would pay if so many rows, with so much context together, shared a pass, nine in ten drafts were
        right, and of each row as many were verified as is best, up to `most`, which fit in a step. Goes for some steps
        with such a load: of rows that decode, as a prompt beside them is soon read."""
        key = rows, most, load.rows, load.greedy
        if self._best is None or self._best[0] != key or step >= self._best[1]:
            drafts = np.arange(1, most + 1)
            expected = load.rows + rows * (_AT_BEST**drafts).cumsum()
            times = load.times(self._cost, rows * most)
            draft_ms = self._cost.draft_ms(rows, context, load.greedy) + self.lesson.ms
            rate = float((expected / (times[rows * drafts] + draft_ms)).max())
            self._best = key, step + HOLD, rate * float(times[0]) > (1 + HURDLE) * load.rows
        return self._best[2]

    @property
    def could_pay(self) -> bool:
        """Whether drafting would have, by the last decision, had nine in ten drafts been right."""
        return self._best is None or self._best[2]

    def _experiment(
        self, rows: Sequence[Row], members: Members, load: Load, plain_ms: float, gain: Floats, admitted: Admitted
    ) -> Admitted:
        """Lets the row that has not drafted for longest draft all the same, once that is saved up.

        A probe costs the time of its drafts less what they will save, going by `gain` [rows], drafts accepted of whole
        blocks: where drafting nearly pays it costs next to nothing, and there it is most needed. Where it would not at
        best, nothing is there to be learned.
        """
        costly = admitted.costly
        if costly.all():
            return admitted
        whole = np.array([self._may_draft_whole(row) for row in rows])
        last_steps = np.where(whole & ~costly, self._drafted.last_steps(members.requests), np.inf)
        index = int(last_steps.argmin())
        if last_steps[index] == np.inf:
            return admitted
        count, drafts = int(costly.sum()) + 1, min(rows[index].max_drafts, self._drafted.width)
        context = rows[index].start + 1
        spent_ms = (
            self._verify_ms(load, drafts)
            + self._pass_ms(load, count, context)
            - self._pass_ms(load, count - 1, context)
        )
        saved_ms = float(gain[index]) * plain_ms / load.rows
        if not self._probes.spend(max(spent_ms - saved_ms, _LEAST_PRICE * spent_ms)):
            return admitted
        costly = costly.copy()
        costly[index] = True
        return Admitted(costly, members.requests[index])

    def _verify_ms(self, load: Load, drafts: int) -> float:
        """What verifying so many drafts adds to a step."""
        return max(load.step_ms(self._cost, drafts) - load.step_ms(self._cost), 0.0)

    def _pass_ms(self, load: Load, rows: int, context: int) -> float:
        """A pass for so many rows with so much context each."""
        return self._cost.draft_ms(rows, context * rows, load.greedy)

    def _may_draft_whole(self, row: Row) -> bool:
        """Not so just before a request's end: such probes are cheap, and would take the place of all that say more."""
        limit, width = row.request.speculation.max_draft_tokens, self._drafted.width
        return row.max_drafts >= (width if limit is None else min(width, limit))

    def remember(self, signals: DraftSignals, survival: Floats, step: int, probed: bool) -> None:
        """What the drafts of a step promised, survival [rows, width]."""
        self._drafted.remember(signals, self._costly, survival, step, _PROBE_WEIGHT if probed else 1)

    def learn(self, spent_ms: float, over_ms: float = 0.0) -> None:
        """After steps expected to take `spent_ms`.

        over_ms: what a probe took beyond its price: a row that has not drafted for long has its context written first.
        """
        self._probes.earn(spent_ms)
        self._probes.saved_ms -= over_ms

    def release(self, request_id: str) -> None:
        self._drafted.release(request_id)
