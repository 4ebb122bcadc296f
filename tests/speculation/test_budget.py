"""The budget's arithmetic against brute force: optimal for its curve, prefixes, ties, load, causality, host time."""

from __future__ import annotations

import itertools
import time
import timeit

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serve.speculation.budget import (
    LEVELS,
    Drafted,
    best_of_curve,
    convex_hull,
    early_stop,
    lift_slow_rows,
    rows_worth_drafting,
)

Floats = npt.NDArray[np.float64]

# Few values, so that ties are frequent; 0 is where a row has no draft.
CONFIDENCE = st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.9, 1.0])


@st.composite
def problems(draw: st.DrawFn, most_rows: int = 3, most_width: int = 3) -> tuple[Floats, float, Floats]:
    """Survival, draft time, and a step time for every number of drafts, in any shape: cliffs, dips, plateaus."""
    rows, width = draw(st.integers(1, most_rows)), draw(st.integers(1, most_width))
    confidence = draw(st.lists(CONFIDENCE, min_size=rows * width, max_size=rows * width))
    survival = np.array(confidence).reshape(rows, width).cumprod(1)
    times = draw(st.lists(st.sampled_from([1.0, 1.0, 1.5, 2.0, 4.0]), min_size=rows * width + 1, max_size=30))
    shape = draw(st.sampled_from(["any", "rising", "convex"]))
    step_ms = np.array(times) if shape == "any" else np.sort(times).cumsum() / (1 if shape == "convex" else 5)
    if shape == "rising":
        step_ms = np.maximum.accumulate(np.array(times)) + 0.01 * np.arange(len(times))
    return survival, draw(st.sampled_from([0.0, 0.3, 2.0])), step_ms


def rate(survival: Floats, kept: tuple[int, ...], draft_ms: float, step_ms: Floats) -> float:
    expected = len(survival) + sum(survival[row, :count].sum() for row, count in enumerate(kept))
    return float(expected / (draft_ms + step_ms[sum(kept)]))


def every_choice(survival: Floats) -> list[tuple[int, ...]]:
    counts = [range(int(np.count_nonzero(row)) + 1) for row in survival]
    return list(itertools.product(*counts))


@given(problems())
@settings(max_examples=300, deadline=None)
def test_best_of_curve_is_optimal(problem: tuple[Floats, float, Floats]) -> None:
    survival, draft_ms, step_ms = problem
    kept = tuple(best_of_curve(survival, len(survival), draft_ms, step_ms).tolist())
    best = max(rate(survival, choice, draft_ms, step_ms) for choice in every_choice(survival))
    assert kept in every_choice(survival)  # a prefix of what each row has
    assert rate(survival, kept, draft_ms, step_ms) == pytest.approx(best, rel=1e-12)


@given(problems(), st.sampled_from([0.01, 0.1]))
@settings(max_examples=200, deadline=None)
def test_trimming_needs_a_gain_above_the_margin(problem: tuple[Floats, float, Floats], margin: float) -> None:
    survival, draft_ms, step_ms = problem
    everything = tuple(np.count_nonzero(survival, axis=1).tolist())
    kept = tuple(best_of_curve(survival, len(survival), draft_ms, step_ms, margin).tolist())
    if any(kept) and kept != everything:
        gain = rate(survival, kept, draft_ms, step_ms) / rate(survival, everything, draft_ms, step_ms)
        assert gain > 1 + margin - 1e-12


@given(problems(), st.sampled_from([0.01, 0.1]))
@settings(max_examples=200, deadline=None)
def test_keeping_any_needs_a_gain_above_the_hurdle(problem: tuple[Floats, float, Floats], hurdle: float) -> None:
    survival, draft_ms, step_ms = problem
    best = best_of_curve(survival, len(survival), draft_ms, step_ms)
    kept = best_of_curve(survival, len(survival), draft_ms, step_ms, hurdle=hurdle)
    none = tuple([0] * len(survival))
    gain = rate(survival, tuple(best.tolist()), draft_ms, step_ms) / rate(survival, none, draft_ms, step_ms)
    assert kept.tolist() == (best.tolist() if gain > 1 + hurdle else list(none))


