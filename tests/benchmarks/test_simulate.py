"""benchmarks/simulate.py: virtual time is the sum of the costs, replay is exact, budgets behave, bad input is named."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dspark_serve.cache.pages import PagePool
from dspark_serve.engine.scheduler import Scheduler
from dspark_serve.speculation.cost import CostModel, Point, Profile, save_profile
from dspark_serve.speculation.fixed import FixedBudget, KeepAll
from dspark_serve.types import Request, Row, SamplingParams
from tests import toy

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
simulate = importlib.import_module("simulate")
simulation = importlib.import_module("simulation")
synthetic_drafts = importlib.import_module("synthetic_drafts")
rooflines = importlib.import_module("rooflines")
validation = importlib.import_module("validation")

WORK = simulate.Work(requests=60, prompt_tokens=65, new_tokens=24)
COSTS = CostModel(Profile((Point(1, 1, 0, 1.0),)), 256, 16)


class Line:
    """A machine whose costs are easy to add up."""

    def step_ms(self, tokens, rows, context, greedy=False, draft_keys=0.0, silent=0):
        return 3.0 + 0.25 * tokens + 0.001 * context

    def draft_ms(self, rows, context, greedy=False):
        return 1.0 + 0.5 * rows


@pytest.fixture(scope="module")
def qwen():
    return simulate.roofline_scene("qwen3-8b", "h100", None, simulate.PAPER)


def scheduler(rows=4, width=4, **options):
    pool = PagePool(options.pop("pages", 400), options.pop("page_size", 8), options.pop("prefix_caching", True))
    limits = {"max_num_batched_tokens": 256, "max_model_len": 256, "max_queue": 100, "vocab_size": 2}
    return Scheduler(pool, max_num_seqs=rows, draft_width=width, **{**limits, **options})


def some_requests(count, tokens=20):
    params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)
    return [Request(str(index), (1,) * 9, params, seed=index) for index in range(count)]


def engine_of(budget, drafts, machine=None, **options):
    return simulation.SimulatedEngine(scheduler(**options), budget, drafts, machine or Line())


# --- virtual time


def test_virtual_time_is_the_sum_of_the_costs():
    engine = engine_of(FixedBudget(2), synthetic_drafts.SyntheticDrafts([0.5], 4, 0))
    expected_ms, requests = 0.0, some_requests(6)
    for request in requests:
        engine.scheduler.add(request)
    while engine.scheduler.has_work:
        seen = {request.request_id: request.num_computed for request in engine.scheduler.running}
        report = engine.step()
        drafting = sum(row.n_draft > 0 for row in report.rows)
        context = report.num_tokens - sum(row.n_kept for row in report.rows)
        context += sum(seen.values()) if seen else 0
        if not seen:  # the first four rows begin, one after another has its prompt's first page from the cache
            assert report.num_prefill_tokens == 4 * 9
        expected_ms += sum(report.phase_ms.values())
        assert report.phase_ms["propose"] == (1.0 + 0.5 * drafting if drafting else 0.0)
        if len(seen) == 4:
            assert report.phase_ms["forward"] == pytest.approx(3.0 + 0.25 * report.num_tokens + 0.001 * context)
    assert engine.now_ms == pytest.approx(expected_ms)
    engine.scheduler.check_integrity()
    assert [request.num_generated for request in requests] == [20] * 6


def test_noise_disturbs_durations_about_what_they_are():
    quiet, loud = (
        simulation.serve(simulation.SimulatedEngine(scheduler(), KeepAll(), drafts, Line(), noise), requests, 4)
        for noise, drafts, requests in (
            (noise, synthetic_drafts.SyntheticDrafts([0.5], 4, 0), some_requests(60)) for noise in (0.0, 0.1)
        )
    )
    assert loud.tokens == quiet.tokens
    assert loud.ms != quiet.ms
    assert loud.ms == pytest.approx(quiet.ms, rel=0.05)


def test_the_seed_decides(qwen):
    first, again, other = (simulate.run_cell(qwen, "budget", 8, replace(WORK, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first.ms != other.ms


def test_arms_face_the_same_drafts(qwen):
    """Where a budget keeps nearly every block whole, nearly the same drafts are accepted."""
    cells = [simulate.run_cell(qwen, arm, 2, replace(WORK, noise=0.0)) for arm in ("fixed 7", "budget")]
    assert cells[0].kept == pytest.approx(cells[1].kept, rel=0.01)
    assert cells[0].accepted == pytest.approx(cells[1].accepted, rel=0.001)


# --- drafts


@pytest.fixture
def recorded(tmp_path):
    """A trace of a simulated run with whole blocks, and how the run went."""
    drafts = synthetic_drafts.SyntheticDrafts([-0.5, 1.5], 4, seed=2, costly="head")
    seen = simulation.Recording(KeepAll(), simulation.Trace("head", 4))
    engine = engine_of(seen, drafts)
    outcome = simulation.serve(engine, some_requests(10), 4, drain=True)
    path = tmp_path / "trace.json"
    seen.trace.save(path)
    return path, seen.trace, outcome


def test_a_replayed_trace_gives_its_accepted_length(recorded):
    path, trace, outcome = recorded
    assert simulation.Trace.load(path) == trace
    again = simulation.serve(engine_of(KeepAll(), simulation.TracedDrafts(trace)), some_requests(10), 4, drain=True)
    assert again == outcome
    assert 1 + again.accepted / again.drafting == pytest.approx(trace.accepted_length)


def test_a_trace_goes_round_and_its_answers_begin_anew(recorded):
    _, trace, _ = recorded
    drafts = simulation.TracedDrafts(trace)
    longer = replace(some_requests(1, tokens=60)[0], request_id="another", arrival=13)
    own = trace.rounds["3"]
    end = own[-1].at + own[-1].accepted + 2  # the prompt's end has a place of its own
    for turn in range(3):
        for each in own:
            _, right = drafts.propose([Row(longer, 9 + each.at + turn * end, 1, True, 4)])
            assert right.tolist() == [each.accepted]


def test_rows_that_may_only_look_up_draft_where_a_lookup_did():
    rounds = [simulation.Round(0, "head", 1, (0.5, 0.5)), simulation.Round(2, "ngram", 2, (0.5, 0.5))]
    drafts = simulation.TracedDrafts(simulation.Trace("head", 2, {"0": rounds}))
    request = some_requests(1)[0]
    for start, count in ((9, 0), (11, 2)):
        proposal, _ = drafts.propose([Row(request, start, 1, True, 2, lookup_only=True)])
        assert proposal.n_draft == (count,)


def test_lookups_of_a_recording_promise_what_they_said_then():
    rounds = [simulation.Round(0, "head", 1, (0.9, 0.9)), simulation.Round(2, "ngram", 2, (0.9, 0.8, 0.7))]
    drafts = simulation.TracedDrafts(simulation.Trace("head", 3, {"0": rounds}))
    request = some_requests(1)[0]
    head, copying, ended = (Row(request, start, 1, True, most) for start, most in ((9, 3), (11, 3), (11, 0)))
    short = Row(request, 11, 1, True, 1)
    assert drafts.promised([head, copying, ended, short], 0.5) == [(1, pytest.approx([0.9, 0.72, 0.504])), (3, [0.9])]
    assert drafts.promised([head], 0.1) == []
    assert drafts.promised([copying], 0.91) == []


def test_the_simulated_engine_takes_the_steps_of_the_real_one():
    """Recorded on the real engine with a drafter that is right at times, replayed: equal step by step."""
    prompts = [[5, 6, 7, 8] * (2 + index) for index in range(5)]

    def fresh():
        return [
            toy.make_request(str(index), prompt, max_tokens=30, ignore_eos=True) for index, prompt in enumerate(prompts)
        ]

    truth = toy.run(toy.make_engine(toy.toy_model()), fresh()).tokens
    whole = {str(index): [*prompt, *truth[str(index)]] for index, prompt in enumerate(prompts)}
    engine = toy.make_engine(toy.toy_model(), toy.Oracle(whole, "mixed"), seqs=3, tokens=16, pages=40)
    seen = simulation.Recording(KeepAll(), simulation.Trace("Oracle", 4))
    engine.budget = seen
    twin = simulation.SimulatedEngine(
        scheduler(3, 4, pages=40, max_num_batched_tokens=16, max_model_len=engine.info.max_model_len, vocab_size=96),
        KeepAll(),
        simulation.TracedDrafts(seen.trace),
        Line(),
    )
    for request in fresh():
        engine.add(request)
    real = []
    while engine.has_work:
        report = engine.step()
        real.append((report.num_tokens, report.rows))
    twin.drafts = simulation.TracedDrafts(seen.trace)
    for request in fresh():
        twin.scheduler.add(request)
    for num_tokens, rows in real:
        report = twin.step()
        assert report.num_tokens == num_tokens
        assert [(row.n_draft, row.n_kept, row.n_accepted) for row in report.rows] == [
            (row.n_draft, row.n_kept, row.n_accepted) for row in rows
        ]
    assert not twin.scheduler.has_work
    assert any(row.n_accepted for _, rows in real for row in rows)


# --- machines


def test_experts_touched_by_a_step():
    network = rooflines.MODELS["flash-moe"].target
    draw = np.random.default_rng(0)
    one = network.layers * network.expert_params * network.expert_bytes
    dense = network.dense_params * network.dense_bytes
    assert network.bytes_read(1) == pytest.approx(dense + network.experts_used * one)
    for tokens in (4, 64):
        touched = np.mean(
            [
                len({e for _ in range(tokens) for e in draw.choice(network.experts, network.experts_used, False)})
                for _ in range(40)
            ]
        )
        assert network.bytes_read(tokens) == pytest.approx(dense + touched * one, rel=0.05)
    assert network.bytes_read(100_000) == pytest.approx(dense + network.experts * one)


def test_model_sizes_are_those_their_names_say():
    qwen, flash = rooflines.MODELS["qwen3-8b"].target, rooflines.MODELS["flash-moe"].target
    assert qwen.weight_bytes / 2 == pytest.approx(8.2e9, rel=0.02)
    assert flash.flops / 2 == pytest.approx(13e9, rel=0.03)
    stored = flash.dense_params + flash.stored_params + flash.layers * flash.experts * flash.expert_params
    assert stored == pytest.approx(284e9, rel=0.02)


def test_the_roofline_has_its_two_sides(qwen):
    machine = qwen.machine("none")
    bandwidth = 3350e9 * 0.8
    gaps_ms = (60 + 36 * 8) / 1e3
    assert machine.step_ms(1, 1, 0) == pytest.approx(machine.target.dense_params * 2 / bandwidth * 1e3 + gaps_ms)
    assert machine.step_ms(100, 1, 0) == machine.step_ms(1, 1, 0)  # reading takes longer than computing
    far = machine.step_ms(20_000, 20_000, 0) - machine.step_ms(10_000, 10_000, 0)
    assert far == pytest.approx(1e4 * machine.target.flops / (990e12 * 0.6) * 1e3)
    keys = machine.step_ms(1, 1, 100_000) - machine.step_ms(1, 1, 0)
    assert keys == pytest.approx(1e5 * 36 * 2 * 8 * 128 * 2 / bandwidth * 1e3)
    assert qwen.machine("budget").draft_ms(0, 0) == machine.draft_ms(5, 0) == 0.0


def test_a_better_device_is_faster_and_a_small_one_is_refused():
    h100, h200, spark = (
        simulate.roofline_scene("qwen3-8b", name, None, simulate.PAPER).machine("budget") for name in rooflines.DEVICES
    )
    assert h200.step_ms(8, 8, 1000) < h100.step_ms(8, 8, 1000) < spark.step_ms(8, 8, 1000)
    for device, count, message in (("h100", 1, "use more devices"), ("dgx-spark", 8, "cannot share")):
        with pytest.raises(ValueError, match=message):
            simulate.roofline_scene("flash-moe", device, count, simulate.PAPER)


def test_the_budget_starts_from_what_a_server_would_measure(qwen):
    machine = qwen.machine("budget")
    profile = simulate.sampled(machine, scheduler(16, 7, pages=4000), 7)
    assert {point.ms for point in profile.steps} <= {machine.step_ms(p.count, p.rows, p.context) for p in profile.steps}
    assert {1, 2, 4, 8, 16} <= {point.count for point in profile.drafts}
    far = simulate.sampled(machine, scheduler(16, 7, pages=4000, max_num_batched_tokens=900), 7, long_sweep=True)
    assert [p.count for p in far.steps if p.count > 128] == [512, 900]
    assert not simulate.sampled(qwen.machine("none"), scheduler(16, 0, pages=4000), 0).drafts


# --- what comes of it


def test_prompts_are_cached_unless_they_are_to_be_computed(qwen):
    cached, computed = (
        simulate.run_cell(qwen, "none", 8, replace(WORK, prefill=prefill, noise=0.0, prompt_tokens=1025))
        for prefill in (False, True)
    )
    assert computed.tokens_per_s < 0.95 * cached.tokens_per_s


def test_the_budget_shrinks_with_the_load_and_earns_its_keep(qwen):
    found = simulate.sweep_loads(qwen, ["fixed 1", "fixed 3", "fixed 5", "fixed 7", "budget"], [8, 64], WORK, 1)
    verified = [by["budget"]["verified_per_row"] for by in found.values()]
    assert verified[0] > verified[1] + 1
    for by in found.values():
        rates = {arm: row["tokens_per_s"] for arm, row in by.items()}
        assert rates["budget"] > 0.98 * rates["none"]
        assert rates["budget"] > 0.97 * max(rate for arm, rate in rates.items() if arm.startswith("fixed"))


def test_hopeless_drafts_cost_next_to_nothing():
    scene = simulate.roofline_scene("qwen3-8b", "h100", None, (1.02,))
    none, budget = (simulate.run_cell(scene, arm, 32, replace(WORK, requests=200)) for arm in ("none", "budget"))
    assert budget.tokens_per_s > 0.97 * none.tokens_per_s
    assert budget.drafting < 0.1 * budget.row_steps


def test_speed_at_equal_throughput():
    found = {
        "1": {"a": {"tokens_per_s": 10.0, "per_user": 10.0}, "b": {"tokens_per_s": 15.0, "per_user": 15.0}},
        "4": {"a": {"tokens_per_s": 20.0, "per_user": 5.0}, "b": {"tokens_per_s": 40.0, "per_user": 10.0}},
    }
    assert simulate.faster_at_equal_throughput(found, "b", "a") == {"1": pytest.approx(15.0 / 7.5)}


def run_main(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["simulate.py", *map(str, arguments)])
    simulate.main()


def test_the_program_says_that_it_is_a_simulation(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out.json"
    small = ["--requests", 8, "--new-tokens", 16, "--concurrency", 1, 4]
    run_main(["--models", "qwen3-8b", "--arms", "mtp-1", "fixed 3", "budget", *small, "--json", out], monkeypatch)
    said, stored = capsys.readouterr().out, json.loads(out.read_text())
    assert said.startswith("SIMULATION")
    assert stored["simulation"] is True
    scene = stored["scenes"]["qwen3-8b"]
    assert set(scene["loads"]["4"]) == {"none", "mtp-1", "fixed 3", "budget"}
    assert set(scene["verified_per_row"]) == {"1", "4"}
    assert "bandwidth_gb_s" in stored["assumptions"]["device"]


def test_a_profile_and_a_trace_take_the_place_of_the_roofline(monkeypatch, capsys, tmp_path, recorded):
    profile = Profile(tuple(Point(n, 1, 0, 5.0 + n) for n in range(1, 65)), (Point(1, 1, 0, 1.0), Point(8, 8, 0, 2.0)))
    key = {"model": "m", "device": "d", "threads": 1, "dtype": "float32", "width": 4}
    save_profile(tmp_path / "profile.json", key, profile)
    # Fewer jobs than cells, and more than one.
    arguments = ["--profile", tmp_path / "profile.json", "--trace", recorded[0], "--requests", 8, "--new-tokens", 16]
    arguments += ["--concurrency", 2, "--arms", "fixed 2", "budget", "--noise", 0]
    run_main([*arguments, "--json", tmp_path / "a"], monkeypatch)
    run_main([*arguments, "--jobs", 2, "--json", tmp_path / "b"], monkeypatch)
    one, two = (json.loads((tmp_path / name).read_text())["scenes"]["profile"]["loads"]["2"] for name in "ab")
    assert one == two
    assert one["none"]["tokens_per_s"] == pytest.approx(2e3 / 7)
    assert one["fixed 2"]["verified_per_row"] > 2.5


def broken(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no acceptance trace"),
        ('{"format": 9}', "format 9 is not 1"),
        ('{"format": 1, "costly": "head", "width": 2, "rounds": {}}', "without rounds, or none at all"),
        ('{"format": 1, "costly": "head", "width": 2, "rounds": {"0": [[0, "head", 3, [0.5], []]]}}', "3 of 1 drafts"),
    ],
)
def test_bad_traces_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        simulation.Trace.load(broken(tmp_path / "t.json", text))


def test_bad_options_are_named(monkeypatch, capsys, tmp_path, recorded):
    for text in ("[]", '{"key": {"width": 4, "model": "m", "device": "d", "threads": 1, "dtype": "f"}, "format": 0}'):
        with pytest.raises(ValueError, match="is no cost profile"):
            simulate.profile_scene(broken(tmp_path / "p.json", text), simulate.PAPER, None)
    with pytest.raises(ValueError, match="--trace needs --profile"):
        run_main(["--trace", recorded[0]], monkeypatch)
    with pytest.raises(ValueError, match="no such arm here: fixed 9"):
        run_main(["--arms", "fixed 9"], monkeypatch)
    with pytest.raises(ValueError, match="at least 1"):
        simulate.Work(requests=0)
    with pytest.raises(ValueError, match="too few requests for concurrency 4"):
        simulation.serve(engine_of(KeepAll(), synthetic_drafts.SyntheticDrafts([0.5], 4, 0)), some_requests(2), 4)
    for arguments in (["--concurrency", "0"], ["--record", "x"], ["--device", "abacus"]):
        with pytest.raises(SystemExit):
            run_main(arguments, monkeypatch)
