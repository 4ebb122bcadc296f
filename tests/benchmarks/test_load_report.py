"""benchmarks/load.py and load_report.py: what a run comes to, on rounds made up so that the figures are known."""

import importlib
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspark_serve.drafters.ngram import NgramDrafter
from dspark_serve.drafters.portfolio import PortfolioDrafter

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
load = importlib.import_module("load")
load_report = importlib.import_module("load_report")


def served(tokens, per_user=(1.0,), kept=(0.0,), misses=(), took_ms=0.0, plain_ms=0.0):
    return load.Served(2.0, tokens, {}, list(per_user), list(kept), list(misses), took_ms, plain_ms)


def test_ratios_are_of_the_same_round() -> None:
    """The machine is three times as fast in the second round: the ratio of medians would say 1.5."""
    plain = [served(20, [10.0, 20.0]), served(60, [40.0]), served(24, [12.0])]
    arm = [
        served(22, [30.0], [1.0, 3.0], [0.1], took_ms=10.0, plain_ms=12.0),
        served(54, [20.0], [4.0], [0.3, 0.2]),
        served(36, [18.0, 30.0], [0.0]),
    ]
    row = load._row(arm, plain)
    assert row["tokens_per_s"].median == 18
    assert [row["of_none"].low, row["of_none"].median, row["of_none"].high] == pytest.approx(
        [1.0, 1.1, 1.3]
    )  # quartiles
    assert row["per_user"].median == 24
    assert row["per_user_of_none"].median == 2  # 30/15, 20/40, 24/12
    assert row["kept_per_row"] == 2
    assert row["predicted_off"] == 0.2
    assert row["estimate_of_none"].median == 1.2  # of the one round whose budget predicted
    assert (load._row(plain, plain)["predicted_off"], load._row(plain, plain)["estimate_of_none"]) == (None, None)


@pytest.mark.parametrize(
    ("a", "b", "agree"),
    [
        ({0: [1, 2, 3]}, {0: [1, 2]}, True),  # one has not come as far
        ({0: [1, 2], 1: [5]}, {0: [1, 2]}, True),
        ({0: [1, 2]}, {0: [1, 3]}, False),
        ({0: [1], 1: [5, 6]}, {0: [1], 1: [4]}, False),
    ],
)
def test_texts_are_compared_as_far_as_both_have_come(a, b, agree) -> None:
    assert load._agree(load.Served(texts=a), load.Served(texts=b)) is agree
    assert load._agree(load.Served(texts=b), load.Served(texts=a)) is agree


def portfolio():
    return PortfolioDrafter(NgramDrafter(4), SimpleNamespace(taps=(), width=4), "head")


def test_every_round_has_engines_of_its_own_with_what_those_before_learned() -> None:
    arms, built = object.__new__(load.Arms), []
    arms._arms = {name: {"budget": name} for name in ("none", "fixed 1", "budget")}
    arms._engine = lambda speculation: (
        built.append(speculation["budget"]) or SimpleNamespace(budget=object(), drafter=portfolio())
    )
    arms.engines = {name: arms._engine(speculation) for name, speculation in arms._arms.items()}
    before, orders, draw = dict(arms.engines), set(), random.Random(0)
    for _ in range(8):
        arms.renew(draw)
        orders.add(tuple(built[-3:]))
    assert len(orders) > 1
    assert all(sorted(order) == sorted(arms._arms) for order in orders)
    assert list(arms.engines) == list(before)
    for name, engine in arms.engines.items():
        assert engine is not before[name]
        assert engine.budget is before[name].budget
        assert engine.drafter is not before[name].drafter
        assert engine.drafter.acceptance is before[name].drafter.acceptance
        assert engine.drafter.copies is before[name].drafter.copies


def cell(same_text=True, **gains):
    return {"same_text": same_text, **{arm: {"of_none": {"median": gain}} for arm, gain in gains.items()}}


def test_a_conclusion_names_the_cells_that_break_a_promise(capsys) -> None:
    """Of the best fixed number: 1.1/1.2, 0.97/0.9, 1.2/1.2, 1.01/1."""
    result = {
        "chat": {"1": cell(none=1, fixed=1.2, full=1.0, budget=1.1), "8": cell(none=1, fixed=0.9, budget=0.97)},
        "hostile": {"1": cell(none=1, full=1.2, budget=1.2), "8": cell(False, none=1, fixed=1.0, budget=1.01)},
    }
    load_report.conclude(result)
    said = capsys.readouterr().out
    assert "texts: DIFFER in hostile at 8" in said
    assert "budget / no speculation: 0.970 to 1.200; BELOW 0.98 in chat at 8: 0.970" in said
    assert "mean at concurrency 1: 1.150\n" in said
    assert "mean at concurrency 8: 0.990   BELOW 1" in said
    assert "best fixed number of drafts: 0.917 to 1.078; BELOW 0.97 in chat at 1: 0.917\n" in said


def test_a_conclusion_without_faults_and_one_without_the_budget(capsys) -> None:
    load_report.conclude({"chat": {"1": cell(none=1, full=1.0, budget=1.0)}})
    said = capsys.readouterr().out
    assert "identical in all of 1 cells" in said
    assert said.count("nowhere below") == 2
    assert "BELOW 1" not in said
    load_report.conclude({"chat": {"1": cell(none=1, full=1.0)}})
    assert "budget" not in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "at_once", "count"), [(None, 4, 12), (None, 8, 16), (40, 8, 40)])
def test_a_round_has_as_many_requests_as_are_asked_for(asked, at_once, count):
    rounds = []

    def serve_all(items, arrivals_s, most, draw, drain=True):
        rounds.append((len(items), len(arrivals_s), most))
        return {"none": served(20)}

    arms = SimpleNamespace(engines={"none": None}, renew=lambda draw: None, serve_all=serve_all)
    load.compare(arms, load.Workload([(1, 2, 3)], (0.0, 1.0), 8), at_once, 2, False, asked)
    assert rounds == [(count, count, at_once)] * 4  # into the prefix cache first


def test_a_round_of_no_more_requests_than_are_served_at_once_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["load.py", "--concurrency", "1", "8", "--requests", "8"])
    with pytest.raises(SystemExit):
        load.main()
    assert "more than 8 are needed" in capsys.readouterr().err
