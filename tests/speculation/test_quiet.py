"""Steps about which nothing need be asked: when there are such, what wakes the budget, and that none is missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from dspark_serve.speculation.admission import HOLD
from dspark_serve.speculation.cost import CostModel
from dspark_serve.speculation.fixed import KeepAll
from dspark_serve.tensors import Proposal
from dspark_serve.types import Plan, Request, Row, RowResult, SamplingParams
from tests.speculation.test_resting import resting, row, took
from tests.speculation.virtual_server import WIDTH, Server, cheap, dear, served


@dataclass
class Silent:
    """Texts that copy nothing, and will not for so many steps."""

    steps: int
    asked: int = 0

    def promised(self, rows: Sequence[Row], least: float) -> list[tuple[int, list[float]]]:
        self.asked += 1
        return []

    def quiet(self, rows: Sequence[Row]) -> int:
        return self.steps


@dataclass
class Copying(Silent):
    """The first row copies now."""

    chances: list[float] = field(default_factory=lambda: [0.99] * WIDTH)

    def promised(self, rows: Sequence[Row], least: float) -> list[tuple[int, list[float]]]:
        return [(0, self.chances)]


def at_rest(lookups: Silent, rows: int = 8) -> Server:
    """Just before a step that it rests through."""
    server = resting(rows)
    server.budget.lookups = lookups
    took(server, [row(request) for request in server.requests], dear(rows))
    lookups.asked = 0
    return server


def bare(server: Server) -> list[Row]:
    return [Row(request, 99, 1, True) for request in server.requests]


def test_nothing_is_asked_for_as_long_as_nothing_is_going_to_be_copied() -> None:
    lookups = Silent(5)
    server = at_rest(lookups)
    for _ in range(4):
        server.run(5)
        assert lookups.asked == 0
        server.step()  # the sixth
        assert lookups.asked == 1
        lookups.asked = 0


def test_it_is_asked_in_every_step_where_that_is_not_known() -> None:
    lookups = Silent(0)
    server = at_rest(lookups)
    server.run(10)
    assert lookups.asked == 10


def test_who_copies_is_not_slept_through() -> None:
    server = at_rest(Silent(0))
    server.budget.lookups = Copying(5)
    server.run(3)
    assert server.looked_up[-3:] == [1, 1, 1]


def test_a_quiet_plan_is_left_as_it_is_and_counts() -> None:
    server = at_rest(Silent(99))
    rest, rows, known = server.budget._rest, tuple(bare(server)), server.budget._rest.report  # type: ignore[union-attr]
    assert rest is not None
    steps, seen = server.budget._steps, rest.steps
    assert server.budget.quiet(rows)
    plan = Plan(rows, known_bare=rows)
    assert server.budget.admit(plan) is plan
    assert (server.budget._steps, rest.steps) == (steps + 1, seen + 1)
    took_before = len(rest.took_ms[0])
    assert took(server, list(rows), dear(8)) is known
    assert len(rest.took_ms[0]) == took_before + 1


@pytest.mark.parametrize("change", ["another", "one less", "one more", "another order"])
def test_whoever_comes_or_goes_wakes_it(change: str) -> None:
    server = at_rest(Silent(99))
    rows = bare(server)
    assert server.budget.quiet(rows)
    other = Row(Request("new", (1,), SamplingParams(), seed=1), 0, 7, False)
    changed = {
        "another": [*rows[1:], other],
        "one less": rows[1:],
        "one more": [*rows, other],
        "another order": rows[::-1],
    }[change]
    assert not server.budget.quiet(changed)
    assert not server.budget.quiet(rows)  # until it has looked again
    server.budget.admit(Plan(tuple([row(request) for request in server.requests])))
    assert server.budget.quiet(rows)


def test_it_wakes_when_the_rest_is_over_and_when_prices_are() -> None:
    server = at_rest(Silent(10**6))
    rest = server.budget._rest
    quiet = 0
    while server.budget.quiet(bare(server)):
        server.budget.admit(Plan(tuple(bare(server))))
        quiet += 1
    assert rest is not None
    assert HOLD / 2 < quiet < HOLD
    again = at_rest(Silent(10**6))
    assert again.budget._prices is not None
    again.budget._prices = again.budget._prices[0], again.budget._steps + 4, again.budget._prices[2]
    again.budget._rest.asleep = 0  # type: ignore[union-attr]
    again.step()
    asleep = again.budget._rest.asleep  # type: ignore[union-attr]
    assert 0 < asleep <= 4
    assert again.budget._steps + asleep < again.budget._prices[1]


def test_a_budget_that_may_draft_is_never_quiet() -> None:
    server = served(cheap, [0.9] * 4)
    for _ in range(60):
        assert not server.budget.quiet(bare(server))
        server.step()
    assert not KeepAll().quiet(bare(server))


@pytest.mark.parametrize("whoever", [True, False])
def test_newcomers_matter_only_where_the_best_of_drafts_would_pay(whoever: bool) -> None:
    server = resting(8)
    assert server.budget._rest is not None
    server.budget._rest.whoever = whoever
    new = [row(Request(f"new{n}", (1,), SamplingParams(), seed=n)) for n in range(8)]
    server.budget.admit(Plan(tuple(new)))
    assert server.budget._resting == whoever
    server.budget.admit(Plan(tuple(new[:4])))  # half as many are another matter anyway
    assert not server.budget._resting


@pytest.mark.parametrize(("step_ms", "could"), [(dear, True), (lambda tokens: 10 + 50.0 * tokens, False)])
def test_whether_the_best_would_pay_is_kept_with_the_rest(step_ms, could: bool) -> None:  # type: ignore[no-untyped-def]
    server = served(step_ms, [0.02] * 4, noise=0.0)
    server.run(300)
    while server.budget._rest is None:
        server.step()
    assert server.budget._rest.whoever is not could


def test_prompts_read_meanwhile_are_learned_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they came, with all that the cost model asks of a step; and their time counts as earned."""
    server = resting(8)
    rest = server.budget._rest
    assert rest is not None
    greedy = SamplingParams(temperature=0.0)
    prompts = [
        Row(Request("a", (1,), greedy, seed=0), 0, 7, False),
        Row(Request("b", (1,), greedy, seed=0), 0, 9, True),
    ]
    first, again = (
        took(server, [prompt, *bare(server)[1:]], ms) for prompt, ms in zip(prompts, (500.0, 600.0), strict=True)
    )
    learned: list[tuple[object, ...]] = []

    def watched(self: CostModel, *step: float, **more: float) -> float:
        learned.append((*step, more))
        return 1.0

    monkeypatch.setattr(CostModel, "observe_step", watched)
    assert rest.learn(server.budget.cost, bare(server)) == 2.0
    assert learned == [(14, 8, 707, 500.0, True, {"silent": 7}), (16, 8, 709, 600.0, True, {"silent": 8})]
    assert rest.learn(server.budget.cost, bare(server)) == 0.0
    for report in (first, again):
        assert report == replace(
            rest.report,
            predicted_step_ms=report.plain_step_ms,
            plain_step_ms=report.plain_step_ms,
            skipped=report.skipped,
        )
    assert again.predicted_step_ms > first.predicted_step_ms


