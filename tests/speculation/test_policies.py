"""The budgets on made-up plans and machines: when rows draft, what is verified, what experiments may cost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from dspark_serve.speculation.admission import _HOLD_SEVERAL, Allowance
from dspark_serve.speculation.calibrate import Calibrator
from dspark_serve.speculation.fixed import FixedBudget, KeepAll
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.speculation.verify import verify
from dspark_serve.tensors import Proposal
from dspark_serve.types import Plan, Request, Row, RowResult, SamplingParams, VerifyMode
from tests.speculation.test_verify import step_batch
from tests.speculation.virtual_server import WIDTH, Server, budget, cheap, cost, dear, drafting, served


def reference(server: Server, policy: KeepAll | None, steps: int = 1000) -> float:
    """Tokens per second of a fixed policy on the same machine; None: no drafting."""
    if policy is None:
        return len(server.rates) / server.step_ms(len(server.rates)) * 1e3
    other = Server(policy, server.step_ms, server.draft_ms, server.rates, spread=server.spread)
    return other.run(steps)


# --- against the fixed ones

SITUATIONS = {
    "alone, good": (cheap, [0.8]),
    "alone, hopeless": (cheap, [0.02]),
    "alone, dear": (dear, [0.6]),
    "eight, good": (cheap, [0.8] * 8),
    "eight, dear": (dear, [0.8] * 8),
    "eight, mixed": (cheap, [0.9, 0.05] * 4),
    "thirty, hopeless": (cheap, [0.02] * 30),
}


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("spread", [0.0, 2.0])
@pytest.mark.parametrize("ahead", [False, True])
def test_never_worse_than_what_one_could_have_fixed(name: str, spread: float, ahead: bool) -> None:
    step_ms, rates = SITUATIONS[name]
    server = served(step_ms, rates, spread=spread, ahead=ahead)
    server.run(100)
    reached = server.run(500)
    assert reached >= 0.98 * reference(server, None)
    for count in (1, 2, 3, WIDTH):
        assert reached >= 0.97 * reference(server, FixedBudget(count))


@pytest.mark.parametrize("ahead", [False, True])
def test_hopeless_drafts_are_soon_not_made(ahead: bool) -> None:
    server = served(cheap, [0.02] * 8, ahead=ahead)
    server.run(60)
    server.drafted.clear()
    server.run(1000)
    assert np.mean(np.array(server.drafted) > 0) < 0.05


@pytest.mark.parametrize("ahead", [False, True])
def test_experiments_cost_one_percent_at_most(ahead: bool) -> None:
    """Nothing here is worth drafting or verifying: whatever time goes into it is experiments."""
    server = served(cheap, [0.02] * 8, noise=0.0, ahead=ahead)
    server.run(100)
    now_ms, steps = server.now_ms, 1500
    server.run(steps)
    spent_ms = server.now_ms - now_ms - steps * cheap(8)
    assert 0 < spent_ms < 0.01 * (server.now_ms - now_ms)


@pytest.mark.parametrize("ahead", [False, True])
def test_requests_that_become_good_are_found_out(ahead: bool) -> None:
    server = served(cheap, [0.02] * 4, ahead=ahead)
    server.run(200)
    assert sum(server.drafted[-100:]) < 20
    server.rates[:] = [0.9] * 4
    server.run(800)
    assert np.mean(np.array(server.drafted[-100:]) == 4) > 0.9


def test_a_probe_that_is_drafted_ahead_is_verified_whole() -> None:
    """In the step after the one that asked for it, whatever is said of its drafts."""
    server = served(cheap, [0.02] * 8, noise=0.0, ahead=True)
    server.budget._full = Allowance(0.0)  # nothing else is verified whole
    server.run(200)
    server.drafted.clear()
    server.kept.clear()
    server.run(1500)
    probed = [step for step, rows in enumerate(server.drafted[:-1]) if rows == 1]
    assert len(probed) > 3
    assert all(server.kept[step + 1] == [WIDTH] for step in probed)


def test_a_pass_is_learned_from_in_the_step_that_makes_it() -> None:
    """Ahead of its drafts: of the rows it is for, and of no others."""
    made, seen = budget(cost(cheap, drafting)), []
    made.cost.observe_draft = lambda rows, context, ms, greedy: seen.append((rows, ms))  # type: ignore
    server = Server(made, cheap, drafting, [0.8] * 3, noise=0.0, ahead=True)
    server.run(5)
    assert server.drafted == [3] * 5
    assert seen == [(3, drafting(3))] * 5
    assert [len(kept) for kept in server.kept] == [0, 3, 3, 3, 3]


def test_one_good_request_drafts_among_bad_ones() -> None:
    server = served(cheap, [0.9, 0.01, 0.01, 0.01])
    server.run(300)
    names = []
    for _ in range(50):
        plan = Plan(tuple(Row(request, 99, 1, True, WIDTH) for request in server.requests))
        names += [row.request.request_id for row in server.budget.admit(plan).drafting]
        server.step()
    assert names.count("r0") == 50
    assert sum(name != "r0" for name in names) < 30


def test_a_drafter_without_cost_always_drafts() -> None:
    server = Server(
        AutoBudget(cost(dear, None), Calibrator("coupled", WIDTH), drafter="ngram", costly=None),
        dear, lambda rows: 0.01, [0.02] * 8,
    )  # fmt: skip
    server.run(100)
    assert min(server.drafted) == 8
    assert np.mean([sum(kept) for kept in server.kept[-50:]]) < 1  # and nearly nothing of it is verified


def test_a_row_does_not_draft_while_many_others_are_about_to_decode() -> None:
    """Alone it would; beside fifteen prompts the time of its drafts is theirs as well."""

    def step_ms(tokens: int) -> float:
        return 10 + 5.0 * tokens

    server = served(step_ms, [0.9], noise=0.0)
    server.run(60)
    assert server.drafted[-20:].count(1) > 15
    [request] = server.requests
    mine = Row(request, 99, 1, True, WIDTH)
    others = [Row(Request(f"p{n}", (1,), SamplingParams(), seed=n), 0, 20, True, 0) for n in range(15)]
    assert len(server.budget.admit(Plan((mine,))).drafting) == 1
    assert not server.budget.admit(Plan((mine, *others))).drafting


def test_a_decision_holds_until_the_rows_change() -> None:
    server = served(cheap, [0.8] * 3)
    server.run(50)
    asked: list[int] = []
    assert server.budget._admission is not None
    expected = server.budget._admission._drafted.expected
    server.budget._admission._drafted.expected = lambda *args: asked.append(1) or expected(*args)  # type: ignore
    server.run(3 * _HOLD_SEVERAL)  # they draft
    assert len(asked) == 3
    asked.clear()
    for _ in range(5):
        server.budget.release("r0")
        server.requests[0] = Request("r0", (1,), SamplingParams(), seed=0)
        server.step()
    assert len(asked) == 5


def test_reports_say_who_was_skipped_and_what_was_expected() -> None:
    server = served(cheap, [0.02] * 8)
    server.run(200)
    server.budget._admission._probes.share = 0.0
    server.run(70)
    plan = server.budget.admit(Plan(tuple(Row(request, 99, 1, True, WIDTH) for request in server.requests)))
    assert not plan.drafting
    report = server.budget.learn(plan, Proposal.empty(0), [RowResult((0,))] * 8, {"forward": cheap(8)})
    assert report is not None
    assert report.skipped == {"cost": 8}
    assert report.predicted_step_ms == pytest.approx(cheap(8), rel=0.1)
    assert report.predicted_draft_ms == 0


# --- limits and shapes


def test_the_curve_is_the_cost_models_for_the_present_load() -> None:
    server = served(dear, [0.9, 0.9, 0.9])
    made = server.budget
    assert isinstance(made, AutoBudget)
    before = made.curve(64)
    assert before is not None
    assert (before.rows, before.context, before.tokens[0], before.tokens[-1]) == (1, 0, 1, 64)
    for _ in range(30):
        server.step()
    curve = made.curve(300)
    assert curve is not None
    assert (curve.rows, curve.context) == (3, 300)
    assert list(curve.tokens) == sorted(set(curve.tokens))
    assert (curve.tokens[0], curve.tokens[-1]) == (3, 300)
    for tokens, ms in zip(curve.tokens, curve.step_ms, strict=True):
        assert ms == pytest.approx(made.cost.step_ms(tokens, 3, 300))
    assert curve.draft_ms == made.cost.draft_ms(3, 300)
    assert curve.slowdown == made.cost.slowdown
    tight = made.curve(1)  # fewer tokens than the load has rows
    assert tight is not None
    assert tight.tokens == (3,)
    assert KeepAll().curve(64) is None


def test_max_draft_tokens_is_respected() -> None:
    server = served(cheap, [0.95] * 2, limit=2)
    server.run(100)
    assert max(max(kept) for kept in server.kept) == 2


def test_budget_falls_as_load_rises() -> None:
    """The paper's Figure 8, in small: verification per request against concurrency."""
    means = []
    for rows in (1, 4, 16, 64):
        server = Server(
            budget(cost(lambda n: max(60.0, 6.0 * n), lambda rows: 2.0)), lambda n: max(60.0, 6.0 * n),
            lambda rows: 2.0, [0.8] * rows, spread=1.0,
        )  # fmt: skip
        server.run(150)
        means.append(np.mean([sum(kept) for kept in server.kept[-100:]]) / rows)
    assert means[0] > 3.5
    assert means[-1] < 1.5
    assert all(b <= a + 0.05 for a, b in itertools.pairwise(means))