@given(problems())
@settings(max_examples=300, deadline=None)
def test_early_stop_is_optimal_for_the_hull_of_its_curve(problem: tuple[Floats, float, Floats]) -> None:
    survival, draft_ms, step_ms = problem
    step_ms = step_ms[: int(np.count_nonzero(survival)) + 1]
    kept = tuple(early_stop(survival, len(survival), draft_ms, step_ms).tolist())
    hull = convex_hull(step_ms)
    best = max(rate(survival, choice, draft_ms, hull) for choice in every_choice(survival))
    assert kept in every_choice(survival)
    assert rate(survival, kept, draft_ms, hull) == pytest.approx(best, rel=1e-9)


@given(problems(most_rows=4, most_width=4), st.data())
@settings(max_examples=300, deadline=None)
def test_early_stop_does_not_look_ahead(problem: tuple[Floats, float, Floats], data: st.DataObject) -> None:
    """Whether a row keeps its first n drafts does not depend on confidences behind the n-th."""
    survival, draft_ms, step_ms = problem
    kept = early_stop(survival, len(survival), draft_ms, step_ms)
    row = data.draw(st.integers(0, len(survival) - 1))
    slot = data.draw(st.integers(0, survival.shape[1] - 1))
    changed = survival.copy()
    # Same drafts, other confidences from `slot` + 1 on: these depend on the draft at `slot`.
    for later in range(slot + 1, survival.shape[1]):
        if survival[row, later] > 0:
            changed[row, later] = changed[row, later - 1] * data.draw(st.sampled_from([0.01, 0.5, 0.9, 1.0]))
    again = early_stop(changed, len(survival), draft_ms, step_ms)
    assert (kept[row] > slot) == (again[row] > slot)


def test_the_whole_curve_does_look_ahead() -> None:
    """So that the test above is known to see it."""
    step_ms = np.array([1.0, 2.0, 1 / 0.45])
    assert best_of_curve(np.array([[0.8, 0.72]]), 1, 0.0, step_ms).tolist() == [2]
    assert best_of_curve(np.array([[0.8, 0.001]]), 1, 0.0, step_ms).tolist() == [0]


def test_the_hull() -> None:
    times = np.array([1.0, 2.0, 1.5, 4.0, 4.0, 4.0, 9.0])
    hull = convex_hull(times)
    assert (hull <= times + 1e-12).all()
    assert (np.diff(hull, 2) >= -1e-12).all()
    assert hull[[0, 2, 5, 6]].tolist() == times[[0, 2, 5, 6]].tolist()
    np.testing.assert_allclose(convex_hull(hull), hull)
    assert convex_hull(np.array([3.0])).tolist() == [3.0]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 16))
