"""Context that is written later is there when a draft needs it: pauses, preemption and shared pages change no draft."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dspark_serve.drafters import dspark as module
from dspark_serve.speculation.fixed import KeepAll
from dspark_serve.types import Row
from tests.drafters.golden import golden_plan, golden_runs, golden_target
from tests.toy import make_engine, make_request, run


class Sometimes(KeepAll):
    """Drafts in one step of four; remembers what was drafted, by request and position."""

    def __init__(self):
        self.steps, self.drafts = 0, {}

    def admit(self, plan):
        self.steps += 1
        if self.steps % 4:
            return replace(plan, rows=tuple(row._replace(max_drafts=0) for row in plan.rows))
        return plan

    def choose(self, plan, proposal):
        for row, tokens in zip(plan.drafting, proposal.tokens.tolist(), strict=True):
            self.drafts[row.request.request_id, row.start] = tokens
        return proposal.n_draft


def served(monkeypatch, enough, mostly):
    monkeypatch.setattr(module, "_ENOUGH", enough)
    monkeypatch.setattr(module, "_MOSTLY", mostly)
    budget = Sometimes()
    engine = make_engine(golden_target(), golden_plan("dspark_vanilla"), budget=budget, page_size=8, pages=26, seqs=4)
    runs = golden_runs("dspark_vanilla")
    prompts = [run_["input_ids"] for run_ in runs[:3]] + [runs[0]["input_ids"] + [5]]  # two that share their pages
    requests = [make_request(f"r{i}", p, temperature=0.0, max_tokens=40) for i, p in enumerate(prompts)]
    reports = []
    step = engine.step
    engine.step = lambda: reports.append(step()) or reports[-1]
    got = run(engine, requests)
    return got.tokens, budget.drafts, sum(report.num_preempted for report in reports)


@pytest.mark.parametrize(("enough", "mostly"), [(7, 0.0), (32, 0.3), (10**9, 2.0)])
def test_drafts_do_not_depend_on_when_context_is_written(enough, mostly, monkeypatch):
    tokens, drafts, preempted = served(monkeypatch, 1, 0.0)  # all of it at once
    assert preempted > 0
    assert len(drafts) > 20
    assert served(monkeypatch, enough, mostly) == (tokens, drafts, preempted)


def observing(monkeypatch):
    """A drafter that is shown slots whose taps are all of one value; and what it has written, as (slots, taps)."""
    drafter = make_engine(golden_target(), golden_plan("dspark_vanilla"), page_size=8).drafter
    written = []

    def write(self, kept, positions, slots, *store):
        written.append((slots.tolist(), kept[slots, 0].tolist()))

    monkeypatch.setattr(type(drafter._head), "write_kept", write)
    monkeypatch.setattr(drafter, "_whole", False)  # which is one call with the pass over the block
    monkeypatch.setattr(drafter, "_in_parts", lambda batch: None)

    def observe(slots, value):
        slots = torch.tensor(slots)
        lens = (len(slots),)
        batch = SimpleNamespace(positions=slots, slots=slots, drafts=None, query_lens=lens, context_lens=lens)
        drafter.observe(batch, torch.full((len(slots), drafter._kept.shape[1]), float(value)), None)

    return drafter, observe, written


def row(start, *pages):
    request = make_request("r", [1, 2], temperature=0.0, max_tokens=1)
    request.token_ids, request.pages[:] = list(range(start + 1)), pages
    return Row(request, start, 1, True, 4)


def test_context_is_written_once_and_for_rows_that_draft_only(monkeypatch):
    drafter, observe, written = observing(monkeypatch)
    observe([16, 17, 18], 1.0)
    observe([24, 25], 2.0)
    assert written == []
    drafter.propose([row(2, 2), row(3, 2)])  # two rows that share a page
    assert written.pop() == ([16, 17, 18], [1.0] * 3)
    observe([19], 3.0)
    drafter.propose([row(4, 2)])
    assert written.pop() == ([19], [3.0])
    drafter.propose([row(4, 2)])
    assert written == []


def test_a_slot_with_a_new_owner_has_its_context(monkeypatch):
    drafter, observe, written = observing(monkeypatch)
    observe([16, 17], 1.0)
    observe([17], 2.0)  # the first owner never drafted
    drafter.propose([row(2, 2)])
    assert written.pop() == ([16, 17], [1.0, 2.0])
    observe([16], 3.0)  # this one did
    drafter.propose([row(2, 2)])
    assert written.pop() == ([16], [3.0])


def test_long_prompts_are_written_at_once_while_most_rows_draft(monkeypatch):
    drafter, observe, written = observing(monkeypatch)
    monkeypatch.setattr(module, "_ENOUGH", 4)
    observe([16, 17, 18, 19], 1.0)
    observe([24], 1.0)
    assert written == []  # nobody has drafted yet
    drafter.propose([row(1, 3)])  # one draft among many steps without
    assert written.pop() == ([24], [1.0])
    observe([32, 33, 34, 35], 1.0)
    assert written == []
    for slot in range(40, 48):
        drafter.propose([row(1, 3)])
        observe([slot], 1.0)
    observe([64, 65, 66, 67], 1.0)
    assert written.pop() == ([64, 65, 66, 67], [1.0] * 4)