def test_whole_blocks_are_verified_now_and_then() -> None:
    """So that calibration sees drafts that looked bad, and finds out when they are not; for one percent at most."""
    made = AutoBudget(cost(dear, None), Calibrator("coupled", WIDTH), drafter="ngram", costly=None)
    server = Server(made, dear, lambda rows: 0.0, [0.02] * 8, noise=0.0)
    server.run(100)
    server.kept.clear()
    now_ms, steps = server.now_ms, 1500
    server.run(steps)
    whole = sum(k == WIDTH for kept in server.kept for k in kept)
    assert whole == sum(k > 0 for kept in server.kept for k in kept) > 5  # nothing else is worth verifying here
    assert server.now_ms - now_ms - steps * dear(8) < 0.01 * (server.now_ms - now_ms)


def test_prompt_chunks_count_as_tokens_and_leave_drafts_alone() -> None:
    made = budget(cost(cheap, drafting))
    running, filling = (Request(name, (1,), SamplingParams(), seed=0) for name in ("a", "b"))
    plan = made.admit(Plan((Row(running, 99, 1, True, WIDTH), Row(filling, 0, 200, False))))
    proposal = Proposal(torch.zeros((1, WIDTH), dtype=torch.int64), (WIDTH,), confidence=torch.full((1, WIDTH), 0.9))
    kept = made.choose(plan, proposal)
    results = [RowResult((0, 0), n_kept=kept[0]), RowResult()]
    report = made.learn(plan, proposal, results, {"forward": cheap(201 + kept[0]), "propose": drafting(1)})
    assert report is not None
    assert report.predicted_step_ms == pytest.approx(cheap(201 + kept[0]), rel=0.05)
    # Without speculation the chunk would have been in the step all the same, but not in the steps of further tokens.
    assert report.plain_step_ms == pytest.approx(cheap(201), rel=0.05)
    assert report.plain_token_ms == pytest.approx(cheap(1), rel=0.05)


