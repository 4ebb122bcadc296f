"""What experiments may cost, and that they are made: long runs in which no draft earns its time, so that whatever goes
beyond plain decoding is an experiment. Shares of the time are the budget's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from dspark_serve.speculation import admission
from dspark_serve.speculation.admission import HOLD, Admitted, Allowance, Load, _Held
from dspark_serve.speculation.calibrate import Calibrator
from dspark_serve.speculation.members import Members
from dspark_serve.speculation.per_request import PerRequest
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.types import Plan, Request, Row, SamplingParams, SpeculationParams
from tests.speculation.virtual_server import WIDTH, Server, budget, cheap, cost, dear, drafting, served

ROWS, STEPS = 8, 4000


def allowances(made: AutoBudget) -> list[Allowance]:
    """Of probes and whole blocks: all that there are."""
    held = [*vars(made).values(), *(vars(made._admission).values() if made._admission is not None else ())]
    return [value for value in held if isinstance(value, Allowance)]


def settled(made: AutoBudget, step_ms: Callable[[int], float], rows: int = ROWS) -> Server:
    """Nothing is worth drafting or verifying here, and the budget has found that out."""
    server = Server(made, step_ms, drafting, [0.02] * rows, noise=0.0)
    server.run(200)
    server.drafted.clear()
    server.kept.clear()
    return server


def ngram_only() -> AutoBudget:
    return AutoBudget(cost(dear, None), Calibrator("coupled", WIDTH), drafter="ngram", costly=None)


def test_all_shares_together_are_one_percent_at_most() -> None:
    assert sum(each.share for each in allowances(budget(cost(cheap, drafting)))) <= 0.01


@pytest.mark.parametrize("step_ms", [cheap, dear])
def test_experiments_take_no_more_than_their_shares(step_ms: Callable[[int], float]) -> None:
    made = budget(cost(step_ms, drafting))
    server = settled(made, step_ms)
    saved_ms = sum(each.saved_ms for each in allowances(made))
    began_ms = server.now_ms
    server.run(STEPS)
    took_ms = server.now_ms - began_ms
    # Besides the step, the server takes a hundredth of a millisecond to find that nobody drafts.
    passes = sum(1 for count in server.drafted if count)
    spent_ms = took_ms - STEPS * step_ms(ROWS) - (STEPS - passes) * 0.01
    most_ms = saved_ms + sum(each.share for each in allowances(made)) * took_ms
    assert made._admission is not None
    assert 0.8 * made._admission._probes.share * took_ms < spent_ms < 1.01 * most_ms  # and probes are made


def test_whole_blocks_take_no_more_than_their_share_where_drafts_cost_nothing() -> None:
    made = ngram_only()
    server = Server(made, dear, lambda rows: 0.0, [0.02] * ROWS, noise=0.0)
    server.run(200)
    server.kept.clear()
    saved_ms, began_ms = made._full.saved_ms, server.now_ms
    server.run(STEPS)
    took_ms = server.now_ms - began_ms
    spent_ms = took_ms - STEPS * dear(ROWS)
    assert 0.5 < spent_ms / (saved_ms + made._full.share * took_ms) < 1.01
    steps = [index for index, kept in enumerate(server.kept) if sum(kept)]
    longest = max(b - a for a, b in pairwise([0, *steps, STEPS]))
    # Saved up for in so many steps; the row whose turn it is must be one that is not verified whole already.
    assert longest <= WIDTH * 20.0 / (made._full.share * dear(ROWS)) + 2
    whole = {index % ROWS for index in steps}
    assert whole != {steps[0] % ROWS}  # not always the same row


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("step_ms", [cheap, dear])
def test_a_row_is_probed_as_soon_as_that_is_saved_up(step_ms: Callable[[int], float], rows: int) -> None:
    """However hopeless: a probe's price is a pass for one row, and its block in the step."""
    made = budget(cost(step_ms, drafting))
    server = settled(made, step_ms, rows)
    assert made._admission is not None
    server.run(STEPS)
    probed = [index for index, count in enumerate(server.drafted) if count]
    price_ms = drafting(1) + step_ms(rows + WIDTH) - step_ms(rows)
    between = price_ms / (made._admission._probes.share * step_ms(rows))  # steps
    assert (
        max(b - a for a, b in pairwise([0, *probed, STEPS])) <= 1.1 * between + HOLD
    )  # in which what was decided stays
    assert max(server.drafted) == 1  # one at a time


def test_all_rows_are_probed_by_turns() -> None:
    made = budget(cost(cheap, drafting))
    server = settled(made, cheap)
    names, admit = [], made.admit

    def watched(plan):
        found = admit(plan)
        names.extend(row.request.request_id for row in found.drafting)
        return found

    made.admit = watched  # type: ignore[method-assign]
    server.run(STEPS)
    assert len(names) > 3 * ROWS
    assert all(len(set(names[at : at + ROWS])) == ROWS for at in range(len(names) - ROWS))


