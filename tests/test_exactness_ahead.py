"""Drafts made at the end of the step before, as on a GPU: the text of plain decoding, the drafts of the usual order.

Also where other rows come than were drafted for: some have ended, been cancelled or preempted, others join.
"""

import pytest
import torch

from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.portfolio import Acceptance
from dspark_serve.drafters.ready import Ready
from dspark_serve.engine.drafting import DraftAhead, drafting_for
from dspark_serve.speculation.fixed import FixedBudget, KeepAll
from dspark_serve.tensors import DraftLogits, Proposal
from dspark_serve.types import Row, SpeculationParams
from tests.drafters.golden import golden_target
from tests.drafters.made_heads import Watch, plan_named
from tests.test_exactness import deciding_budget
from tests.test_exactness_heads import (
    PAGE,
    SITUATIONS,
    answers,
    assert_targets_distribution,
    options_of,
    plain,
    prompts,
    requests,
    same_where_both,
    sample,
)
from tests.toy import Collected, make_engine, make_request, run

HEADS = ["dspark_vanilla", "dspark_rnn", "dflash", "eagle3", "portfolio"]


def engine_of(head, ahead=True, **options):
    return make_engine(golden_target(), plan_named(head), page_size=PAGE, ahead=ahead, **options)


@pytest.mark.parametrize("situation", [situation for situation in SITUATIONS if situation != "alone"])
@pytest.mark.parametrize("head", HEADS)
def test_same_bits(head, situation):
    engine = engine_of(head, **options_of(situation))
    if situation == "prefix":
        run(engine, requests())
    got = run(engine, requests())
    assert answers(got) == plain()
    assert got.kept > got.accepted > 0
    assert (got.preemptions > 0) == (situation == "preemption")
    assert (sum(got.cached.values()) > 0) == (situation == "prefix")


@pytest.mark.parametrize("machine", ["generous", "mean", "moody", "fixed"])
@pytest.mark.parametrize("head", ["dspark_vanilla", "portfolio"])
def test_a_budget_that_decides_a_step_ahead(head, machine):
    engine = engine_of(head)
    engine.budget = FixedBudget(2) if machine == "fixed" else deciding_budget(engine.drafter, machine)
    for _ in range(2):  # the second time the budget knows what to expect
        assert answers(run(engine, requests())) == plain()


@pytest.mark.parametrize("head", HEADS)
def test_drafts_and_accepted_lengths_are_those_of_the_usual_order(head):
    """Anchors, contexts and drafts are the same, step for step; and so is all that a portfolio chooses by."""
    seen, stats = [], []
    for ahead in (False, True):
        engine, asked = (
            engine_of(head, ahead),
            [request for request in requests(logprobs=None) if request.num_prompt > 1],
        )
        engine.budget = watch = Watch()
        run(engine, asked)
        seen.append(watch.seen)
        stats.append([request.stats for request in asked])
    assert same_where_both(*seen) == len(seen[0]) == len(seen[1]) > 20
    assert stats[0] == stats[1]
    assert sum(each.num_accepted_tokens for each in stats[0]) > 0


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("head", ["dspark_vanilla", "eagle3", "portfolio"])
def test_rows_come_and_go(head, mode):
    """Requests that join, end by a stop token within what was accepted, are cancelled, come again under the same name,
    and may draft little or nothing. In rejection mode greedy texts alone can be compared."""
    temperature = 0.0 if mode == "rejection" else 0.8

    def asked(index, **changes):
        request = make_request(
            f"r{index}", prompts()[index], seed=index, temperature=temperature, max_tokens=20 - index, **changes
        )
        most = None if index % 2 else index // 2  # one of them none
        request.speculation = SpeculationParams(enabled=index != 4, max_draft_tokens=most)
        return request

    def stops():
        """A token in the middle of each text: what ends one may end others, but with and without drafts alike."""
        free = [run(engine_of("none", False), [asked(index)]).tokens[f"r{index}"] for index in range(8)]
        return tuple({next((t for t in tokens[5:] if t not in tokens[:5]), tokens[-1]) for tokens in free[::3]})

    ends = stops()
    wanted = {}
    for index in range(8):
        wanted |= run(engine_of("none", False), [asked(index, stop_token_ids=ends)]).tokens
    assert len({len(tokens) for tokens in wanted.values()}) > 2
    engine = make_engine(golden_target(), plan_named(head, mode), mode=mode, page_size=PAGE, ahead=True, seqs=5)
    got, dropped = Collected(), False
    for step in range(80):
        if step < 8:
            engine.add(asked(step, stop_token_ids=ends))
        if step == 3:
            engine.cancel("r1")
            engine.add(asked(1, stop_token_ids=ends))
            got.tokens.pop("r1")
            dropped = True
        if not engine.has_work:
            break
        report = engine.step()
        engine.check_integrity()
        for delta in report.deltas:
            got.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        got.accepted += sum(row.n_accepted for row in report.rows)
    assert dropped
    assert got.tokens == wanted
    assert got.accepted > 0


