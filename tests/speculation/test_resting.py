"""Steps in which the budget looks at nothing: when there are such, when they end, and that their time counts."""

from __future__ import annotations

import pytest
import torch

from dspark_serve.speculation.admission import Load
from dspark_serve.speculation.cost import CostModel
from dspark_serve.speculation.resting import _STEPS, Rest
from dspark_serve.tensors import Proposal
from dspark_serve.types import BudgetReport, Plan, Request, Row, RowResult, SamplingParams
from tests.speculation.virtual_server import WIDTH, Repeats, Server, budget, cost, dear, drafting, served


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
    """Greedy requests, where drafting was given up, just after a look; no experiment is paid for."""
    server = served(dear, [0.02] * rows, noise=0.0, temperature=0.0)
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
    before_ms = server.budget.cost.step_ms(4, 4, 400, greedy=True)
    server.step_ms = lambda tokens: 1.5 * dear(tokens)
    server.run(20 * (_STEPS + 1))
    assert server.budget.cost.step_ms(4, 4, 400, greedy=True) == pytest.approx(1.5 * before_ms, rel=0.02)


def test_steps_that_were_rested_through_count_as_several() -> None:
    """As many as decide what the machine's present slowdown is."""
    server = resting()
    before_ms = server.budget.cost.step_ms(4, 4, 400, greedy=True)
    server.step_ms = lambda tokens: 1.5 * dear(tokens)
    server.run(_STEPS + 1)
    assert server.budget.cost.step_ms(4, 4, 400, greedy=True) == pytest.approx(1.5 * before_ms, rel=0.1)


def test_experiments_are_earned_while_it_rests() -> None:
    server = resting()
    probes = server.budget._admission._probes  # type: ignore[union-attr]
    probes.share, probes.saved_ms, began_ms = 0.01, 0.0, server.now_ms
    server.run(5 * (_STEPS + 1))
    assert probes.saved_ms == pytest.approx(0.01 * (server.now_ms - began_ms), rel=0.02)


def row(request: Request) -> Row:
    return Row(request, 99, 1, True, WIDTH)


def newcomer(name: str, temperature: float = 0.0) -> Request:
    return Request(name, (1,), SamplingParams(temperature=temperature), seed=9)


def took(server: Server, rows: list[Row], ms: float) -> BudgetReport:
    """A step of these rows without drafts, as the budget sees it."""
    plan = server.budget.admit(Plan(tuple(rows)))
    assert not plan.drafting
    proposal = Proposal.empty(0)
    assert list(server.budget.choose(plan, proposal)) == []
    report = server.budget.learn(plan, proposal, [RowResult((0,))] * len(rows), {"forward": ms, "propose": 0.01})
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("change", "goes_on", "alike"),
    [
        ("nothing", True, True),
        ("one another", True, True),
        ("two others", True, True),
        ("three others", False, None),
        ("one less", True, False),
        ("three less", False, None),
        ("three more", False, None),
        ("a prompt", True, False),
        ("a hotter one", True, False),
    ],
)
def test_it_goes_on_while_most_are_the_same(change: str, goes_on: bool, alike: bool | None) -> None:
    server = resting(8)
    rows = [row(request) for request in server.requests]
    if "other" in change:
        for place in range({"one": 1, "two": 2, "three": 3}[change.split()[0]]):
            rows[place] = row(newcomer(f"r{place}"))  # ids are used again
    elif "less" in change:
        del rows[: {"one": 1, "three": 3}[change.split()[0]]]
    elif "more" in change:
        rows += [row(newcomer(name)) for name in "abc"]
    elif change == "a prompt":
        rows[0] = Row(newcomer("a"), 0, 7, False)
    elif change == "a hotter one":
        rows[0] = row(newcomer("a", temperature=1.0))
    server.budget.admit(Plan(tuple(rows)))
    assert server.budget._resting == goes_on
    if alike is not None:
        assert server.budget._rest.alike == alike  # type: ignore[union-attr]


def test_steps_that_are_not_like_the_others_are_looked_at(looks: list[float]) -> None:
    server = resting(8)
    rows, dear_ms = [row(request) for request in server.requests], dear(8)
    known = server.budget._rest.report  # type: ignore[union-attr]
    looks.clear()
    assert took(server, rows, dear_ms) is known
    assert took(server, rows, dear_ms) is known
    assert not looks
    with_prompt = took(server, [Row(newcomer("a"), 0, 7, False), *rows[1:]], dear(14))
    assert not looks  # of a prompt it is enough to know what the step was to take; it is learned with the others
    assert with_prompt.predicted_step_ms == with_prompt.plain_step_ms == pytest.approx(dear(14), rel=0.05)
    assert with_prompt.plain_token_ms == pytest.approx(dear(8) / 8, rel=0.05)
    assert with_prompt.skipped == {"cost": 7}
    assert took(server, [row(newcomer("a")), *rows[1:]], dear_ms) is known  # it has been read
    fewer = took(server, rows[1:], dear(7))
    assert looks == [dear(14), dear_ms, dear(7)]  # those of eight rows before: others come from now on
    assert fewer.predicted_step_ms == pytest.approx(dear(7), rel=0.05)
    assert fewer.skipped == {"cost": 7}
    assert took(server, rows[1:], dear(7)) is fewer  # from now on it is like that one
    assert len(looks) == 3
    assert server.budget._rest is not None
    assert server.budget._rest.steps == 6


