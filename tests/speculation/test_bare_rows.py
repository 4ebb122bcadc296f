"""A plan's rows without drafts: the same whoever makes them, and never those of another plan."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_serve.cache.pages import PagePool
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.types import Plan, Request, Row, RowResult, SamplingParams
from tests.speculation.virtual_server import Repeats, Server, budget, cheap, cost, drafting

REQUESTS = [Request(f"r{n}", (1, 2), SamplingParams(), seed=n) for n in range(4)]
ROWS = st.builds(
    Row,
    request=st.sampled_from(REQUESTS),
    start=st.integers(0, 9),
    length=st.integers(1, 9),
    samples=st.booleans(),
    max_drafts=st.integers(0, 5),
    lookup_only=st.booleans(),
)


def without_drafts(plan: Plan) -> tuple[Row, ...]:
    return tuple(row._replace(max_drafts=0, lookup_only=False) for row in plan.rows)


@settings(deadline=None)
@given(st.lists(ROWS, max_size=6).map(tuple))
def test_bare_rows_are_the_rows_without_drafts(rows: tuple[Row, ...]) -> None:
    plan = Plan(rows)
    assert plan.bare == without_drafts(plan)
    assert Plan(plan.bare).bare == plan.bare
    assert Plan(rows, known_bare=plan.bare).bare is plan.bare
    assert plan.drafting == tuple(row for row in rows if row.max_drafts)


def checked(plan: Plan) -> Plan:
    assert plan.bare == without_drafts(plan)
    assert plan.known_bare in ((), without_drafts(plan))
    return plan


class Watched(AutoBudget):
    """Looks at every plan before and after it is decided who drafts."""

    plans = 0
    changed = 0

    def admit(self, plan: Plan) -> Plan:
        found = checked(super().admit(checked(plan)))
        assert [row.request for row in found.rows] == [row.request for row in plan.rows]
        assert without_drafts(found) == without_drafts(plan)
        self.plans += 1
        self.changed += found is not plan
        return found


def test_a_budget_hands_on_bare_rows_of_the_plan_at_hand() -> None:
    """Anchors move on from step to step, and some rows draft, look up or do neither."""
    plain = budget(cost(cheap, drafting))
    watched = Watched(plain.cost, plain.calibrator, drafter="head", costly="head", lookups=Repeats(0.3))
    server = Server(watched, cheap, drafting, [0.9, 0.05, 0.02], found=0.3)
    server.run(150)
    assert watched.plans == 150
    assert watched.changed > 30


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_the_scheduler_knows_the_bare_rows_of_its_own_plans(seed: int) -> None:
    """Chunks of prompts, rows near their last token, preemption and cancellation included."""
    draw = random.Random(seed)
    scheduler = Scheduler(
        PagePool(12, 4),
        max_num_seqs=4,
        max_num_batched_tokens=10,
        max_model_len=40,
        max_queue=20,
        vocab_size=9,
        draft_width=3,
    )
    for n in range(8):
        prompt = tuple(draw.choices(range(9), k=draw.randint(1, 15)))
        scheduler.add(Request(f"r{n}", prompt, SamplingParams(max_tokens=draw.randint(1, 12)), seed=n))
    for _ in range(400):
        if not scheduler.has_work:
            return
        plan = checked(scheduler.plan())
        results = []
        for row in plan.rows:
            came = draw.randint(0, row.max_drafts)
            results.append(RowResult((1,) * (came + 1), row.max_drafts, row.max_drafts) if row.samples else RowResult())
        scheduler.commit(plan, results)
        if draw.random() < 0.03:
            scheduler.cancel(f"r{draw.randrange(8)}")
    raise AssertionError("the scheduler makes no progress")