def test_what_is_not_spent_is_not_hoarded() -> None:
    """An hour without an experiment does not buy an hour of them."""
    allowance = Allowance(0.01)
    allowance.earn(3.6e6)
    assert [allowance.spend(50.0) for _ in range(3)] == [True, True, False]
    allowance.earn(4999.0)
    assert not allowance.spend(50.0)
    allowance.earn(2.0)
    assert allowance.spend(50.0)


@pytest.mark.parametrize("limit", [None, 2])
def test_probes_are_of_the_most_that_a_request_may_draft(limit: int | None) -> None:
    """Of a row about to end a probe would be cheaper, and say nothing of whole blocks."""
    server = served(dear, [0.02] * 3, limit=limit, ending=frozenset({"r0"}))
    speculation = SpeculationParams(max_draft_tokens=limit)
    server.requests = [replace(request, speculation=speculation) for request in server.requests]
    server.run(100)
    assert server.budget._admission is not None
    before = server.budget._admission._drafted.last_steps(("r0", "r1", "r2"))
    server.run(3000)
    after = server.budget._admission._drafted.last_steps(("r0", "r1", "r2"))
    assert (after > before).tolist() == [False, True, True]


def test_probes_are_cheaper_the_nearer_drafting_comes_to_paying() -> None:
    """A block takes 92 ms, and saves 69 of them where nine drafts in ten are right."""
    probes = []
    for rate in (0.02, 0.9):
        server = served(dear, [rate] * 4, noise=0.0)
        server.run(2200)
        probes.append(sum(count > 0 for count in server.drafted[200:]))
    assert probes[1] > 2 * probes[0] > 0


