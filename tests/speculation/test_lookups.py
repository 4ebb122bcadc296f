"""Rows that earn no pass of the drafter's model may copy: when they do, what is learned of it, and that it costs
nothing where there is nothing to copy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dspark_serve.speculation.admission import HOLD
from dspark_serve.speculation.calibrate import Calibrator
from dspark_serve.speculation.cost import CostModel
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.tensors import Proposal
from dspark_serve.types import Plan, Request, Row, RowResult, SamplingParams
from tests.speculation.virtual_server import LOOKING_MS, WIDTH, Repeats, Server, budget, cheap, cost, dear, drafting


def copying(found: float, step_ms: Callable[[int], float] = cheap, **options: object) -> Server:
    made = budget(cost(step_ms, drafting), lookups=Repeats(found))
    return Server(made, step_ms, drafting, [0.02] * 8, found=found, **options)  # type: ignore[arg-type]


def lookup_alone(found: float, step_ms: Callable[[int], float], **options: object) -> Server:
    calibrator = Calibrator("coupled", WIDTH, adaptive=frozenset({"ngram"}))
    made = AutoBudget(
        cost(step_ms, None),
        calibrator,
        drafter="ngram",
        costly=None,
        lookups=Repeats(found),
        **options,  # type: ignore[arg-type]
    )
    return Server(made, step_ms, lambda rows: 0.0, [found] * 8, found=found)


def without_probes(server: Server) -> Server:
    admission = server.budget._admission  # type: ignore[union-attr]
    assert admission is not None
    admission._probes.share = 0.0
    return server


def test_rows_that_earn_no_pass_copy_where_that_pays() -> None:
    server = copying(0.8)
    server.run(300)
    assert sum(server.drafted[-100:]) < 20
    assert np.mean(server.looked_up[-100:]) > 7.5
    assert np.mean([sum(kept) for kept in server.kept[-100:]]) > 8


def test_a_lookup_without_a_head_copies_where_that_pays_and_not_elsewhere() -> None:
    server = lookup_alone(0.8, cheap)
    plain = 8 / cheap(8) * 1e3
    assert server.run(100) > 1.5 * plain
    assert lookup_alone(0.5, dear).run(100) == pytest.approx(8 / (dear(8) + 0.01) * 1e3, rel=0.02)


@pytest.mark.parametrize(("found", "step_ms"), [(0.0, cheap), (0.5, dear)])
def test_what_finds_nothing_or_earns_nothing_costs_nothing(found: float, step_ms: Callable[[int], float]) -> None:
    server = without_probes(copying(found, step_ms, noise=0.0))
    server.run(100)
    server.looked_up.clear()
    server.drafted.clear()
    server.budget._full.share = 0.0
    server.run(1500)
    assert sum(server.looked_up) == sum(server.drafted) == 0


def test_copies_that_begin_are_verified_in_that_very_step() -> None:
    """Though the budget rests: it looks at nothing else meanwhile."""
    server = without_probes(copying(0.0, noise=0.0))
    server.run(200)
    while not server.budget._resting or server.budget._rest.steps > 10:
        server.step()
    assert server.looked_up[-1] == 0
    server.budget.lookups.found = server.found = 0.9
    server.step()
    assert server.budget._resting
    assert server.looked_up[-1] == 8
    assert sum(server.kept[-1]) == 8 * WIDTH


@pytest.mark.parametrize("step_ms", [dear, cheap])
def test_copies_are_looked_for_in_every_step(step_ms: Callable[[int], float]) -> None:
    server = without_probes(copying(0.0, step_ms, noise=0.0))
    server.run(200)
    looks: list[int] = []
    server.budget.lookups.promised = lambda rows, least: looks.append(1) or []  # type: ignore[func-returns-value]
    server.run(50)
    assert len(looks) == 50


def test_what_steps_with_copies_take_is_learned_while_the_budget_rests() -> None:
    """More than they were thought to, so that they stop paying."""
    server = without_probes(copying(0.6, noise=0.0))

    def run(steps: int) -> int:
        """Every other text copies. How many were verified."""
        server.looked_up.clear()
        for step in range(steps):
            server.budget.lookups.found = 0.6 * (step % 2)
            server.step()
        return sum(server.looked_up)

    assert run(100) > 8 * 40
    server.step_ms = lambda tokens: cheap(8) if tokens == 8 else 2 * cheap(tokens)
    run(400)
    assert run(100) < 0.1 * 8 * 50


def test_steps_are_learned_together_by_how_many_drafts_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    server = without_probes(copying(0.0, noise=0.0))
    server.run(200)
    while not server.budget._resting:
        server.step()
    server.budget._rest.took_ms.clear()
    learned: list[tuple[int, int, float]] = []
    observe = CostModel.observe_step

    def watched(
        self: CostModel, tokens: int, rows: int, context: int, ms: float, *rest: float, times: int = 1
    ) -> float:
        learned.append((tokens, times, ms))
        return observe(self, tokens, rows, context, ms, *rest, times=times)  # type: ignore[arg-type]

    monkeypatch.setattr(CostModel, "observe_step", watched)
    steps = 8 * HOLD
    for step in range(steps):
        server.budget.lookups.found = server.found = 0.9 * (step % 4 == 0)
        server.step()
    assert all(ms == pytest.approx(cheap(tokens)) for tokens, _, ms in learned)
    for tokens, share in ((8, 3 / 4), (40, 1 / 4)):
        counts = [times for count, times, _ in learned if count == tokens]
        assert sum(counts) == pytest.approx(share * steps, rel=0.1)
        assert len(counts) < sum(counts) / 3


def test_an_objective_per_user_sees_all_copies_there_are() -> None:
    """So little is gained by them that they are left alone, but that much was asked for."""
    plain = lookup_alone(0.77, dear)
    plain.run(20)
    assert sum(map(sum, plain.kept)) == 0
    lifted = lookup_alone(0.77, dear, tokens_per_s_per_user=1.01 / dear(8) * 1e3)
    lifted.run(20)
    assert sum(map(sum, lifted.kept)) > 0
    assert lifted.budget._rest is None  # every step's are weighed
    nobody = lookup_alone(0.5, dear, tokens_per_s_per_user=1e9)
    nobody.run(20)
    assert sum(nobody.looked_up) > 0
    assert sum(map(sum, nobody.kept)) == 0


def test_copies_must_gain_more_than_costs_are_known_to() -> None:
    """Eight rows' copies would save 0.6 ms of 100, looking them up included."""

    def step_ms(tokens: int) -> float:
        return 60 + 5.0 * tokens

    for found, pays in ((0.46, False), (0.52, True)):
        server = lookup_alone(found, step_ms)
        server.budget._lookup_ms = 0.01 + 8 * LOOKING_MS
        server.noise = 0.0
        server.run(1)
        assert (sum(server.looked_up) > 0) == pays