@pytest.mark.parametrize("head", ["dspark_vanilla", "eagle3", "portfolio"])
def test_rejection_mode_has_the_targets_distribution(head):
    assert_targets_distribution(*sample(plan_named(head, "rejection"), 0, ahead=True))


class Now(KeepAll):
    """Lets those rows draft that it is told to, and counts what comes of it."""

    def __init__(self):
        self.names, self.lookups, self.drafted = None, set(), []

    def admit(self, plan):
        if self.names is None:
            return plan
        rows = tuple(
            row
            if row.request.request_id in self.names
            else Row(row.request, row.start, 1, True, row.max_drafts, lookup_only=True)
            if row.request.request_id in self.lookups and row.max_drafts
            else Row(row.request, row.start, row.length, row.samples)
            for row in plan.rows
        )
        return type(plan)(rows)

    def choose(self, plan, proposal):
        drafters = proposal.drafters or ("head",) * len(proposal.n_draft)
        self.drafted = [
            (row.request.request_id, name)
            for row, n, name in zip(plan.drafting, proposal.n_draft, drafters, strict=True)
            if n
        ]
        return proposal.n_draft


class Passes:
    """Whom the head is asked to draft for, by the ids of the requests."""

    def __init__(self, engine):
        self.made, inner = [], engine._drafting._drafter.ahead
        engine._drafting._drafter.ahead = lambda rows, newest: (
            self.made.append([row.request.request_id for row in rows]) or inner(rows, newest)
        )


def test_the_budget_admits_a_step_ahead():
    """Whoever is let draft has drafts one step later, and then carries them whatever the budget says by then."""
    engine = engine_of("dspark_vanilla")
    engine.budget = budget = Now()
    passes = Passes(engine)

    def step(*names):
        budget.names = names
        engine.step()
        return [name for name, _ in budget.drafted], passes.made.pop() if passes.made else []

    for index in (2, 3):
        engine.add(make_request(f"r{index}", prompts()[index], temperature=0.0, max_tokens=30, ignore_eos=True))
    assert step() == ([], ["r2", "r3"])  # the ends of prompts, which no budget is asked about
    assert step("r3") == (["r2", "r3"], ["r3"])
    assert step() == (["r3"], [])
    assert step() == ([], [])
    engine.add(make_request("r4", prompts()[4], temperature=0.0, max_tokens=30, ignore_eos=True))
    assert step() == ([], [])  # nobody drafts, so nothing is made for a newcomer alone
    assert step("r2") == ([], ["r2"])
    engine.add(make_request("r5", prompts()[5], temperature=0.0, max_tokens=30, ignore_eos=True))
    assert step("r2", "r4") == (["r2"], ["r2", "r4", "r5"])
    assert step("r5") == (["r2", "r4", "r5"], ["r5"])


