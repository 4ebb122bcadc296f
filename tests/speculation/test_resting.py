"""Steps in which the budget looks at nothing: when there are such, when they end, and that their time counts."""

from __future__ import annotations

import pytest

from dspark_serve.speculation.cost import CostModel
from dspark_serve.speculation.resting import _STEPS
from dspark_serve.types import Plan, Request, Row, SamplingParams
from tests.speculation.virtual_server import WIDTH, Server, budget, cost, dear, drafting, served


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What steps took that were learned from, in milliseconds."""
    found: list[float] = []
    observe = CostModel.observe_step

    def watched(self: CostModel, tokens: int, rows: int, context: int, ms: float, *rest: float, **more: int) -> float:
        found.append(ms)
        return observe(self, tokens, rows, context, ms, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(CostModel, "observe_step", watched)
    return found


def resting(rows: int = 4) -> Server:
    """Where drafting was given up, just after a look; no experiment is paid for."""
    server = served(dear, [0.02] * rows, noise=0.0)
    admission = server.budget._admission
    assert admission is not None
    admission._probes.share = server.budget._full.share = 0.0
    server.run(200)
    admission._held.until = 10**9  # type: ignore[union-attr]
    while server.budget._rest is None or server.budget._rest.steps:
        server.step()
    return server


def test_one_step_in_many_is_looked_at_and_the_others_are_learned_as_one(looks: list[float]) -> None:
    server = resting()
    looks.clear()
    server.run(3 * (_STEPS + 1))
    assert looks == pytest.approx([dear(4)] * 2 * 3)  # drafting not included


def test_a_machine_that_slows_down_between_looks_is_followed() -> None:
    server = resting()
    before_ms = server.budget.cost.step_ms(4, 4, 400)
    server.step_ms = lambda tokens: 1.5 * dear(tokens)
    server.run(20 * (_STEPS + 1))
    assert server.budget.cost.step_ms(4, 4, 400) == pytest.approx(1.5 * before_ms, rel=0.02)


def test_steps_that_were_rested_through_count_as_several() -> None:
    """As many as decide what the machine's present slowdown is."""
    server = resting()
    before_ms = server.budget.cost.step_ms(4, 4, 400)
    server.step_ms = lambda tokens: 1.5 * dear(tokens)
    server.run(_STEPS + 1)
    assert server.budget.cost.step_ms(4, 4, 400) == pytest.approx(1.5 * before_ms, rel=0.1)


def test_experiments_are_earned_while_it_rests() -> None:
    server = resting()
    probes = server.budget._admission._probes  # type: ignore[union-attr]
    probes.share, probes.saved_ms, began_ms = 0.01, 0.0, server.now_ms
    server.run(5 * (_STEPS + 1))
    assert probes.saved_ms == pytest.approx(0.01 * (server.now_ms - began_ms), rel=0.02)


@pytest.mark.parametrize("change", ["nothing", "another request", "one less", "a prompt"])
def test_any_change_ends_it(change: str) -> None:
    server = resting()
    plan = [Row(request, 99, 1, True, WIDTH) for request in server.requests]
    if change == "another request":
        plan[1] = Row(Request("r1", (1,), SamplingParams(), seed=9), 99, 1, True, WIDTH)
    elif change == "one less":
        plan.pop()
    elif change == "a prompt":
        plan[0] = Row(server.requests[0], 0, 7, False)
    server.budget.admit(Plan(tuple(plan)))
    assert server.budget._resting == (change == "nothing")


def test_who_drafts_is_never_rested_from() -> None:
    server = Server(budget(cost(dear, drafting)), dear, drafting, [0.9])
    for _ in range(100):
        server.step()
        assert not (server.drafted[-1] and server.budget._rest)  # type: ignore[union-attr]
    assert sum(server.drafted) > 20
