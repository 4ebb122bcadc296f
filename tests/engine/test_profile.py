"""Profiles: measured through the real parts on scratch pages, once; and the budget that they are made for, at work."""

import logging
from types import SimpleNamespace

import pytest

from dspark_serve.config import load_config
from dspark_serve.drafters.rows import DraftRows
from dspark_serve.engine import build, profile
from dspark_serve.engine import clock as steps
from dspark_serve.engine.build import build_engine
from dspark_serve.engine.profile import Rig, Shape, shapes, sweep
from dspark_serve.llm import LLM, SamplingParams
from dspark_serve.speculation.cost import Point, Profile
from dspark_serve.speculation.fixed import KeepAll
from dspark_serve.speculation.policies import AutoBudget
from dspark_serve.types import SpeculationParams
from tests.drafters.golden import GOLDENS, golden_runs
from tests.toy import make_engine, make_request, run, toy_model

TARGET = str(GOLDENS / "target")
PROMPTS = [{"prompt_token_ids": run["input_ids"]} for run in golden_runs("dflash")[::2]]
OPTIONS = {"model": TARGET, "head": str(GOLDENS / "dspark_vanilla"), "kv_cache_gib": 0.01, "max_num_seqs": 8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    return tmp_path / "profiles"


def rig(**options):
    engine = make_engine(toy_model(), **options)
    return Rig(engine.info, engine.scheduler, engine.drafter, engine.batcher, engine.runner), engine


class Ticks:
    """A clock that goes on by so many seconds with every look at it."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def __call__(self):
        self.now += self.seconds
        return self.now


@pytest.fixture
def cheap_drafts(monkeypatch):
    """A machine on which it drafts: drafting is free, at the start and in every step. Nothing is measured."""
    found = Profile(tuple(Point(n, 1, 100, 4.0 + 0.02 * n) for n in (1, 4, 16, 64)))
    monkeypatch.setattr(build, "machine_profile", lambda *args, **options: found)
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=Ticks(0.001)))


def test_a_sweep_measures_steps_and_drafts_and_leaves_nothing_behind():
    engine = build_engine(load_config({**OPTIONS, "budget": "full", "kv_cache_gib": 0.03}))
    parts = Rig(engine.info, engine.scheduler, engine.drafter, engine.batcher, engine.runner)
    free = engine.scheduler.pool.num_available
    found = sweep(parts, "dspark", 1.0, Ticks(1e-6))
    assert engine.scheduler.pool.num_available == free
    engine.check_integrity()
    assert {p.rows for p in found.drafts} == {1, 2, 4, 8}
    assert {(1, 1), (8, 1), (8, 8), (32, 4)} <= {(p.count, p.rows) for p in found.steps}
    assert all(p.usable for p in (*found.steps, *found.drafts))
    assert sweep(parts, None, 0.1).drafts == ()


def test_drafts_are_measured_greedy_and_drawn(monkeypatch):
    """By turns, each as it is asked for: what is remembered of requests must not make one pass for the other."""
    engine = build_engine(load_config({**OPTIONS, "budget": "full", "kv_cache_gib": 0.03}))
    found, make = [], DraftRows.build

    def seen(*args):
        batch = make(*args)
        found.append((batch.sampling.all_greedy, set(batch.sampling.temperature.tolist())))
        return batch

    monkeypatch.setattr(DraftRows, "build", staticmethod(seen))
    parts = Rig(engine.info, engine.scheduler, engine.drafter, engine.batcher, engine.runner)
    sweep(parts, "dspark", 1.0, Ticks(1e-6))
    assert len(found) > 8
    assert found == [(True, {0.0}), (False, {1.0})] * (len(found) // 2)


def test_every_draft_is_measured_after_a_step(monkeypatch):
    """A draft right after a draft finds its weights in the caches, which no step leaves there."""
    engine, order = build_engine(load_config({**OPTIONS, "budget": "full", "kv_cache_gib": 0.03})), []
    for part, name in ((engine.runner, "run"), (engine.drafter, "propose")):
        original = getattr(part, name)
        monkeypatch.setattr(part, name, lambda *args, o=original, n=name: order.append(n) or o(*args))
    sweep(Rig(engine.info, engine.scheduler, engine.drafter, engine.batcher, engine.runner), "dspark", 1.0, Ticks(1e-6))
    drafts = [place for place, name in enumerate(order) if name == "propose"]
    assert len(drafts) > 8
    assert all(order[place - 1] == "run" for place in drafts)


def test_an_engine_serves_as_before_after_a_sweep():
    parts, engine = rig()
    wanted = run(make_engine(toy_model()), [make_request("a", range(5, 25), max_tokens=12)])
    sweep(parts, None, 0.1)
    assert run(engine, [make_request("a", range(5, 25), max_tokens=12)]) == wanted


def test_a_sweep_keeps_to_its_time():
    parts, _ = rig(seqs=64, tokens=512, pages=2000)
    everything, slow = len(shapes(parts)), Ticks(0.5)
    found = sweep(parts, None, 20.0, slow)
    assert 2 <= len(found.steps) < everything  # a slow machine measures less, the small steps first
    assert slow.now < 20 + 3
    assert min(p.count for p in found.steps) == 1
    quick = sweep(parts, None, 20.0, Ticks(1e-6))
    assert len(quick.steps) == everything


def test_shapes_fit_where_they_are_measured():
    for options in ({"pages": 8, "seqs": 1}, {"pages": 4, "length": 24}, {"tokens": 16}, {"pages": 2}):
        parts, engine = rig(**options)
        for shape in shapes(parts):
            assert shape.rows <= engine.scheduler.max_num_seqs
            assert shape.tokens <= engine.scheduler.max_num_batched_tokens
        found = sweep(parts, None, 0.05)
        assert found.steps
    assert Shape(4, 2, 128).tokens == 12
    assert Shape(4, 2, 128).keys == 4 * 129
    assert Shape(4, 2, 128).draft_keys == 4 * 129 * 2  # a draft sees what its row does


def test_prompts_are_measured_up_to_the_most_tokens_of_a_step():
    """Beyond the last measured point times are extrapolated, so there is one at every doubling."""

    def chunks(**options):
        return {(s.rows, s.chunk) for s in shapes(rig(pages=4000, **options)[0]) if s.chunk > 1}

    assert chunks(tokens=2048, length=4096) == {(1, n) for n in (32, 128, 512, 1024, 2048)}
    assert chunks(tokens=300, length=4096) == {(1, 32), (1, 128), (1, 256)}
    # Rows that cannot be that long: the longest that fits, and several of them.
    assert chunks(tokens=256, length=100) == {(1, 32), (1, 64), (2, 64), (4, 64)}
    assert chunks(tokens=256, length=24) == {(1, 16), (2, 16), (8, 16), (16, 16)}
    assert chunks(tokens=512, length=4096, chunk=64) == {(1, 32), (1, 64), (2, 64), (8, 64)}
    parts, _ = rig(pages=400, tokens=64, length=24)
    assert 64 in {p.count for p in sweep(parts, None, 1.0, Ticks(1e-6)).steps}


def test_a_long_prompt_that_does_not_fit_the_time_is_left_out(monkeypatch):
    """A step is not begun if it would end too late, going by the one before: also in the first pass."""
    parts, clock = rig(pages=4000, tokens=2048, length=4096)[0], Ticks(0.0)

    def measure(rig, shape, costly, clock):
        clock.now += 0.001 * shape.tokens
        return profile._Times(0.0, 0.0, shape.tokens, shape.tokens)

    monkeypatch.setattr(profile, "_measure", measure)
    assert max(p.count for p in sweep(parts, None, 100.0, clock).steps) == 2048
    clock.now = 0.0
    assert max(p.count for p in sweep(parts, None, 3.0, clock).steps) in (512, 1024)
    assert clock.now <= 3.0


def test_what_is_measured_in_a_disturbed_moment_does_not_count(monkeypatch):
    """For some moments all steps take five times as long: shapes that were measured then are measured again."""
    parts, clock = rig(pages=400)[0], Ticks(0.0)
    slow = {4, 5, 6, 7, 20, 21, 50, 51, 52, 53, 54, 55}  # of the smallest steps in between
    paced, measured = [], []

    def smallest(rig, clock):
        paced.append(5.0 if len(paced) in slow else 1.0 + 0.1 * (len(paced) % 2))
        return paced[-1]

    def measure(rig, shape, costly, clock):
        ms = 5.0 * shape.tokens if {len(paced) - 1, len(paced)} & slow else 1.0 * shape.tokens
        measured.append(shape)
        return profile._Times(0.0, 0.0, ms, ms)

    monkeypatch.setattr(profile, "_smallest_ms", smallest)
    monkeypatch.setattr(profile, "_measure", measure)
    # One pass, in which some shapes meet such a moment, and another for those.
    monkeypatch.setattr(profile, "_PASSES", 0)
    found = sweep(parts, None, 100.0, clock)
    assert all(point.ms == point.count for point in found.steps)
    count = len(shapes(parts))
    assert len(measured) > count
    assert sum(n == 1 for n in [measured.count(shape) for shape in set(measured)]) > count / 3
    monkeypatch.setattr(profile, "_MORE_PASSES", 0)
    paced.clear()
    once = sweep(parts, None, 100.0, clock)  # a shape that was never measured otherwise keeps what it has
    assert {point.ms / point.count for point in once.steps} == {1.0, 5.0}


def test_a_profile_is_measured_once_for_what_it_holds_for(own_cache, monkeypatch):
    assert isinstance(build_engine(load_config(OPTIONS)).budget, AutoBudget)
    assert len(list(own_cache.iterdir())) == 1
    monkeypatch.setattr(profile, "sweep", lambda *args: pytest.fail("it was measured already"))
    engine = build_engine(load_config(OPTIONS))
    assert isinstance(engine.budget, AutoBudget)
    with pytest.raises(pytest.fail.Exception):
        build_engine(load_config({**OPTIONS, "head": str(GOLDENS / "eagle3")}))


def test_a_damaged_profile_is_measured_again_with_one_warning(own_cache, caplog):
    build_engine(load_config(OPTIONS))
    [path] = own_cache.iterdir()
    good = path.read_text()
    path.write_text(good[:50])
    with caplog.at_level(logging.WARNING):
        build_engine(load_config(OPTIONS))
    assert [record.message for record in caplog.records if "profile" in record.message] != []
    assert len(path.read_text()) > 50


def test_without_a_drafter_there_is_nothing_to_measure(own_cache):
    assert isinstance(
        build_engine(load_config({"model": TARGET, "method": "none", "kv_cache_gib": 0.01})).budget, KeepAll
    )
    assert not own_cache.exists()


@pytest.mark.parametrize("options", [{}, {"method": "portfolio"}, {"head": None, "method": "ngram"}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_auto_changes_no_text(options, temperature):
    """Through the composition root, on the profile of this machine and on one where drafting is free."""
    params = SamplingParams(temperature=temperature, max_tokens=24, ignore_eos=True, seed=3)
    llm = LLM(**{**OPTIONS, **options, "budget": "auto"})
    off = SpeculationParams(enabled=False)

    def texts(**more):
        return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, params, use_tqdm=False, **more)]

    plain = texts(speculation=off)
    assert texts() == plain
    budget = llm._engine.budget
    budget.cost._drafts = None  # from here on it drafts
    assert texts() == plain
    assert texts() == plain


def test_auto_respects_the_requests_limit(cheap_drafts):
    llm = LLM(**OPTIONS, per_request_spec_decode_metrics="detailed")
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    [output] = llm.generate(PROMPTS[:1], params, use_tqdm=False, speculation=SpeculationParams(max_draft_tokens=2))
    drafted = output.outputs[0].metrics.speculative_decoding
    assert set(drafted.per_step_drafted) <= {1, 2}
    assert drafted.num_draft_tokens > 0


def test_rejection_runs_with_auto_and_refuses_an_objective_per_user():
    llm = LLM(**OPTIONS, verify_mode="rejection")
    llm.generate(PROMPTS, SamplingParams(temperature=1.0, max_tokens=8), use_tqdm=False)
    with pytest.raises(ValueError, match="coupled"):
        build_engine(load_config({**OPTIONS, "verify_mode": "rejection", "objective": "per-user:5"}))
    assert build_engine(load_config({**OPTIONS, "objective": "per-user:5"})).info.objective == "per-user:5"


def test_a_finished_request_is_forgotten_and_forgets_nothing_else(cheap_drafts):
    engine = build_engine(load_config(OPTIONS))
    for name in ("a", "b"):
        engine.add(make_request(name, PROMPTS[0]["prompt_token_ids"], max_tokens=12 if name == "a" else 40))
    while "a" in engine.scheduler._by_id:
        engine.step()
    assert set(engine.budget.calibrator.own) == {"b"}
    engine.cancel("b")
    assert not engine.budget.calibrator.own


def test_steps_report_what_the_budget_expected():
    engine = build_engine(load_config(OPTIONS))
    engine.add(make_request("a", PROMPTS[0]["prompt_token_ids"], max_tokens=8, temperature=0.0))
    reports = []
    while engine.has_work:
        reports.append(engine.step().budget)
    assert all(report.predicted_step_ms > 0 for report in reports)
    assert any(report.skipped for report in reports) or any(report.predicted_draft_ms > 0 for report in reports)