def test_nobody_is_drafted_for_who_cannot_draft_next():
    engine = engine_of("dspark_vanilla")
    passes = Passes(engine)
    for index, tokens in ((2, 2), (3, 3), (4, 30), (5, 30), (6, 30)):
        engine.add(make_request(f"r{index}", prompts()[index], temperature=0.0, max_tokens=tokens, ignore_eos=True))
    engine.scheduler._by_id["r4"].speculation = SpeculationParams(enabled=False)
    engine.scheduler._by_id["r5"].speculation = SpeculationParams(max_draft_tokens=0)
    engine.step()
    assert passes.made == [["r3", "r6"]]


def test_a_row_that_looks_up_alone_does_so():
    engine = engine_of("portfolio")
    engine.budget = budget = Now()
    for name in "abc":  # the answers are one token, over and over
        asked = {"temperature": 0.0, "max_tokens": 60, "logit_bias": ((5, 100.0),)}
        engine.add(make_request(name, [5, 6, 7, 8, 9] * 4, **asked))
    budget.names, budget.lookups = (), {"b"}
    found = set()
    for _ in range(6):
        engine.step()
        found |= set(budget.drafted)
    assert {name for name, _ in found} == {"a", "b", "c"}  # all had drafts after their prompts
    assert budget.drafted == [("b", "ngram")]


def test_a_portfolio_learns_from_the_same_outcomes(monkeypatch):
    told = []
    record = Acceptance.record

    def recording(self, *what):
        told[-1].append(what)
        record(self, *what)

    monkeypatch.setattr(Acceptance, "record", recording)
    for ahead in (False, True):
        told.append([])
        engine = engine_of("portfolio", ahead)
        run(engine, [request for request in requests() if request.num_prompt > 1])
        assert len(engine.drafter.acceptance._line) == 0  # nothing is kept of requests that have ended
    assert told[0] == told[1]
    assert len(told[0]) > 10


def test_ready_drafts_are_those_of_their_rows():
    asked = [make_request(name, [1, 2, 3]) for name in "abcd"]
    tokens = torch.arange(12).view(3, 4)
    logits = DraftLogits(torch.rand(3, 4, 5), torch.rand(3, 4), torch.rand(3))
    block = Proposal(tokens, (4, 4, 2), logits, torch.rand(3, 4), largest=torch.rand(3, 4))
    ready = Ready(block, {request: (place, 7 + place) for place, request in enumerate(asked[:3])})

    def row(index, start, drafts=4):
        return Row(asked[index], start, 1, True, drafts)

    assert [ready.has(row(0, 7)), ready.has(row(1, 8)), ready.has(row(2, 9, 1))] == [True] * 3
    assert [ready.has(row(0, 8)), ready.has(row(3, 7)), ready.has(row(1, 8, 0))] == [False] * 3
    assert ready.of([row(0, 7), row(1, 8), row(2, 9)]).tokens is tokens
    [short] = ready.of([row(2, 9)]).tokens.tolist()
    assert short == [8, 9]  # no wider than the longest row that is left
    got = ready.of([row(2, 9), row(0, 7, 1)])
    assert got.n_draft == (2, 1)
    assert got.tokens.tolist() == [[8, 9], [0, -1]]
    for mine, whole in ((got.confidence, block.confidence), (got.largest, block.largest)):
        assert torch.equal(mine, whole[[2, 0], :2])
    assert torch.equal(got.draft_probs.logits, logits.logits[[2, 0], :2])
    assert torch.equal(got.draft_probs.log_mass, logits.log_mass[[2, 0], :2])
    assert torch.equal(got.draft_probs.temperature, logits.temperature[[2, 0]])


def test_only_a_budget_and_a_device_make_drafts_early():
    """On a CPU nothing is waited for, and a draft for a row that has just ended would be made in vain."""
    engine, there, here = engine_of("portfolio", ahead=False), torch.device("cuda"), torch.device("cpu")
    ngram, decides = NgramDrafter(4), deciding_budget(engine.drafter, "generous")
    chosen = [
        isinstance(drafting_for(drafter, budget, engine.scheduler, device), DraftAhead)
        for drafter, budget, device in (
            (engine.drafter, decides, there),
            (engine.drafter, decides, here),
            (engine.drafter, KeepAll(), there),
            (ngram, decides, there),
        )
    ]
    assert chosen == [True, False, False, False]
