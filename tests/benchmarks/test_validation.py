"""benchmarks/validation.py: measured against simulated, with the machine's drift taken from the other arms.

The timings are made up, and what should come of them was computed by hand.
"""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspark_serve.cache.pages import PagePool
from dspark_serve.drafters.copies import Copies
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.speculation.calibrate import Calibrator
from dspark_serve.speculation.cost import Point, Profile
from dspark_serve.speculation.fixed import KeepAll
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.types import SamplingParams

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
load = importlib.import_module("load")
simulation = importlib.import_module("simulation")
validation = importlib.import_module("validation")
NONE, FULL, AUTO = load.NONE, load.FULL, load.AUTO

ITEMS = [load.Item((1,) * 17, 1.0, 10, seed) for seed in range(2)]
ROUND = simulation.Round(-1, "head", 1, (0.5, 0.5))  # two tokens come out
LONGER = simulation.Round(-1, "head", 2, (0.5, 0.5))  # three


class TenMs:
    """Every step takes 10 ms."""

    def step_ms(self, tokens, rows, context, greedy=False, draft_keys=0.0, silent=0):
        return 10.0


class Says:
    """A shadow of which all is known: what it simulates, in tokens per second, with a budget and without."""

    def __init__(self, whole, decided=None):
        self.whole, self.decided, self.traces = whole, decided, []

    def costs(self):
        return TenMs()

    def simulated(self, decides, trace, items, concurrency):
        assert items is ITEMS
        assert concurrency == 4
        self.traces.append(trace)
        return self.decided if decides else self.whole


def recording(took_ms, rounds=(ROUND, ROUND)):
    """Steps that took so long; ids as an engine gives them, which count up from anywhere."""
    seen = simulation.Recording(KeepAll(), simulation.Trace("head", 2))
    seen.steps = [simulation.Timed(1, 1, 17, False, 0, 0, ms) for ms in took_ms]
    seen.trace.rounds = {str(9 + index): [each] for index, each in enumerate(rounds)}
    return seen


def turn(rates, took_ms, rounds=(ROUND, ROUND)):
    return validation.Turn(
        ITEMS,
        dict(zip((NONE, FULL, AUTO), rates, strict=True)),
        {arm: recording(ms, rounds) for arm, ms in zip((NONE, FULL, AUTO), took_ms, strict=True)},
    )


def compared(*turns):
    drafting = Says(150.0, 180.0)
    table, trace = validation.compare([*turns], {NONE: Says(100.0), FULL: drafting, AUTO: drafting}, 4)
    return table, trace, drafting


def row(measured, simulated, slowdown, ratio, as_profiled):
    return pytest.approx(
        {
            "measured": measured,
            "simulated": simulated,
            "slowdown": slowdown,
            "ratio": ratio,
            "ratio_as_profiled": as_profiled,
        }
    )


def test_on_a_calm_machine_simulated_is_held_against_measured_as_it_is() -> None:
    table, _, _ = compared(turn((100.0, 120.0, 200.0), ([10.0, 10.0],) * 3))
    assert table[NONE] == row(100, 100, 1, 1, 1)
    assert table[FULL] == row(120, 150, 1, 1.25, 1.25)
    assert table[AUTO] == row(200, 180, 1, 0.9, 0.9)
    assert table["accepted_length"] == 2


def test_what_slows_one_arm_down_is_put_to_the_others_and_never_to_its_own() -> None:
    """Its own steps would explain away whatever the simulator has wrong about it. The plain arm's took twice as long
    as profiled; the budget's, however long, are nobody's measure: it is what is being judged."""
    table, _, _ = compared(turn((50.0, 100.0, 96.0), ([20.0, 20.0], [10.0], [70.0])))
    assert table[NONE] == row(50, 100, 1, 2, 2)  # the blocks' steps kept their time
    assert table[FULL] == row(100, 150, 2, 0.75, 1.5)
    assert table[AUTO] == row(96, 180, 1.5, 1.25, 1.875)  # the mean of both


def test_a_slowdown_is_all_time_over_all_time() -> None:
    """Of 60 ms said to take 30: the mean of the steps' own factors is 2 as well, that of their inverses is not."""
    table, _, _ = compared(turn((100.0, 60.0, 100.0), ([5.0, 5.0, 50.0], [10.0], [10.0])))
    assert table[FULL]["slowdown"] == pytest.approx(2)
    assert table[FULL]["ratio"] == pytest.approx(150 / 2 / 60)


def test_rounds_give_medians_of_each_figure_for_itself() -> None:
    """One arm's second round is disturbed; the medians know nothing of it but where they cannot help it."""
    table, trace, drafting = compared(
        turn((100.0, 150.0, 150.0), ([10.0], [10.0], [10.0])),
        turn((25.0, 300.0, 360.0), ([40.0], [10.0], [10.0])),
        turn((80.0, 100.0, 200.0), ([10.0], [20.0], [10.0]), (ROUND, LONGER)),
    )
    # Slowdown by round: 1, 1, 2. Ratio: 100/100, 100/25, 100/2/80.
    assert table[NONE] == row(80, 100, 1, 1, 1.25)
    # Slowdown: 1, 4, 1. Ratio: 150/150, 150/4/300, 150/100; as profiled: 1, 0.5, 1.5.
    assert table[FULL] == row(150, 150, 1, 1, 1)
    # Slowdown: 1, 2.5, 1.5. Ratio: 180/150, 180/2.5/360, 180/1.5/200 = 1.2, 0.2, 0.6; as profiled: 1.2, 0.5, 0.9.
    assert table[AUTO] == row(200, 180, 1.5, 0.6, 0.9)
    # Each round is simulated from its own trace, with requests by number; the last is given back.
    assert drafting.traces[0].rounds == {"0": [ROUND], "1": [ROUND]}
    assert drafting.traces[-1] is trace
    assert trace.rounds == {"0": [ROUND], "1": [LONGER]}
    assert table["accepted_length"] == 2.5


