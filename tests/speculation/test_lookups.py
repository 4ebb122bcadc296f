"""Rows that earn no pass of the drafter's model may look up: when they do, and when it is given up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.speculation.virtual_server import Server, budget, cheap, cost, dear, drafting


def looking(found: float, step_ms: Callable[[int], float] = cheap, **options: object) -> Server:
    return Server(budget(cost(step_ms, drafting), lookup=True), step_ms, drafting, [0.02] * 8, found=found, **options)  # type: ignore[arg-type]


def test_rows_that_earn_no_pass_look_up_where_that_pays() -> None:
    server = looking(found=0.8)
    server.run(300)
    assert sum(server.drafted[-100:]) < 20
    assert np.mean(server.looked_up[-100:]) > 7.5
    assert np.mean([sum(kept) for kept in server.kept[-100:]]) > 8


@pytest.mark.parametrize(("found", "step_ms"), [(0.0, cheap), (0.5, dear)])
def test_lookups_that_find_nothing_or_earn_nothing_are_given_up(found: float, step_ms: Callable[[int], float]) -> None:
    server = looking(found, step_ms, noise=0.0)
    server.run(100)
    server.looked_up.clear()
    now_ms, steps = server.now_ms, 1500
    server.run(steps)
    spent_ms = server.now_ms - now_ms - steps * (step_ms(8) + 0.01)
    assert sum(server.looked_up) > 0
    assert spent_ms < 0.015 * (server.now_ms - now_ms)  # looks, probes of the head, whole blocks: half a percent each


def test_promises_below_the_hurdle_are_left_alone() -> None:
    """With all drafts kept that pay, 8 rows would yield 2 % more: lookups are neither kept nor made for long."""

    def step_ms(tokens: int) -> float:
        return 10 + 10.0 * tokens

    server = looking(0.93, step_ms, noise=0.0)
    server.run(600)
    assert sum(server.looked_up[:300]) > 0  # they were, until it was clear
    assert sum(server.looked_up[300:]) < 0.3 * 8 * 300  # glances, which are cheap beside such steps
    assert sum(map(sum, server.kept[300:])) < 0.05 * 8 * 300


def test_lookups_that_begin_to_find_something_are_found_out() -> None:
    server = looking(found=0.0)
    server.run(300)
    server.found = 0.9
    server.run(600)
    assert np.mean(server.looked_up[-50:]) > 6.5
