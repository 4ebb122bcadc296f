"""Facts about the last few batches, which the budget remembers: which of them, for how long, and that nothing hangs on
it but time."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_serve.speculation import members as members_module
from dspark_serve.speculation.members import Batches, Members
from dspark_serve.speculation.per_request import PerRequest
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.types import Plan, Request, Row, SamplingParams
from tests.speculation.virtual_server import WIDTH, Repeats, Server, budget, cheap, cost, drafting

REQUESTS = [Request(f"r{n}", (1,), SamplingParams(), seed=n) for n in range(8)]


def who(made: AutoBudget, *numbers: int) -> Members:
    return made._batches.of(tuple(Row(REQUESTS[n], 99, 1, True, WIDTH) for n in numbers))


def remembered(made: AutoBudget) -> list[str]:
    """Batches by the numbers of their requests, the least recently used first."""
    return ["".join(request.request_id[1:] for request in batch) for batch in made._batches._members]


def test_the_batch_that_was_not_used_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "_BATCHES", 3)
    made = budget(cost(cheap, drafting))
    first = who(made, 0)
    who(made, 0, 1)
    who(made, 1, 0)  # another batch: arrays are in its order
    assert remembered(made) == ["0", "01", "10"]
    assert who(made, 0) is first
    assert remembered(made) == ["01", "10", "0"]
    who(made, 2)
    assert remembered(made) == ["10", "0", "2"]  # not the first that came, which was asked for since
    assert who(made, 0) is first
    again = who(made, 0, 1)
    assert (again.requests, len(again.ranges)) == (("r0", "r1"), 2)
    assert remembered(made) == ["2", "0", "01"]


def test_never_more_batches_than_that_and_none_of_a_request_that_is_gone() -> None:
    made = budget(cost(cheap, drafting))
    for n in range(len(REQUESTS)):
        who(made, n)
        assert len(made._batches._members) == min(n + 1, members_module._BATCHES)
    made.release("r0")
    assert not made._batches._members
    # The same id again, for another request: its facts are its own.
    greedy = Request("r7", (1,), SamplingParams(temperature=0.0), seed=7)
    members = made._batches.of((Row(greedy, 99, 1, True, WIDTH),))
    assert members.greedy
    assert members.batch == (greedy,)


def test_a_new_request_of_a_known_id_is_not_taken_for_the_old_one() -> None:
    """Even where nobody was told that the old one is gone: batches are known by their requests, not by names."""
    made = budget(cost(cheap, drafting))
    assert not who(made, 3).greedy
    assert made._batches.of(
        (Row(Request("r3", (1,), SamplingParams(temperature=0.0), seed=3), 99, 1, True, WIDTH),)
    ).greedy


def decisions(batches: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[list[int]], int]:
    """What a budget that remembers so many batches decides while batches of a few requests come by turns."""
    monkeypatch.setattr(members_module, "_BATCHES", batches)
    made, most = budget(cost(cheap, drafting), lookups=Repeats(0.3)), 0
    server = Server(made, cheap, drafting, [0.9, 0.6, 0.3, 0.1, 0.05, 0.02], spread=1.0, found=0.3)
    everyone = list(server.requests)
    for turn in range(60):
        first, rows = turn * 5 % 6, 1 + turn * 7 % 6
        server.requests = [*everyone, *everyone][first : first + rows]
        for _ in range(1 + turn % 4):
            server.step()
            most = max(most, len(made._batches._members))
    return server.drafted, server.kept, most


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.0, 1.0)])
def test_a_part_of_a_batch_is_like_a_batch_of_its_own(temperatures: tuple[float, float]) -> None:
    requests = [Request(f"r{n}", (1,), SamplingParams(temperature=temperatures[n % 2]), seed=n) for n in range(8)]
    rows = tuple(Row(request, 99, 1, True, WIDTH) for request in requests)
    own = PerRequest()
    batches = Batches(own)
    everyone = batches.of(rows)
    own.lines(everyone.requests)
    for chosen in (np.array([True, False] * 4), np.array([False, True] * 4), np.arange(8) > 2, np.zeros(8, dtype=bool)):
        some = batches.part([row for row, mine in zip(rows, chosen, strict=True) if mine], everyone, chosen)
        alone = Members.of(tuple(request for request, mine in zip(requests, chosen, strict=True) if mine))
        assert (some.batch, some.requests, some.greedy) == (alone.batch, alone.requests, alone.greedy)
        assert some.ranges.tolist() == alone.ranges.tolist()
        every = np.arange(len(some.requests))
        assert {level: every[index].tolist() for level, index in some.by_range.items()} == {
            level: every[index].tolist() for level, index in alone.by_range.items()
        }
        assert own._asked[some.requests].tolist() == np.flatnonzero(chosen).tolist()
        same = [rows[n] for n in np.flatnonzero(chosen)]
        assert batches.part(same, everyone, chosen) is some
        if same:  # one of them has ended meanwhile
            assert batches.part(same[1:], everyone, chosen).requests == some.requests[1:]
    batches.release("r0")
    assert batches.part(rows[:2], everyone, np.arange(8) < 2) is not some


def test_decisions_do_not_hang_on_what_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are the fewest: a step is of the rows that may draft and, if not all are let, of those that do."""
    drafted, kept, most = decisions(1000, monkeypatch)
    assert most > 4  # so that the others have to forget
    assert len(set(drafted)) > 2  # and there is something to decide
    for batches in (2, 4):
        assert decisions(batches, monkeypatch) == (drafted, kept, batches)


def test_a_plan_of_no_rows_that_draft_is_a_batch_like_any_other() -> None:
    made = budget(cost(cheap, drafting))
    plan = Plan((Row(REQUESTS[0], 0, 5, False),))
    assert made.admit(plan) is plan
    assert remembered(made) == [""]