def test_it_does_not_sleep_on_from_a_step_in_which_a_prompt_is_read() -> None:
    """The next one, of the same requests, is another."""
    server = at_rest(Silent(99))
    new = Request("new", (1,), SamplingParams(temperature=0.0), seed=1)
    with_prompt = [Row(new, 0, 7, True), *bare(server)[1:]]
    assert not server.budget.quiet(with_prompt)
    took(server, with_prompt, dear(14))
    after = [Row(new, 7, 1, True), *bare(server)[1:]]
    assert not server.budget.quiet(after)
    assert took(server, after, dear(8)).predicted_step_ms == server.budget._rest.report.predicted_step_ms  # type: ignore[union-attr]
    assert server.budget.quiet(after)


def test_a_step_with_a_prompt_and_copies_is_learned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    server = at_rest(Silent(0))
    server.budget.lookups = Copying(0)
    learned: list[float] = []
    observe = CostModel.observe_step
    monkeypatch.setattr(
        CostModel, "observe_step", lambda self, *step, **more: learned.append(step[0]) or observe(self, *step, **more)
    )
    new = Request("new", (1,), SamplingParams(temperature=0.0), seed=1)
    plan = server.budget.admit(Plan((*[row(request) for request in server.requests[:7]], Row(new, 0, 7, False))))
    assert server.budget._resting
    assert [row.max_drafts > 0 for row in plan.rows] == [True] + [False] * 7
    proposal = Proposal(torch.zeros((1, WIDTH), dtype=torch.int64), (WIDTH,))
    kept = list(server.budget.choose(plan, proposal))
    results = [RowResult((0,), n_kept=kept[0]), *[RowResult((0,))] * 7]
    server.budget.learn(plan, proposal, results, {"forward": dear(14 + kept[0]), "propose": 0.1})
    assert learned[-1] == 14 + kept[0] > 14
