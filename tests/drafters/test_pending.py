"""Context that is written later is there when a draft needs it: pauses, preemption and shared pages change no draft."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dspark_serve.drafters import dspark as module
from dspark_serve.speculation.policies import KeepAll
from tests.drafters.golden import golden_plan, golden_runs, golden_target
from tests.toy import make_engine, make_request, run


class Sometimes(KeepAll):
    """Drafts in one step of four; remembers what was drafted, by request and position."""

    def __init__(self):
        self.steps, self.drafts = 0, {}

    def admit(self, plan):
        self.steps += 1
        if self.steps % 4:
            return replace(plan, rows=tuple(replace(row, max_drafts=0) for row in plan.rows))
        return plan

    def choose(self, plan, proposal):
        for row, tokens in zip(plan.drafting, proposal.tokens.tolist(), strict=True):
            self.drafts[row.request.request_id, row.start] = tokens
        return proposal.n_draft


def served(enough, monkeypatch):
    monkeypatch.setattr(module, "_ENOUGH", enough)
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


@pytest.mark.parametrize("enough", [7, 32, 10**9])
def test_drafts_do_not_depend_on_when_context_is_written(enough, monkeypatch):
    tokens, drafts, preempted = served(1, monkeypatch)
    assert preempted > 0
    assert len(drafts) > 20
    assert served(enough, monkeypatch) == (tokens, drafts, preempted)


def test_a_slot_with_a_new_owner_is_written_twice_in_order(monkeypatch):
    drafter = make_engine(golden_target(), golden_plan("dspark_vanilla")).drafter
    written = []
    monkeypatch.setattr(type(drafter._head), "write_context", lambda self, taps, pos, slots, *a: written.append(slots))

    def observe(*slots):
        slots = torch.tensor(slots)
        batch = SimpleNamespace(positions=slots, slots=slots, drafts=torch.empty(len(slots), 0))
        drafter.observe(batch, torch.zeros(len(slots), 3), None)

    observe(20, 21)
    observe(22)
    assert written == []
    observe(30, 21)
    assert [part.tolist() for part in written] == [[20, 21, 22]]
    observe(*range(40, 40 + module._ENOUGH))
    assert [part.tolist() for part in written[1:]] == [[30, 21, *range(40, 40 + module._ENOUGH)]]