def test_without_speculation_a_token_takes_its_share_of_a_step_of_all_rows() -> None:
    server = served(dear, [0.7] * 8)
    plan = server.budget.admit(Plan(tuple(Row(request, 99, 1, True, WIDTH) for request in server.requests)))
    confidence = torch.full((8, WIDTH), 0.7)
    proposal = Proposal(torch.zeros((8, WIDTH), dtype=torch.int64), (WIDTH,) * 8, confidence=confidence)
    results = [RowResult((0, 0), n_kept=kept) for kept in server.budget.choose(plan, proposal)]
    report = server.budget.learn(plan, proposal, results, {"forward": 1.0, "propose": 1.0})
    assert report is not None
    assert report.plain_step_ms == pytest.approx(dear(8), rel=1e-6)  # before this step's time is learned from
    assert report.plain_token_ms == pytest.approx(dear(8) / 8, rel=1e-6)


def test_the_objective_per_user_needs_coupled_verification() -> None:
    with pytest.raises(ValueError, match="coupled"):
        budget(cost(cheap, drafting), "rejection", tokens_per_s_per_user=5.0)


def test_the_objective_per_user_lifts_who_is_slow() -> None:
    """Drafts of the second row do not pay, but without them it gets fewer tokens than it was promised."""
    kept = {}
    for promised in (0.0, 22.0):
        made = budget(cost(lambda n: 20 + 6.0 * n, lambda rows: 0.1), tokens_per_s_per_user=promised)
        requests = [Request(name, (1,), SamplingParams(), seed=0) for name in ("a", "b")]
        plan = made.admit(Plan(tuple(Row(request, 99, 1, True, WIDTH) for request in requests)))
        confidence = torch.tensor([[0.95] * WIDTH, [0.5] * WIDTH])
        proposal = Proposal(torch.zeros((2, WIDTH), dtype=torch.int64), (WIDTH,) * 2, confidence=confidence)
        made._steps = 1  # the row that is verified whole, if any, is the second: its share is not saved up yet
        kept[promised] = list(made.choose(plan, proposal))
    assert kept[22.0][1] > kept[0.0][1]