def test_prices_are_those_of_the_load() -> None:
    server = lookup_alone(0.9, cheap)
    server.run(3)
    prices = server.budget._prices
    rows = [Row(request, 99, 1, True, WIDTH) for request in server.requests]
    prompt = Row(Request("p", (1,) * 20, SamplingParams(), seed=0), 0, 20, True)
    server.budget.admit(Plan((*rows[:7], prompt)))
    assert server.budget._prices is prices  # a prompt that is read beside them is no draft's matter
    server.budget.admit(Plan(tuple(rows[:2])))
    assert prices[2].base == 8
    assert server.budget._prices[2].base == 2


def test_a_pass_for_the_next_step_is_not_what_looking_up_takes() -> None:
    """Made beside copies, at the end of their step."""
    server = copying(0.9)
    server.run(200)
    before_ms = server.budget._lookup_ms
    plan = server.budget.admit(Plan(tuple(Row(r, 99, 1, True, WIDTH) for r in server.requests)))
    proposal = Proposal(torch.zeros((8, WIDTH), dtype=torch.int64), (WIDTH,) * 8)
    kept = server.budget.choose(plan, proposal)
    for ahead, counts in (((0,), False), ((), True)):
        mine = Plan(plan.rows, ahead=ahead)
        results = [RowResult((0,), n_kept=n) for n in kept]
        server.budget.learn(mine, proposal, results, {"forward": cheap(40), "propose": 4.0})
        assert (server.budget._lookup_ms != before_ms) == counts


def test_drafts_that_are_ready_are_not_taken_for_copies() -> None:
    """Made at the end of the step before, for rows that it is decided meanwhile should not have drafted."""
    server = copying(0.9, ahead=True)
    server.run(60)
    plan = server.budget.admit(Plan(tuple(Row(r, 99, 1, True, WIDTH) for r in server.requests)))
    mixed = (Row(server.requests[0], 99, 1, True, WIDTH), *plan.rows[1:])
    assert all(row.lookup_only for row in plan.rows[1:])
    shape = (8, WIDTH)
    proposal = Proposal(
        torch.zeros(shape, dtype=torch.int64),
        (WIDTH,) * 8,
        confidence=torch.full(shape, 0.01),
        drafters=("head", *["ngram"] * 7),
    )
    assert sum(server.budget.choose(Plan(plan.rows), proposal)) == 8 * WIDTH  # copies were weighed before
    assert sum(server.budget.choose(Plan(mixed), proposal)) < 8  # these are weighed now


def test_what_looking_up_takes_is_measured() -> None:
    server = copying(0.9)
    server.run(200)
    assert server.budget._lookup_ms == pytest.approx(0.01 + 8 * LOOKING_MS, rel=0.05)
