"""benchmarks/synthetic_drafts.py: made-up drafts come to what was asked for, and say how likely they are right."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from dspark_serve.speculation.calibrate import sigmoid
from dspark_serve.types import Request, Row, SamplingParams

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
simulate = importlib.import_module("simulate")
synthetic_drafts = importlib.import_module("synthetic_drafts")


@pytest.mark.parametrize("length", [1.5, 3.29, 6.11])
def test_synthetic_drafts_have_the_accepted_length_and_say_the_odds(length):
    drafts = synthetic_drafts.SyntheticDrafts([synthetic_drafts.logit_for(length, 7)], 7, seed=1)
    requests = [Request(str(n), (1,) * 9, SamplingParams(), seed=n, arrival=n) for n in range(300)]
    accepted, first, said = [], [], []
    for start in range(20, 40):
        proposal, right = drafts.propose([Row(request, start, 1, True, 7) for request in requests])
        accepted += right.tolist()
        first += (right > 0).tolist()
        said += proposal.confidence[:, 0].tolist()
    assert 1 + np.mean(accepted) == pytest.approx(length, rel=0.03)
    assert np.mean(first) == pytest.approx(np.mean(said), abs=0.02)
    sure = np.array(said) > np.median(said)
    assert np.mean(np.array(first)[sure]) > np.mean(np.array(first)[~sure]) + 0.05  # and they tell good from bad


def test_more_accepted_than_drafted_is_refused():
    for length in (1.0, 8.0):
        with pytest.raises(ValueError, match="between 1 and 8 tokens per step"):
            synthetic_drafts.logit_for(length, 7)


def test_the_stated_odds_tell_prefixes_from_others_as_in_the_paper():
    """How probable it is that an accepted prefix was given more than one that was not: the paper has .81 to .91."""
    draw = np.random.default_rng(0)
    logits = np.array([synthetic_drafts.logit_for(length, 7) for length in simulate.PAPER])
    rows = draw.choice(logits, (4000, 1)) + draw.normal(0, synthetic_drafts.SPREAD[0], (4000, 1))
    slots = (
        rows
        + draw.normal(0, synthetic_drafts.SPREAD[1], (4000, 1))
        + draw.normal(0, synthetic_drafts.SPREAD[2], (4000, 7))
    )
    odds = sigmoid(slots)
    came = np.logical_and.accumulate(draw.random(odds.shape) < odds, axis=1).ravel()
    ranks = odds.cumprod(1).ravel().argsort().argsort()
    area = (ranks[came].sum() - came.sum() * (came.sum() - 1) / 2) / (came.sum() * (~came).sum())
    assert 0.81 <= area <= 0.91