def test_equal_inputs_give_equal_budgets() -> None:
    first, second = (served(cheap, [0.7, 0.7, 0.1], spread=1.0) for _ in range(2))
    first.run(200)
    second.run(200)
    assert (first.kept, first.drafted) == (second.kept, second.drafted)


# --- the paper's Appendix A, through the budget itself

TARGET_A, ROWS = 0.7, 4000


def appendix_a(mode: VerifyMode, how: VerifyMode) -> float:
    """p-value of the first token of many requests, whose target says A with 0.7, drafted by fair coins. The second
    draft's survival depends on the first: 0.9 of 0.8 behind an A, nothing behind a B. A budget for `how` decides."""
    times = {1: 1.0, 2: 2.0, 3: 1 / 0.45}
    made = AutoBudget(cost(lambda n: times.get(n, 1e3), None, top=8), Calibrator(how, 2), drafter="head", costly=None)
    first = torch.randint(0, 2, (ROWS,), generator=torch.Generator().manual_seed(1)).tolist()
    drafts = []
    for number, token in enumerate(first):
        request = Request(f"r{number}", (1,), SamplingParams(), seed=number)
        plan = made.admit(Plan((Row(request, 0, 1, True, 2),)))
        confidence = torch.tensor([[0.8, 0.9 if token == 0 else 0.001]])
        proposal = Proposal(torch.tensor([[token, 0]]), (2,), confidence=confidence)
        drafts.append([token, 0][: made.choose(plan, proposal)[0]])
    width = max(map(len, drafts))
    batch = step_batch(drafts, [1.0] * ROWS, draft_probs=torch.full((ROWS, width, 2), 0.5) if width else None)
    logits = torch.tensor([TARGET_A, 1 - TARGET_A]).log().expand(batch.num_samples, 2).contiguous()
    counts = torch.bincount(verify(logits, batch, mode).tokens[:, 0], minlength=2).tolist()
    return float(stats.chisquare(counts, [TARGET_A * ROWS, (1 - TARGET_A) * ROWS]).pvalue)


def test_the_budget_does_not_bias_rejection() -> None:
    assert appendix_a("rejection", "rejection") > 1e-3


def test_the_budget_for_coupled_would_bias_rejection() -> None:
    """So that the test above is known to see it; in coupled mode itself it does no harm."""
    assert appendix_a("rejection", "coupled") < 1e-20
    assert appendix_a("coupled", "coupled") > 1e-3