@settings(deadline=None)
def test_ties_go_by_slot_then_row(rows: int, width: int, room: int) -> None:
    """All drafts equal and room for some: rows are served in turn, the first rows first, every time the same."""
    count = min(room, rows * width)
    step_ms = np.where(np.arange(rows * width + 1) <= count, 1.0, 1e6)
    for choose in (best_of_curve, early_stop):
        kept = choose(np.ones((rows, width)), rows, 0.0, step_ms)
        assert kept.tolist() == [count // rows + (row < count % rows) for row in range(rows)]


@given(
    st.lists(CONFIDENCE, min_size=1, max_size=6),
    st.floats(0.0, 20.0),
    st.floats(0.01, 1.0),
    st.floats(0.0, 50.0),
    st.integers(1, 4),
    st.integers(2, 4),
)
@settings(max_examples=300, deadline=None)
def test_more_load_never_means_more_drafts_per_row(
    confidence: list[float], fixed_ms: float, token_ms: float, free: float, rows: int, factor: int
) -> None:
    """Equal rows on a machine with a fixed time, then a price per token beyond `free` ones (a roofline)."""
    survival = np.array([confidence]).cumprod(1)

    def per_row(count: int) -> list[float]:
        tokens = count * np.arange(0, count * survival.shape[1] + 1) / count + count
        step_ms = fixed_ms + token_ms * np.maximum(tokens, free)
        many = survival.repeat(count, axis=0)
        return [
            float(best_of_curve(many, count, 1.0 * count, step_ms).sum()) / count,
            float(early_stop(many, count, 1.0 * count, step_ms).sum()) / count,
        ]

    light, heavy = per_row(rows), per_row(rows * factor)
    # Whole drafts of one row more or less are not a trend.
    assert heavy[0] <= light[0] + 1 / rows + 1e-9
    assert heavy[1] <= light[1] + 1 / rows + 1e-9


def admitted_one_by_one(survival: Floats, count: int) -> list[int]:
    """Highest survival first, ties by slot, then by row."""
    order = sorted((-survival[row, slot], slot, row) for row, slot in zip(*np.nonzero(survival), strict=True))
    return [sum(row == each for _, _, row in order[:count]) for each in range(len(survival))]


@given(problems(6, 4), st.data())
@settings(max_examples=300, deadline=None)
def test_counts_are_those_of_drafts_admitted_one_by_one(
    problem: tuple[Floats, float, Floats], data: st.DataObject
) -> None:
    survival, _, _ = problem
    drafts = int(np.count_nonzero(survival))
    count = data.draw(st.integers(0, drafts))
    step_ms = np.where(np.arange(drafts + 1) <= count, 1.0, 1e9)
    for choose in (best_of_curve, early_stop):
        assert choose(survival, len(survival), 0.0, step_ms).tolist() == admitted_one_by_one(survival, count)


def hull_of(times: Floats) -> Floats:
    """A chain of corners, as in a textbook."""
    corners: list[int] = []
    for here in range(len(times)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (times[b] - times[a]) * (here - a) < (times[here] - times[a]) * (b - a):
                break
            corners.pop()
        corners.append(here)
    return np.interp(np.arange(len(times)), corners, times[corners])


@pytest.mark.parametrize("kind", ["straight pieces", "bucket by bucket", "convex", "falls at the end", "noise"])
def test_the_hull_of_long_curves(kind: str) -> None:
    """Measured curves are straight between points, and learned corrections jump at the edges of their buckets."""
    draw = np.random.default_rng(0)
    for count in (2, 3, 10, 500, 1793):
        places = np.arange(float(count))
        times = 10 + np.interp(places, [0, count / 4, count], [0, 1, draw.uniform(2, 100)])
        if kind == "bucket by bucket":
            times *= np.exp(draw.normal(0, 0.1, count // 20 + 1)).repeat(20)[:count]
        elif kind in ("convex", "falls at the end"):
            times = 10 + places**2 / count
            times[-1] = 5 if kind == "falls at the end" else times[-1]
        elif kind == "noise":
            times *= np.exp(draw.normal(0, 0.1, count))
        np.testing.assert_allclose(convex_hull(times), hull_of(times), rtol=1e-8)


def test_one_decision_takes_little_time() -> None:
    """256 rows of 7 drafts. Of the processor's time, and the least of many runs: the machine may be busy."""
    survival = np.random.default_rng(0).random((256, 7)).cumprod(1)
    step_ms = np.linspace(10, 200, 256 * 7 + 1)
    timer = timeit.Timer(lambda: best_of_curve(survival, 256, 5.0, step_ms, 0.01), timer=time.thread_time)
    seconds = min(timer.repeat(number=1, repeat=300))
    assert seconds < 2e-3  # 200 microseconds on a machine of one's own


# --- whether to draft at all


def worth(
    samples: Floats, rows: int, draft_ms: float, token_ms: float, hurdle: float = 0.0, scale: Floats | None = None
) -> list[bool]:
    scales = np.ones(rows) if scale is None else scale
    width = samples.shape[1]
    kept, gain = Drafted.of(samples).at(LEVELS, scales, np.full(rows, width))
    drafts = np.concatenate([[0.0], np.full(rows, draft_ms)])
    steps = 100 + token_ms * np.arange(rows * width + 1)
    return rows_worth_drafting(kept, gain, rows, drafts, steps, hurdle).tolist()


def test_drafts_are_made_where_they_pay() -> None:
    good = np.tile([0.9, 0.8, 0.7], (8, 1))
    bad = np.tile([0.02, 0.001, 0.0], (8, 1))
    assert worth(good, 4, 30, 1) == [True] * 4
    assert worth(bad, 4, 30, 1) == [False] * 4
    assert worth(good, 4, 1000, 1) == [False] * 4  # the draft costs ten steps
    assert worth(good, 4, 30, 500) == [False] * 4  # verification does
    # A gain of 0.021 tokens per row against 1 % more time: enough by itself, too little where more is asked for.
    assert worth(bad, 1, 1.0, 0.0) == [True]
    assert worth(bad, 1, 1.0, 0.0, hurdle=0.02) == [False]


def test_trimming_is_foreseen() -> None:
    """Half of the drafts are sure and half hopeless: keeping all would not pay, and keeping the sure ones does."""
    mixed = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]] * 4)
    assert worth(mixed, 8, 20, 8) == [True] * 8
    assert worth(np.full((8, 3), 0.5), 8, 20, 8) == [False] * 8


def test_rows_that_earn_nothing_are_left_out() -> None:
    good = np.tile([0.9, 0.8, 0.7], (8, 1))
    kept, gain = Drafted.of(good).at(LEVELS, np.array([1.0, 0.01, 1.0, 0.01]), np.full(4, 3))
    drafts = 15.0 * np.arange(5)
    chosen = rows_worth_drafting(kept, gain, 4, drafts, 100 + np.arange(13.0))
    assert chosen.tolist() == [True, False, True, False]


def test_drafted_rows_by_brute_force() -> None:
    draw = np.random.default_rng(0)
    samples = draw.random((20, 4)).cumprod(1)
    kept, gain = Drafted.of(samples).at(LEVELS, np.array([1.0, 0.5]), np.array([4, 4]))
    for index, level in enumerate(LEVELS):
        for row, scale in enumerate((1.0, 0.5)):
            used = samples * scale >= level
            assert kept[row, index] == pytest.approx(used.sum() / 20)
            assert gain[row, index] == pytest.approx((samples * scale * used).sum() / 20)
    _, limited = Drafted.of(samples).at(LEVELS[:1], np.ones(1), np.array([2]))
    assert limited[0, 0] == pytest.approx(samples[:, :2].sum() / 20)  # max_draft_tokens of the request


# --- a minimum per user


def test_slow_rows_are_lifted_if_they_can_be() -> None:
    survival = np.array([[0.9, 0.9, 0.9], [0.5, 0.4, 0.3], [0.01, 0.0, 0.0]])
    step_ms = 100 + np.arange(10.0)
    kept = np.array([3, 0, 0])

    def speed(counts: npt.NDArray[np.int64], row: int) -> float:
        return float((1 + survival[row, : counts[row]].sum()) / (step_ms[counts.sum()] + 20) * 1e3)

    assert speed(kept, 1) < 14
    lifted = lift_slow_rows(kept, survival, 20.0, step_ms, 14.0)
    assert lifted.tolist() == [3, 2, 0]  # the third cannot reach it, so nothing is spent on it
    assert speed(lifted, 1) >= 14
    assert lift_slow_rows(kept, survival, 20.0, step_ms, 1e6).tolist() == kept.tolist()
    assert lift_slow_rows(kept, survival, 20.0, step_ms, 1.0).tolist() == kept.tolist()
    # Where lifting one would sink another, nothing changes.
    steep = 100 + 60 * np.arange(10.0)
    assert lift_slow_rows(np.array([1, 0]), survival[:2], 0.0, steep, 9.0).tolist() == [1, 0]


def test_of_equal_rates_the_fewest_drafts() -> None:
    assert best_of_curve(np.array([[0.5, 0.4]]), 1, 0.0, np.array([1.0, 1.5, 9.0])).tolist() == [0]


def test_ties_in_a_large_batch() -> None:
    """Large enough for a sort that is not stable to show."""
    step_ms = np.where(np.arange(201 * 7 + 1) <= 500, 1.0, 1e6)
    for choose in (best_of_curve, early_stop):
        kept = choose(np.ones((201, 7)), 201, 0.0, step_ms)
        assert kept.tolist() == [500 // 201 + (row < 500 % 201) for row in range(201)]
    # Two kinds of rows by turns, room for half of each kind's last slot: those of the first rows.
    survival = np.where(np.arange(200)[:, None] % 2, 0.5, 1.0).repeat(7, axis=1)
    step_ms = np.where(np.arange(200 * 7 + 1) <= 1050, 1.0, 1e6)
    for choose in (best_of_curve, early_stop):
        kept = choose(survival, 200, 0.0, step_ms)
        assert (kept[::2] == 7).all()
        assert kept[1::2].tolist() == [3 + (row < 50) for row in range(100)]