@pytest.mark.parametrize(("rows", "ended", "asks"), [(16, 4, 0), (16, 5, 1), (7, 1, 0), (7, 2, 1), (3, 1, 1)])
def test_that_nobody_drafts_holds_while_few_rows_change(rows: int, ended: int, asks: int) -> None:
    server = served(dear, [0.02] * rows)
    server.run(300)
    admission = server.budget._admission
    assert admission is not None
    while server.drafted[-1] or admission._held is None or admission._held.until - server.budget._steps < 12:
        server.step()  # up to a decision of a step or two ago, that nobody drafts
    assert server.budget._rest is not None
    server.budget._rest.whoever = False  # as if others' drafts might pay
    asked: list[int] = []
    whole = admission._drafted.whole
    admission._drafted.whole = lambda *args: asked.append(1) or whole(*args)  # type: ignore
    for place in range(ended):
        server.budget.release(f"r{place}")
        server.requests[place] = Request(f"r{place}", (1,), SamplingParams(), seed=99)
    server.step()
    assert len(asked) == asks
    if not asks:
        assert server.drafted[-1] == 0
        assert len(server.budget.admit(Plan((Row(server.requests[0], 99, 1, True, WIDTH),))).drafting) <= 1
        assert len(asked) == 1  # one row is not like sixteen


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("price", [cheap, dear])
def test_what_is_ruled_out_at_first_sight_would_not_have_drafted(
    rows: int, price: Callable[[int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weighing every row each time comes to the same, where drafting pays, nearly pays, and does not."""

    def decisions(rate: float) -> list[int]:
        server = served(price, [rate] * rows)
        server.run(400)
        return server.drafted

    asked: list[bool] = []
    may_pay = admission._may_pay
    for rate in (0.02, 0.3, 0.5, 0.7, 0.9):
        with monkeypatch.context() as patch:
            patch.setattr(admission, "_may_pay", lambda *args: asked.append(may_pay(*args)) or asked[-1])
            quick = decisions(rate)
            patch.setattr(admission, "_may_pay", lambda *args: True)
            assert decisions(rate) == quick
    assert 0 < sum(asked) < len(asked)


@pytest.mark.parametrize(("per_token_ms", "probes"), [(20.0, False), (15.0, True)])
def test_nothing_is_tried_or_probed_where_the_best_drafts_would_not_pay(per_token_ms: float, probes: bool) -> None:
    """A token of sixteen rows takes a sixteenth of a step, and so does a draft, its share of a pass not included."""

    def step_ms(tokens: int) -> float:
        return 10 + per_token_ms * tokens + (5.0 * 16 if probes else 0.0)

    server = served(step_ms, [0.02] * 16, noise=0.0)
    server.step()
    assert server.drafted == [16 if probes else 0]
    server.run(200)
    server.drafted.clear()
    server.run(3000)
    assert (sum(server.drafted) > 0) == probes


def test_beside_a_prompt_nothing_is_tried_that_would_not_pay_once_it_is_read() -> None:
    """In a step of so many tokens another one takes a tenth of what it takes where all rows decode."""

    def step_ms(tokens: int) -> float:
        return 10 + 20.0 * min(tokens, 80) + 2.0 * max(tokens - 80, 0)

    made = budget(cost(step_ms, drafting))
    requests = [Request(f"r{place}", (1,), SamplingParams(), seed=0) for place in range(16)]
    decoding = [Row(request, 99, 1, True, WIDTH) for request in requests[1:]]
    assert not made.admit(Plan((Row(requests[0], 0, 70, False), *decoding))).drafting


def test_what_is_known_to_pay_is_drafted_though_it_is_better_than_the_best_that_is_hoped_for() -> None:
    server = served(cheap, [0.99] * 16, noise=0.0)
    server.run(20)
    server.step_ms = step_ms = lambda tokens: 30 + 10.0 * tokens
    server.budget.cost = server.budget._admission._cost = cost(step_ms, drafting)  # type: ignore[union-attr]
    server.run(40)
    assert server.drafted[-1] == 16
    unknown = served(step_ms, [0.99] * 16, noise=0.0)
    unknown.run(40)
    assert not any(unknown.drafted)


def test_tokens_of_prompts_are_silent_but_for_the_last() -> None:
    def row(start: int, length: int, samples: bool, drafts: int = 0) -> Row:
        return Row(Request("r", (1,) * 99, SamplingParams(), seed=0), start, length, samples, drafts)

    plan = Plan((row(50, 1, True, 4), row(60, 1, True), row(0, 32, False), row(32, 20, True)))
    load = Load.of(plan, False, 51)
    assert (load.tokens, load.rows, load.silent) == (54, 4, 32 + 19)
    assert (load.decoding.tokens, load.decoding.silent) == (4, 0)


def test_a_decision_holds_for_rows_like_those_it_was_made_for() -> None:
    requests = [Request(f"r{place}", (1,), SamplingParams(), seed=0) for place in range(9)]
    members = [Members.of(tuple(requests[first : first + 8])) for first in (0, 1)]
    costly = np.array([True, False, True, True, True, True, False, True])
    made = Admitted(costly)
    held = _Held(PerRequest(), members[0], 8, made, step=10, hold=40)
    assert held.still(members[0], 8, 10) is made
    like = held.still(members[1], 8, 10)
    assert like is not None
    assert like.costly.tolist() == [*costly[1:].tolist(), True]  # the new row does what most do
    assert held.still(members[1], 8, 11) is like
    assert held.still(members[0], 8, 12).costly.tolist() == costly.tolist()  # type: ignore[union-attr]
    assert held.still(members[0], 8, 50) is None
    assert held.still(members[0], 11, 12) is None  # three prompts beside eight rows
    assert held.still(Members.of(tuple(requests[:5])), 5, 12) is None


@pytest.mark.parametrize(("rows", "first"), [(4, 16), (16, 4), (64, 2)])
def test_many_rows_that_begin_to_draft_are_soon_looked_at_again_and_then_less_often(rows: int, first: int) -> None:
    """Two steps of 64 rows tell as much as sixteen of four."""
    server = served(lambda tokens: 50 + 0.1 * tokens, [0.9] * rows)
    server.run(40)
    admission = server.budget._admission
    assert admission is not None
    holds: list[int] = []
    admission._held = None
    while len(holds) < 5:
        server.step()
        assert server.drafted[-1] > 0.9 * rows
        held = admission._held
        if held.until - server.budget._steps == held.hold:  # type: ignore[attr-defined]
            holds.append(held.hold)  # type: ignore[attr-defined]
    assert holds == [min(first * 2**turn, 16) for turn in range(5)]


def test_what_learning_takes_is_part_of_the_price() -> None:
    server = served(cheap, [0.8] * 3)
    server.run(100)
    assert server.drafted[-1] == 3
    admission = server.budget._admission
    assert admission is not None
    lesson = admission.lesson
    for drafted, ms in ((True, 0.4), (False, 0.1), (True, 1e6), (False, 0.0), (True, -1.0)):
        for _ in range(200):
            lesson.add(drafted, ms)  # what cannot be is dropped
    assert lesson.ms == pytest.approx(0.3, abs=0.01)
    server.run(2 * HOLD)
    assert server.drafted[-1] == 3
    lesson.with_ms = 1e3
    server.run(2 * HOLD)
    assert server.drafted[-1] == 0


def test_no_probe_where_nine_right_drafts_in_ten_would_not_pay() -> None:
    """8 rows take 170 ms, and every draft 20 more: whole blocks of such drafts would bring 66 ms' worth for 83."""

    def dearer(tokens: int) -> float:
        return 10 + 20.0 * tokens

    server = settled(budget(cost(dearer, drafting)), dearer)
    server.run(STEPS)
    assert not any(server.drafted)
    server = settled(budget(cost(dear, drafting)), dear)
    server.run(STEPS)
    assert any(server.drafted)