def test_acceptance_is_taken_from_the_arm_that_verified_whole_blocks() -> None:
    mixed = turn((100.0, 100.0, 100.0), ([10.0],) * 3)
    mixed.seen[AUTO].trace.rounds = {"9": [LONGER], "10": [LONGER]}
    mixed.seen[NONE].trace.rounds = {}
    assert compared(mixed)[1].rounds == {"0": [ROUND], "1": [ROUND]}


def test_ids_are_numbers_and_all_requests_must_have_drafted() -> None:
    trace = simulation.Trace("head", 2, {"10": [LONGER], "9": [ROUND]})  # by name "10" would come first
    assert validation.by_number(trace, 2).rounds == {"0": [ROUND], "1": [LONGER]}
    with pytest.raises(ValueError, match="ask for more new tokens"):
        validation.by_number(trace, 3)


@pytest.mark.parametrize(("ratio", "verdict"), [(1.099, "within"), (1.101, "NOT within"), (0.899, "NOT within")])
def test_the_verdict_goes_by_the_ratio_with_the_drift_taken_out(ratio, verdict, capsys) -> None:
    figures = {"measured": 100.0, "simulated": 300.0, "slowdown": 2.0, "ratio": ratio, "ratio_as_profiled": 1.0}
    validation.show(4, {**dict.fromkeys((NONE, FULL, AUTO), figures), "accepted_length": 2.0})
    said = capsys.readouterr().out
    assert said.count(f"ratio {ratio:.3f}, {verdict} 10%") == 3
    assert said.count("2.00 times slower    150.0") == 3


# --- shadows


def shadow(width, *profiles):
    """A shadow of a server of one row whose costs were measured with these outcomes."""
    real = Scheduler(
        PagePool(40, 8),
        max_num_seqs=1,
        max_num_batched_tokens=64,
        max_model_len=64,
        max_queue=8,
        vocab_size=2,
        draft_width=width,
    )
    engine = SimpleNamespace(scheduler=real, info=SimpleNamespace(drafter="portfolio"))
    calibrator = Calibrator("coupled", width, head="head", adaptive=frozenset({"ngram"})) if width else None
    made = validation.Shadow(engine, calibrator, 0.0)
    made._profiles.extend(profiles)
    return made


def test_costs_are_the_medians_of_all_measurements() -> None:
    """The cost model itself goes by the least of a shape that it is given more than once."""

    def profile(one, two, draft):
        return Profile((Point(1, 1, 0, one), Point(2, 1, 0, two)), (Point(1, 1, 0, draft),), (Point(1, 1, 0, one / 2),))

    costs = shadow(2, profile(9.0, 12.0, 1.0), profile(10.0, 40.0, 3.0), profile(30.0, 11.0, 2.0)).costs()
    assert [costs.step_ms(tokens, 1, 0) for tokens in (1, 2)] == pytest.approx([10, 12])
    assert costs.draft_ms(1, 0) == pytest.approx(2)
    assert costs.step_ms(1, 1, 0, greedy=True) == pytest.approx(5)


def test_a_shadow_serves_in_virtual_time_with_prompts_found_in_the_cache() -> None:
    """Ten tokens of the first request, none of the second, which only keeps the load up: nothing but decode steps."""
    plain = shadow(0, Profile((Point(1, 1, 0, 10.0), Point(17, 1, 0, 500.0))))
    assert plain.simulated(False, simulation.Trace("", 0, {"0": [ROUND]}), ITEMS, 1) == pytest.approx(100)


def test_a_shadow_drafts_what_was_recorded() -> None:
    """Five blocks of two drafts, the first of which is accepted; the last block may hold one: 4 x (4 + 16) + 4 + 13
    ms for ten tokens."""
    answer = [simulation.Round(at, "head", 1, (0.5, 0.5)) for at in range(-1, 9, 2)]
    drafting = shadow(2, Profile(tuple(Point(n, 1, 0, 7.0 + 3 * n) for n in (1, 2, 3)), (Point(1, 1, 0, 4.0),)))
    trace = simulation.Trace("head", 2, {"0": answer, "1": answer})
    assert drafting.simulated(False, trace, ITEMS, 1) == pytest.approx(10 / 0.097)


def test_every_budget_of_a_shadow_begins_anew() -> None:
    made = shadow(2, Profile((Point(1, 1, 0, 10.0),), (Point(1, 1, 0, 4.0),)))
    made._calibrator.own.lines(("somebody",))
    copies = Copies(2, 5)
    first, second = made.budget(copies), made.budget(copies)
    assert isinstance(first, AutoBudget)
    assert first.calibrator is not second.calibrator
    assert "somebody" not in first.calibrator.own
    kept = ("mode", "width", "stored", "head", "adaptive")
    assert [getattr(first.calibrator, name) for name in kept] == [getattr(made._calibrator, name) for name in kept]
    assert first.cost is not second.cost
    assert first.lookups is second.lookups is copies
    with pytest.raises(ValueError, match="drafts nothing"):
        shadow(0, Profile((Point(1, 1, 0, 10.0),))).budget(copies)


def test_requests_are_those_of_the_items() -> None:
    items = [load.Item((3, 4), 0.0, 5, 7), replace(ITEMS[0], seed=8)]
    first, second = validation._requests(items, "x-")
    assert (first.request_id, first.prompt_token_ids, first.seed) == ("x-0", (3, 4), 7)
    assert first.params == SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    assert (second.request_id, second.seed, second.params.temperature) == ("x-1", 8, 1.0)
