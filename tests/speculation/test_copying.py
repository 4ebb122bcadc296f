"""Which copies are worth verifying, against trying every number of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serve.speculation.budget import best_of_curve
from dspark_serve.speculation.copying import _MARGIN, MOST, Prices

STEPS = st.lists(st.floats(0.0, 3.0), min_size=1, max_size=30).map(lambda more: 5.0 + np.cumsum([0.0, *more]))
ROWS = st.lists(
    st.lists(st.floats(0.05, 0.99), min_size=1, max_size=4).map(lambda each: np.cumprod(each).tolist()), max_size=6
)


def tokens_per_ms(prices: Prices, promised: list[tuple[int, list[float]]], kept: dict[int, int]) -> float:
    accepted = sum(sum(chances[: kept.get(row, 0)]) for row, chances in promised)
    return (prices.base + accepted) / prices.times[sum(kept.values())]


@settings(deadline=None)
@given(STEPS, ROWS, st.integers(1, 20), st.floats(0.0, 0.5))
def test_as_good_as_the_best_point_of_the_whole_curve(
    step_ms: np.ndarray, rows: list[list[float]], base: int, lookup_ms: float
) -> None:
    prices = Prices.of(base, step_ms, lookup_ms)
    promised = [(2 * place, chances) for place, chances in enumerate(rows)]
    kept = dict(prices.worth(promised))
    assert list(kept) == sorted(kept)
    assert set(kept) <= {row for row, _ in promised}
    assert all(1 <= count <= len(dict(promised)[row]) for row, count in kept.items())
    drafts = sorted((chance for _, chances in promised for chance in chances), reverse=True)[: len(step_ms) - 1]
    expected = base + np.concatenate([[0.0], np.cumsum(drafts)])
    best = max(expected / np.array(prices.times[: len(expected)]))
    assert tokens_per_ms(prices, promised, kept) == pytest.approx(best)
    if sum(map(len, rows)) < len(step_ms):
        survival = np.zeros((len(rows), 4))
        for row, chances in enumerate(rows):
            survival[row, : len(chances)] = chances
        other = best_of_curve(survival, base, 0.0, np.array(prices.times))
        assert tokens_per_ms(prices, promised, {2 * r: n for r, n in enumerate(other.tolist())}) <= best * (1 + 1e-9)


@settings(deadline=None)
@given(STEPS, ROWS, st.integers(1, 20))
def test_nothing_is_lost_by_not_looking_where_all_promise_too_little(
    step_ms: np.ndarray, rows: list[list[float]], base: int
) -> None:
    prices = Prices.of(base, step_ms, 0.1)
    promised = list(enumerate(rows))
    if max((chance for chances in rows for chance in chances), default=0.0) < prices.least:
        assert prices.worth(promised) == []


def test_ties_go_by_slot_then_by_row() -> None:
    prices = Prices.of(4, 10.0 + np.arange(4.0), 0.0)
    assert prices.worth([(0, [0.8, 0.5]), (3, [0.8, 0.8]), (5, [0.8])]) == [(0, 1), (3, 1), (5, 1)]
    assert prices.worth([]) == []


def test_what_is_no_gain_is_not_kept() -> None:
    flat, steep = Prices.of(4, np.full(9, 10.0), 0.0), Prices.of(4, 10.0 + 2.5 * np.arange(9), 0.0)
    assert flat.worth([(1, [0.9, 0.1])]) == [(1, 2)]
    assert flat.least == pytest.approx(0.0)
    assert steep.worth([(1, [0.99, 0.98])]) == []
    assert steep.least == 1
    assert Prices(4, [8.0, 10.0], 0.0).worth([(1, [1.0])]) == []  # as good as without is not better
    assert Prices.of(4, 10.0 + 2.0 * np.arange(9), 0.0).least == pytest.approx(0.8 * (1 + _MARGIN))


def test_what_looking_up_takes_is_paid_once() -> None:
    step_ms = 10.0 + 0.5 * np.arange(9)
    assert Prices.of(4, step_ms, 0.0).worth([(0, [0.3])]) == [(0, 1)]
    dear = Prices.of(4, step_ms, 1.0)
    assert dear.worth([(0, [0.3])]) == []
    assert dear.worth([(row, [0.5]) for row in range(4)]) == [(row, 1) for row in range(4)]


def test_there_are_never_more_drafts_than_prices() -> None:
    prices = Prices.of(1, np.full(4, 10.0), 0.0)
    assert prices.worth([(0, [0.9, 0.8]), (1, [0.7, 0.6])]) == [(0, 2), (1, 1)]
    assert MOST >= 64
