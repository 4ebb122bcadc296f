"""Calibration on made-up signals whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_serve.training.calibrate import (
    Signals,
    area_under_curve,
    calibrate,
    calibration_error,
    cross_fit,
    fit_offsets,
    fit_temperatures,
    judge,
    logit,
    raw,
    sigmoid,
)


def made_up(scale: float, offset: float, anchors: int = 20_000, size: int = 3, seed: int = 0) -> Signals:
    """The truth is sigmoid(scale * confidence + offset); the largest probability is noise."""
    draw = np.random.default_rng(seed)
    confidence = draw.normal(size=(anchors, size))
    accepted = draw.random((anchors, size)) < sigmoid(scale * confidence + offset)
    return Signals(confidence, draw.random((anchors, size)), accepted, np.arange(anchors) // 50)


def test_offsets_find_the_truth():
    fitted = fit_offsets(made_up(0.6, -0.8), ("confidence",))
    for slot in fitted.slots[:2]:
        assert slot.confidence == pytest.approx(0.6, abs=0.1)
        assert slot.offset == pytest.approx(-0.8, abs=0.1)
        assert slot.largest == 0


def test_temperatures_find_the_truth_where_there_is_no_offset():
    fitted = fit_temperatures(made_up(0.5, 0.0))
    assert 1 / fitted.slots[0].confidence == pytest.approx(2.0, rel=0.15)


def test_the_better_method_is_kept_and_helps():
    signals = made_up(0.5, -1.0)
    kept, report = calibrate(signals)
    assert kept.method in ("confidence", "confidence+largest")
    before, after = judge(raw(3).conditional(signals), signals)["ece"], report["methods"][report["kept"]]["ece"]
    assert max(after) < 0.02 < 0.1 < max(before)
    assert sum(after) < sum(report["methods"]["temperatures"]["ece"])


def test_no_text_is_judged_by_a_fit_to_itself():
    signals, seen = made_up(1.0, 0.0, anchors=1000), []

    def fit(part):
        seen.append(set(part.group.tolist()))
        return raw(3)

    probs = cross_fit(signals, fit)
    np.testing.assert_array_equal(probs, raw(3).conditional(signals))  # every anchor was judged, in its place
    texts = set(signals.group.tolist())
    left_out = [texts - part for part in seen]
    assert set().union(*left_out) == texts
    assert sum(map(len, left_out)) == len(texts)
    assert all(left_out)


def test_heads_without_confidence_use_the_largest_probability():
    kept, _ = calibrate(made_up(1.0, 0.0, anchors=500), has_confidence=False)
    assert kept.method == "largest"


@pytest.mark.parametrize("always", [True, False])
def test_slots_without_contrast_stay_finite(always):
    accepted = np.full((40, 2), always)
    signals = Signals(np.zeros((40, 2)), np.full((40, 2), 0.5), accepted, np.arange(40))
    survival = calibrate(signals)[0].survival(signals)
    assert np.isfinite(survival).all()
    assert ((survival > 0.9) if always else (survival < 0.1)).all()


def test_calibration_error_by_hand():
    predicted = np.array([0.12, 0.13, 0.92, 0.93])
    happened = np.array([False, True, True, True])
    # Bins [.10, .15) and [.90, .95): said .25 and 1.85, seen 1 and 2, over 4.
    assert calibration_error(predicted, happened) == pytest.approx((0.75 + 0.15) / 4)


def test_area_under_curve_by_hand():
    assert area_under_curve(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == 0.75
    assert area_under_curve(np.array([0.5, 0.5]), np.array([True, False])) == 0.5


def test_logit_is_finite_at_the_ends():
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()
