"""Calibration: what is stored first, then what verification says; labels only of what was judged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from dspark_serve.models.catalog import CATALOG
from dspark_serve.speculation.calibrate import (
    Calibrator,
    DraftSignals,
    SlotMap,
    logit,
    sigmoid,
    stored_maps,
)
from dspark_serve.types import GREEDY_TEMPERATURE, temperature_range

WIDTH = 4
HEAD = {
    "greedy": (SlotMap(0.5, 0.5, 0.1),) * WIDTH,
    "coupled": tuple(SlotMap(1.0, 0.0, -0.2 * slot) for slot in range(WIDTH)),
}


def signals(
    confidence: object, kinds: tuple[str, ...] | None = None, temperature: float = 1.0, largest: object = None
) -> DraftSignals:
    stated = None if confidence is None else np.asarray(confidence, dtype=np.float64)
    biggest = None if largest is None else np.asarray(largest, dtype=np.float64)
    shape = next((a.shape for a in (stated, biggest) if a is not None), (len(kinds or ()), WIDTH))
    rows = shape[0]
    return DraftSignals(
        requests=tuple(f"r{row}" for row in range(rows)),
        kinds=kinds or ("head",) * rows,
        ranges=np.full(rows, temperature_range(temperature)),
        confidence=stated,
        largest=biggest,
        n_draft=np.full(rows, shape[1]),
    )


def calibrator(**options: object) -> Calibrator:
    return Calibrator("coupled", WIDTH, HEAD, head="head", adaptive=frozenset({"ngram"}), **options)  # type: ignore[arg-type]


def test_the_stored_calibration_comes_first() -> None:
    confidence, largest = np.full((2, WIDTH), 0.7), np.full((2, WIDTH), 0.9)
    said = calibrator().probabilities(signals(confidence, largest=largest))
    np.testing.assert_allclose(said[0], sigmoid(logit(np.array(0.7)) - 0.2 * np.arange(WIDTH)))
    greedy = calibrator().probabilities(signals(confidence, largest=largest, temperature=0.0))
    np.testing.assert_allclose(greedy, sigmoid(0.5 * logit(confidence) + 0.5 * logit(largest) + 0.1))


def test_what_is_not_stored_is_taken_as_stated() -> None:
    stated = np.array([[0.9, 0.5, 0.2, 0.1]])
    np.testing.assert_allclose(calibrator().probabilities(signals(stated, ("ngram",))), stated)
    np.testing.assert_allclose(Calibrator("coupled", WIDTH).probabilities(signals(stated)), stated)
    # Neither confidence nor anything stored: an even chance, until verification says more.
    assert Calibrator("coupled", WIDTH).probabilities(signals(None, ("x", "x"))).tolist() == [[0.5] * WIDTH] * 2
    # A head that states no confidence cannot use a map that asks for one; one of the largest probability it can.
    assert calibrator().probabilities(signals(None, ("head",)))[0, 0] == 0.5
    only = Calibrator("coupled", WIDTH, {"coupled": (SlotMap(0.0, 1.0, 0.0),) * WIDTH}, head="head")
    np.testing.assert_allclose(only.probabilities(signals(None, largest=[[0.8] * WIDTH])), 0.8)


def test_nothing_is_said_beyond_a_rows_drafts() -> None:
    given = signals(np.full((2, WIDTH), 0.7))
    short = DraftSignals(given.requests, given.kinds, given.ranges, given.confidence, None, np.array([1, 3]))
    said = calibrator().probabilities(short)
    assert (said > 0).sum(1).tolist() == [1, 3]


def test_temperature_ranges() -> None:
    found = [temperature_range(t) for t in (0.0, GREEDY_TEMPERATURE, 0.1, 0.6, 0.7, 1.0, 1.5, 100.0)]
    assert found == [0, 0, 1, 1, 2, 3, 4, 4]


class World:
    """Rows whose drafts are accepted with a probability that the stated confidence gets wrong by an offset per slot."""

    def __init__(self, offset: object, seed: int = 0) -> None:
        self.offset, self.draw = np.asarray(offset, dtype=np.float64), np.random.default_rng(seed)

    def step(
        self, calibrator: Calibrator, rows: int = 8, keep: float | None = None, temperature: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """One step: said and true probabilities [rows, WIDTH]; keep: drafts less likely than that are trimmed."""
        confidence = self.draw.uniform(0.2, 0.9, (rows, WIDTH))
        true = sigmoid(logit(confidence) + self.offset)
        given = signals(confidence, ("other",) * rows, temperature)
        said = calibrator.probabilities(given)
        right = self.draw.random((rows, WIDTH)) < true
        n_accepted = np.logical_and.accumulate(right, axis=1).sum(1)
        n_kept = np.full(rows, WIDTH)
        if keep is not None:
            n_kept = np.logical_and.accumulate(said >= keep, axis=1).sum(1)
        calibrator.learn(given, said, n_kept, np.minimum(n_accepted, n_kept))
        for request in given.requests:
            calibrator.release(request)  # what is learned of all requests, not of these
        return said, true


def distance(world: World, calibrator: Calibrator, steps: int, **options: float) -> np.ndarray:
    """Mean of said minus true per slot over the last tenth of the steps."""
    last = [np.subtract(*world.step(calibrator, **options)) for _ in range(steps)][-steps // 10 :]  # type: ignore[arg-type]
    return np.concatenate(last).mean(0)


@pytest.mark.parametrize("offset", [[1.0, 1.0, 1.0, 1.0], [-1.5, 0.0, 0.5, 1.0]])
def test_verification_corrects_every_slot(offset: list[float]) -> None:
    world, fresh = World(offset), calibrator()
    assert np.abs(distance(world, calibrator(), 10)).max() > 0.1
    assert np.abs(distance(world, fresh, 2000)).max() < 0.04
    assert fresh.error < 0.05


def test_trimmed_drafts_are_not_labels() -> None:
    """Only sure drafts are kept; counting the others as rejected would drag the estimate down."""
    world, fresh = World([0.0] * WIDTH), calibrator()
    assert np.abs(distance(world, fresh, 2000, keep=0.6)).max() < 0.05


def test_nothing_kept_is_nothing_learned() -> None:
    fresh, given = calibrator(), signals(np.full((4, WIDTH), 0.6))
    before = fresh.probabilities(given)
    for _ in range(100):
        fresh.learn(given, before, np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.int64))
    np.testing.assert_array_equal(fresh.probabilities(given), before)


def test_slots_behind_a_rejection_are_not_labels() -> None:
    fresh, given = calibrator(), signals(np.full((4, WIDTH), 0.5), ("other",) * 4)
    for _ in range(50):
        said = fresh.probabilities(given)
        fresh.learn(given, said, np.full(4, WIDTH), np.full(4, 1))  # first right, second wrong, always
        for request in given.requests:
            fresh.release(request)
    said = fresh.probabilities(given)[0]
    assert said[0] > 0.7 > 0.5 > 0.3 > said[1]
    assert said[2] == said[3] == 0.5


def test_temperature_ranges_and_drafters_learn_apart() -> None:
    fresh = calibrator()
    world = World([1.5] * WIDTH)
    for _ in range(300):
        world.step(fresh, temperature=1.5)
    cool, hot = (signals(np.full((1, WIDTH), 0.5), ("other",), t) for t in (1.0, 1.5))
    assert fresh.probabilities(cool)[0, 0] == 0.5
    assert fresh.probabilities(hot)[0, 0] > 0.7
    assert fresh.probabilities(signals(np.full((1, WIDTH), 0.5), ("ngram",), 1.5))[0, 0] == 0.5


def test_a_request_is_followed_quickly_and_forgotten() -> None:
    """Without a confidence, the running acceptance of the request is all there is."""
    fresh = Calibrator("coupled", WIDTH)
    given = signals(None, ("ngram", "ngram"))
    for _ in range(6):
        said = fresh.probabilities(given)
        fresh.learn(given, said, np.full(2, WIDTH), np.array([WIDTH, 0]))
    said = fresh.probabilities(given)
    assert said[0, 0] > 0.6 > 0.4 > said[1, 0]
    fresh.release("r0")
    fresh.release("r1")
    fresh.release("nobody")
    said = fresh.probabilities(given)
    assert said[0, 0] == said[1, 0]


def test_a_drafter_that_adapts_itself_gets_no_second_opinion_per_request() -> None:
    fresh, given = calibrator(), signals(np.full((2, WIDTH), 0.5), ("ngram", "ngram"))
    for _ in range(20):
        fresh.learn(given, fresh.probabilities(given), np.full(2, WIDTH), np.array([WIDTH, 0]))
    said = fresh.probabilities(given)
    assert said[0].tolist() == said[1].tolist()


# --- what is stored beside a head


def test_the_shipped_head_brings_its_calibration() -> None:
    directory = CATALOG["smollm2-135m-instruct"].head_dir
    assert directory is not None
    maps = stored_maps(directory)
    assert set(maps) == {"greedy", "rejection", "coupled"}
    assert {len(slots) for slots in maps.values()} == {5}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"calibration": 3}', '{"calibration": {"greedy": {"slots": [{"mood": 1}]}}}']
)
def test_damaged_calibration_is_ignored_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    assert stored_maps(tmp_path) == {}
    (tmp_path / "dspark.json").write_text(json.dumps({"target_fingerprint": "x"}))
    assert stored_maps(tmp_path) == {}
    assert not caplog.records
    (tmp_path / "dspark.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert stored_maps(tmp_path) == {}
    assert len(caplog.records) == 1
    slot = '{"confidence": 1, "largest": NaN, "offset": 0}'
    (tmp_path / "dspark.json").write_text('{"calibration": {"greedy": {"slots": [' + slot + "]}}}")
    assert stored_maps(tmp_path) == {}


def test_the_calibration_error_is_the_distance_of_what_was_said_and_what_came() -> None:
    made, given = Calibrator("coupled", WIDTH, adaptive=frozenset({"head"})), signals(np.full((2, WIDTH), 0.9))
    said, kept = np.full((2, WIDTH), 0.9), np.full(2, WIDTH)
    for accepted in (0, WIDTH):  # one label per row that came to nothing; four that came
        for _ in range(4):
            made.learn(given, said, kept, np.full(2, accepted))
        if not accepted:
            assert made.error == pytest.approx(0.9)
    # Ten labels counted, all of one bin: eight came, where nine were said to.
    assert made.error == pytest.approx(0.1, abs=0.01)