@pytest.mark.parametrize("prompts", [1, 7, 8])
def test_it_begins_beside_prompts_for_those_who_were_decided_about(prompts: int) -> None:
    """Nothing was decided about those who were not asked for."""
    server = resting(8)
    server.budget._rest = None
    rows = [Row(newcomer(f"r{n}"), 0, 7, False) if n < prompts else row(server.requests[n]) for n in range(8)]
    took(server, rows, dear(8 + 6 * prompts))
    assert (server.budget._rest is None) == (prompts == 8)
    for place in range(prompts):
        rows[place] = row(rows[place].request)
    plan = server.budget.admit(Plan(tuple(rows)))
    assert server.budget._resting == (prompts == 1)
    if prompts == 1:
        assert not server.budget._rest.alike  # type: ignore[union-attr]
        assert not plan.drafting
        took(server, rows, dear(8))
        server.budget.admit(Plan(tuple(rows)))
        assert server.budget._rest.alike  # type: ignore[union-attr]


def test_it_goes_on_beside_requests_that_never_draft() -> None:
    """There is nothing to be decided about them, however many they are."""
    server = resting(8)
    server.budget._rest = None
    rows = [row(request)._replace(max_drafts=0 if n < 5 else WIDTH) for n, request in enumerate(server.requests)]
    took(server, rows, dear(8))
    server.budget.admit(Plan(tuple(rows)))
    assert server.budget._resting


def test_a_step_with_a_prompt_is_not_what_later_ones_are_learned_as(looks: list[float]) -> None:
    """Nor are copies that are verified in them."""
    server = resting(8)
    rows = [row(request) for request in server.requests]
    took(server, [Row(newcomer("a"), 0, 7, False), *rows[1:]], dear(14))
    tokens: list[int] = []
    observe = server.budget.cost.observe_step
    server.budget.cost.observe_step = lambda n, *rest, **more: tokens.append(n) or observe(n, *rest, **more)  # type: ignore[method-assign,func-returns-value]
    took(server, rows, dear(8))
    server.budget.lookups = Repeats(0.99)
    server.budget._prices = None
    plan = server.budget.admit(Plan(tuple(rows)))
    assert server.budget._resting
    assert len(plan.drafting) == 8
    proposal = Proposal(torch.zeros((8, WIDTH), dtype=torch.int64), (WIDTH,) * 8)
    kept = server.budget.choose(plan, proposal)
    took_ms = {"forward": dear(8 + sum(kept)), "propose": 0.1}
    server.budget.learn(plan, proposal, [RowResult((0,), n_kept=n) for n in kept], took_ms)
    assert tokens == []
    server.budget._rest.learn(server.budget.cost, rows)  # type: ignore[union-attr]
    assert tokens == [14, 8, 8 + sum(kept)]  # each for itself


def test_steps_with_copies_are_expected_to_take_what_their_drafts_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those without are not, though the rest began after one with."""
    server = resting(8)
    rows = tuple([Row(request, 99, 1, True) for request in server.requests])
    copying = tuple([row._replace(max_drafts=WIDTH, lookup_only=True) for row in rows])
    load = Load(8, 8, 800, True, 100.0)
    report = BudgetReport(dear(8 + 5), 0.0, dear(8), dear(8) / 8)
    rest = Rest.after(Plan(copying, known_bare=rows), copying, load, report)
    assert rest is not None
    costs = server.budget.cost
    assert rest.lasted(costs, 0, dear(8)).predicted_step_ms == dear(8)
    with_copies = rest.lasted(costs, 3, dear(11))
    assert with_copies.predicted_step_ms == pytest.approx(dear(11), rel=0.05)
    assert with_copies.plain_step_ms == dear(8)
    learned: list[tuple[float, ...]] = []
    monkeypatch.setattr(CostModel, "observe_step", lambda self, *step, **more: learned.append(step) or 1.0)
    assert rest.learn(costs, rows) == 2.0
    assert learned == [(8, 8, 800, dear(8), True, 0.0), (11, 8, 800, dear(11), True, 300.0)]  # three drafts' keys
    assert rest.learn(costs, rows) == 0.0


def test_who_rests_learns_at_contexts_between_then_and_now(monkeypatch: pytest.MonkeyPatch) -> None:
    server, contexts = resting(8), []
    observe = CostModel.observe_step

    def watched(self: CostModel, tokens: int, rows: int, context: int, *rest: float, **more: int) -> float:
        contexts.append(context)
        return observe(self, tokens, rows, context, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(CostModel, "observe_step", watched)
    took(server, [Row(request, 99, 1, True, WIDTH) for request in server.requests], dear(8))
    later = [Row(request, 299, 1, True, WIDTH) for request in server.requests[1:]]
    took(server, later, dear(7))
    assert contexts == [8 * 200, 7 * 300]


def test_who_drafts_is_never_rested_from() -> None:
    server = Server(budget(cost(dear, drafting)), dear, drafting, [0.9])
    for _ in range(100):
        server.step()
        assert not (server.drafted[-1] and server.budget._rest)  # type: ignore[union-attr]
    assert sum(server.drafted) > 20
