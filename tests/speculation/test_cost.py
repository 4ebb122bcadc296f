"""The cost model on made-up machines: cliffs, drift, bad measurements, the profile on disk. No real time is used."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dspark_serve.speculation.cost import CostModel, Point, Profile, load_profile, save_profile

KEY = {"model": "m", "threads": 2}


def machine_ms(tokens: int, rows: int, context: int) -> float:
    """A step up after every eighth token, and something per row and per key."""
    return 20 + 6 * math.ceil(tokens / 8) + 0.5 * rows + 0.002 * context


def draft_machine_ms(rows: int) -> float:
    return 5 + 3 * math.ceil(rows / 4)


def profile(noise: Callable[[], float] = lambda: 1.0) -> Profile:
    shapes = [(t, 1, 128) for t in range(1, 9)] + [(r, r, 128 * r) for r in (2, 4, 8, 9, 16, 17, 24, 25, 32, 33)]
    shapes += [(8, 8, 640 * 8), (12, 2, 256), (16, 2, 256), (128, 16, 2048)]
    steps = tuple(Point(*shape, machine_ms(*shape) * noise()) for shape in shapes)
    drafts = tuple(Point(r, r, 128 * r, draft_machine_ms(r) * noise()) for r in (1, 2, 4, 5, 8, 9, 16))
    return Profile(steps, drafts)


def model(of: Profile | None = None) -> CostModel:
    return CostModel(of or profile(), 256, 64)


def traffic(seed: int = 0) -> Iterator[tuple[int, int, int]]:
    """Steps of a server whose load changes."""
    draw = np.random.default_rng(seed)
    while True:
        rows = int(draw.integers(1, 33))
        yield rows + int(draw.integers(0, 4 * rows)), rows, rows * int(draw.integers(100, 500))


def test_the_profile_is_reproduced() -> None:
    costs = model()
    for point in profile().steps:
        assert costs.step_ms(point.count, point.rows, point.context) == pytest.approx(point.ms, rel=1e-6)
    for point in profile().drafts:
        assert costs.draft_ms(point.rows, point.context) == pytest.approx(point.ms, rel=1e-6)
    assert costs.draft_curve(4, 512)[0] == 0
    # A row and a key have their price where tokens are the same.
    assert costs.step_ms(8, 8, 4096) - costs.step_ms(8, 2, 1024) == pytest.approx(3 + 6.144, rel=0.05)


def test_keys_of_drafts_have_a_price_of_their_own() -> None:
    """What a row has read is at hand for its drafts."""

    def ms(rows: int, drafts: int, context: int) -> float:
        return 10 + rows * (1 + drafts) + 0.004 * rows * context + 0.001 * rows * drafts * context

    shapes = [(rows, 0, context) for rows in (1, 2, 4, 8, 16) for context in (128, 640)]
    shapes += [(4, drafts, 128) for drafts in (1, 3)]

    def costs(*more: tuple[int, int, int]) -> CostModel:
        every = [*shapes, *more]
        points = [Point(n * (1 + d), n, n * context, ms(n, d, context), n * d * context) for n, d, context in every]
        return model(Profile(tuple(points)))

    known = costs((4, 1, 640), (4, 3, 640))
    for rows, drafts, context in ((4, 2, 1000), (2, 3, 300), (1, 7, 2000)):
        said = known.step_ms(rows * (1 + drafts), rows, rows * context, draft_keys=rows * drafts * context)
        assert said == pytest.approx(ms(rows, drafts, context))
    curve = known.step_curve(8, 12, 8, 8 * 500, keys_per_draft=500.0)
    assert np.diff(curve) == pytest.approx(1 + 0.001 * 500)
    # Where no drafts were measured with two contexts, their keys are thought to cost what those of rows do.
    unknown = costs()
    dearer = unknown.step_ms(8, 4, 4000, draft_keys=4000) - unknown.step_ms(8, 4, 4000)
    assert dearer == pytest.approx(0.004 * 4000)


def test_tokens_after_which_nothing_is_drawn_have_a_price_of_their_own() -> None:
    """Prompts are measured in sizes that no step of drafts has: what drafts take is not theirs."""

    def ms(tokens: int, silent: int) -> float:
        return 5 + 0.8 * tokens + 0.2 * (tokens - silent)

    decoding = [Point(n, n, 0, ms(n, 0)) for n in (1, 2, 4, 8, 16, 32)] + [Point(64, 16, 0, ms(64, 0))]
    prompts = [Point(n, 1, 0, ms(n, n), silent=n) for n in (32, 128, 256)]
    costs = model(Profile((*decoding, *prompts)))
    assert np.diff(costs.step_curve(32, 200, 32, 0)) == pytest.approx(1.0)
    assert costs.step_ms(150, 30, 0) == pytest.approx(ms(150, 0))
    assert costs.step_ms(150, 9, 0, silent=142) == pytest.approx(ms(150, 142))
    assert np.diff(costs.step_curve(100, 110, 9, 0, silent=92)) == pytest.approx(1.0)
    before = costs.step_ms(150, 9, 0, silent=142)
    assert costs.observe_step(150, 9, 0, before, silent=142) == before
    assert costs.slowdown == pytest.approx(1.0)


def test_a_disturbed_profile_does_not_make_prompts_take_no_time() -> None:
    """While the decoding step was measured something else ran: a silent token seems to save more than one takes."""
    costs = model(Profile((Point(1, 1, 0, 1.0), Point(32, 32, 0, 900.0), Point(32, 1, 0, 4.0, silent=32))))
    assert costs.step_ms(20, 1, 0, silent=20) > 0
    assert (costs.step_curve(20, 40, 1, 0, silent=20) > 0).all()
    costs.observe_step(20, 1, 0, 3.0, silent=20)


def test_cliffs_stay_where_they_are() -> None:
    curve = model().step_curve(1, 20, 4, 512)
    steps = np.diff(curve)
    assert steps[7] == pytest.approx(6)  # from 8 to 9 tokens
    assert np.abs(steps[:7]).max() < 1e-9


def test_a_disturbed_measurement_does_not_make_a_hole() -> None:
    """Three tokens were measured while something else ran; four and more say what three cannot exceed."""
    disturbed = tuple(Point(p.count, p.rows, p.context, p.ms * 3) if p.count == 3 else p for p in profile().steps)
    assert model(Profile(disturbed)).step_ms(3, 1, 128) == pytest.approx(machine_ms(3, 1, 128))


def test_steps_teach_what_the_sweep_got_wrong() -> None:
    draw = np.random.default_rng(1)
    costs = model(profile(lambda: math.exp(draw.normal(0, 0.3))))
    errors = []
    for number, (tokens, rows, context) in zip(range(6000), traffic(), strict=False):
        measured = machine_ms(tokens, rows, context) * math.exp(draw.normal(0, 0.05))
        if number > 5000:
            errors.append(abs(costs.step_ms(tokens, rows, context) / measured - 1))
        costs.observe_step(tokens, rows, context, measured)
    assert np.median(errors) < 0.1  # what issue and design ask for
    assert costs.noise < 0.12


@pytest.mark.parametrize("seldom", [False, True])
def test_what_is_found_of_the_usual_count_alone_goes_for_those_that_were_not_measured(seldom: bool) -> None:
    """Eight rows take a quarter longer than in the profile, whatever is drafted: plain steps say so all the time. Were
    it theirs alone, drafts would seem to come for next to nothing."""
    costs = model()
    before = costs.step_curve(8, 40, 8, 2048)
    for step in range(900):
        for rows, factor in ((1, 1.0), (1, 1.0), (8, 1.25)):  # most steps are as they were: it is not the machine
            tokens = 16 if seldom and rows == 8 and step % 50 == 0 else rows
            costs.observe_step(tokens, rows, 256 * rows, machine_ms(tokens, rows, 256 * rows) * factor)
    assert costs.slowdown == pytest.approx(1.0, abs=0.02)
    np.testing.assert_allclose(costs.step_curve(8, 40, 8, 2048), 1.25 * before, rtol=0.03)
    assert costs.step_ms(1, 1, 256) == pytest.approx(machine_ms(1, 1, 256), rel=0.02)


def test_what_is_different_about_one_count_stays_its_own() -> None:
    costs = model()
    for step in range(900):
        for rows, tokens in ((1, 1), (1, 1), (8, 12 if step % 4 == 0 else 8)):
            factor = 1.3 if tokens == 12 else 1.0
            costs.observe_step(tokens, rows, 256 * rows, machine_ms(tokens, rows, 256 * rows) * factor)
    assert costs.step_ms(12, 8, 2048) == pytest.approx(1.3 * machine_ms(12, 8, 2048), rel=0.03)
    assert costs.step_ms(8, 8, 2048) == pytest.approx(machine_ms(8, 8, 2048), rel=0.03)
    for tokens in (10, 16, 32):  # between the two
        assert 1 <= costs.step_ms(tokens, 8, 2048) / machine_ms(tokens, 8, 2048) < 1.25


def test_prompts_say_little_of_drafts() -> None:
    """Their steps take half as long again as they should; those of a few tokens are as they were."""
    costs = model()
    before = costs.step_curve(1, 8, 1, 256)
    draw = np.random.default_rng(0)
    for step in range(600):
        tokens = int(draw.integers(100, 250)) if step % 3 == 0 else 1
        costs.observe_step(tokens, 1, 256, machine_ms(tokens, 1, 256) * (1.5 if tokens > 1 else 1.0))
    assert costs.step_ms(200, 1, 256) > 1.3 * machine_ms(200, 1, 256)
    np.testing.assert_allclose(costs.step_curve(1, 8, 1, 256), before, rtol=0.08)


def test_drafts_learn_too() -> None:
    costs = model()
    for _ in range(200):
        costs.observe_step(8, 4, 512, machine_ms(8, 4, 512))
        costs.observe_draft(4, 512, 2 * draft_machine_ms(4))
    assert costs.draft_ms(4, 512) == pytest.approx(2 * draft_machine_ms(4), rel=0.1)
    assert costs.slowdown == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_another_machine_is_followed_within_thirty_seconds(factor: float) -> None:
    """Every prediction moves with the machine, those for steps and drafts that were never tried included."""
    costs, draw, steps = model(), np.random.default_rng(2), traffic()
    for _ in range(300):
        shape = next(steps)
        costs.observe_step(*shape, machine_ms(*shape) * math.exp(draw.normal(0, 0.05)))
    elapsed_ms = 0.0
    while elapsed_ms < 30_000:
        shape = next(steps)
        ms = factor * machine_ms(*shape) * math.exp(draw.normal(0, 0.05))
        costs.observe_step(*shape, ms)
        elapsed_ms += ms
    for shape in ((1, 1, 128), (8, 8, 2048), (160, 32, 8192)):
        assert costs.step_ms(*shape) == pytest.approx(factor * machine_ms(*shape), rel=0.15)
    assert costs.draft_ms(8, 1024) == pytest.approx(factor * draft_machine_ms(8), rel=0.15)
    assert costs.draft_curve(8, 1024)[-1] == pytest.approx(costs.draft_ms(8, 1024))


def test_a_cliff_between_measured_points_is_found() -> None:
    """The sweep saw 16 and 64 tokens; that the machine slows down from 41 to 42 is learned from steps."""
    costs, draw = (
        CostModel(Profile((Point(16, 4, 512, 40.0), Point(64, 4, 512, 60.0))), 64, 64),
        np.random.default_rng(4),
    )
    for tokens in draw.integers(16, 65, 20_000).tolist():
        costs.observe_step(tokens, 4, 512, 40.0 if tokens <= 41 else 60.0)
    assert costs.step_ms(42, 4, 512) / costs.step_ms(41, 4, 512) == pytest.approx(1.5, rel=0.05)


def test_even_steps_of_two_seconds_are_followed() -> None:
    costs = model()
    for _ in range(15):  # thirty seconds of them
        costs.observe_step(1, 1, 128, 2000.0)
    assert costs.step_ms(1, 1, 128) == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize("ms", [0.0, -5.0, math.nan, math.inf, -math.inf])
def test_impossible_measurements_are_dropped(ms: float) -> None:
    costs, untouched = model(), model()
    for _ in range(100):
        costs.observe_step(4, 1, 128, ms)
        costs.observe_draft(4, 128, ms)
    assert costs.step_ms(4, 1, 128) == untouched.step_ms(4, 1, 128)
    assert costs.draft_ms(4, 128) == untouched.draft_ms(4, 128)


def test_a_clock_that_jumps_does_no_harm() -> None:
    costs, draw = model(), np.random.default_rng(3)
    for number, shape in zip(range(500), traffic(), strict=False):
        jump = draw.choice([1e7, -1e7, 1e-6]) if number % 10 == 0 else 0.0
        costs.observe_step(*shape, machine_ms(*shape) + jump if jump != 1e-6 else 1e-6)
        costs.observe_draft(4, 512, draft_machine_ms(4) + jump)
    assert costs.slowdown == pytest.approx(1, rel=0.05)
    assert costs.step_ms(8, 4, 512) == pytest.approx(machine_ms(8, 4, 512), rel=0.1)
    assert costs.draft_ms(4, 512) == pytest.approx(draft_machine_ms(4), rel=0.15)


def test_counts_beyond_the_profile_are_extrapolated() -> None:
    small = CostModel(Profile((Point(1, 1, 0, 10.0), Point(8, 1, 0, 17.0))), 64, 8)
    assert small.step_ms(64, 1, 0) > small.step_ms(32, 1, 0) > 17
    assert small.step_ms(10_000, 1, 0) == small.step_ms(64, 1, 0)  # more than a step can hold
    assert CostModel(Profile((Point(4, 4, 0, 10.0),)), 8, 8).step_ms(8, 4, 0) > 10
    assert small.draft_ms(3, 100) == 0  # a drafter that costs nothing
    with pytest.raises(ValueError, match="at least one"):
        Profile((Point(1, 1, 0, math.nan),))


# --- on disk


def test_profiles_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "p.json"
    save_profile(path, KEY, profile())
    assert load_profile(path, KEY) == profile()
    assert [p.name for p in path.parent.iterdir()] == ["p.json"]


def damaged(text: str) -> list[str]:
    stored = json.loads(text)
    point = {"count": 1, "rows": 1, "context": 0}
    return [
        "",
        text[: len(text) // 2],
        "[]",
        "null",
        json.dumps({**stored, "format": 0}),
        json.dumps({**stored, "key": {**KEY, "threads": 4}}),
        json.dumps({**stored, "steps": []}),
        json.dumps({**stored, "steps": [{**point, "ms": -1.0}]}),
        json.dumps({**stored, "steps": [{**point, "ms": "fast"}]}),
        json.dumps({**stored, "drafts": [{**point, "ms": math.nan}]}),
        json.dumps({**stored, "steps": [{**point, "ms": 1.0, "mood": 1}]}),
    ]


def test_damaged_and_foreign_profiles_are_ignored_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.json"
    assert load_profile(path, KEY) is None
    assert not caplog.records  # nothing there is nothing to warn of
    save_profile(path, KEY, profile())
    for text in damaged(path.read_text()):
        path.write_text(text)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert load_profile(path, KEY) is None, text
        assert len(caplog.records) == 1, text


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    save_profile(tmp_path / "file" / "p.json", KEY, profile())
    assert len(caplog.records) == 1


def test_greedy_steps_have_a_curve_of_their_own() -> None:
    sampled, greedy = profile().steps, tuple(Point(p.count, p.rows, p.context, p.ms / 2) for p in profile().steps)
    costs = CostModel(Profile(sampled, (), greedy), 256, 64)
    assert costs.step_ms(8, 8, 1024, greedy=True) == pytest.approx(costs.step_ms(8, 8, 1024) / 2)
    assert model().step_ms(8, 8, 1024, greedy=True) == model().step_ms(8, 8, 1024)  # nothing measured: the other serves
    for _ in range(300):  # what one learns of a bucket is not the other's
        costs.observe_step(1, 1, 128, machine_ms(1, 1, 128))
        costs.observe_step(8, 8, 1024, machine_ms(8, 8, 1024), greedy=True)
    assert costs.step_ms(8, 8, 1024, greedy=True) / costs.step_ms(8, 8, 1024) > 0.6


def test_a_curve_is_its_times_one_by_one() -> None:
    """Also where something was learned, on both sides of a bucket's edge, and beyond the last known count; but more
    tokens never take less time."""
    costs, draw, steps = model(), np.random.default_rng(3), traffic()
    for _ in range(500):
        shape = next(steps)
        costs.observe_step(*shape, machine_ms(*shape) * math.exp(draw.normal(0, 0.3)))
        costs.observe_draft(shape[1], shape[2], draft_machine_ms(shape[1]) * math.exp(draw.normal(0, 0.3)))
    for first, last in ((1, 30), (60, 256), (200, 300), (300, 310)):
        one_by_one = [costs.step_ms(count, 8, 2048) for count in range(first, last + 1)]
        rising = np.maximum.accumulate(one_by_one)
        np.testing.assert_allclose(costs.step_curve(first, last, 8, 2048), rising, rtol=1e-12)
    assert (np.diff(costs.step_curve(1, 256, 8, 2048)) >= 0).all()
    assert any(costs.step_ms(count, 8, 2048) > costs.step_ms(count + 1, 8, 2048) for count in range(1, 256))
    assert costs.draft_curve(8, 1024)[8] == pytest.approx(costs.draft_ms(8, 1024), rel=1e-12)
    assert len(np.unique(np.round(np.diff(costs.step_curve(16, 70, 8, 2048)), 6))) > 10  # corrections differ


def test_a_correction_is_its_whole_buckets() -> None:
    """Beyond 64 tokens a bucket is 6 % wide: 96 to 101 share what is learned of 100, their neighbours do not."""
    costs = model()
    before = np.array([costs.step_ms(count, 4, 512) for count in range(90, 111)])
    for _ in range(20):
        costs.observe_step(100, 4, 512, 1.1 * machine_ms(100, 4, 512))
        costs.observe_step(40, 4, 512, machine_ms(40, 4, 512))
    moved = np.array([costs.step_ms(count, 4, 512) for count in range(90, 111)]) / before
    np.testing.assert_allclose(moved[6:12], moved[10])
    assert moved[10] > max(moved[5], moved[12]) * 1.01


def test_steps_measured_together_count_as_so_many() -> None:
    """In what their count corrects as in the machine's slowdown, but no more than eight of them."""

    def model(*observed: tuple[float, int]) -> CostModel:
        made = CostModel(Profile(tuple(Point(n, 1, 0, 10.0) for n in (1, 8, 16))), 16, 16)
        for ms, times in [(10.0, 1)] * 7 + list(observed):
            made.observe_step(8, 8, 0, ms, times=times)
        return made

    apart, together, more = model(*[(15.0, 1)] * 8), model((15.0, 8)), model((15.0, 99))
    assert model((15.0, 6)).slowdown == pytest.approx(1.0)  # six of thirteen are no majority; eight of fifteen are
    assert 1.2 < together.slowdown < 1.45  # a part of it is taken for the count's own
    assert more.step_ms(8, 8, 0) == together.step_ms(8, 8, 0)
    assert together.step_ms(8, 8, 0) == pytest.approx(15.0, rel=0.03)
    assert together.step_ms(8, 8, 0) == pytest.approx(apart.step_ms(8, 8, 0), rel=0.03)
