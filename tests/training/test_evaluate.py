"""Rounds walked over precomputed blocks, against a speculative run that drafts only where it must."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_head import head_config, passage, random_head, target_weights

from dspark_serve.training.evaluate import acceptance_by_slot, overlap_passage, score, walk_rounds


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), st.integers(0, 1000))
def test_rounds_are_those_of_a_plain_run(size, anchors, rate, seed):
    matches = np.random.default_rng(seed).random((anchors, size)) < rate
    slot_of = np.arange(anchors)[:, None] + np.arange(size)
    labels = np.where(slot_of < anchors, 1, -1)
    expected, at = [], 0
    while at + size <= anchors:  # a whole block still lies within the text
        accepted = 0
        while accepted < size and matches[at, accepted]:
            accepted += 1
        expected.append(accepted)
        at += accepted + 1
    assert walk_rounds(matches, labels).tolist() == expected


def test_acceptance_by_slot():
    assert acceptance_by_slot(np.array([0, 1, 2, 2]), 2) == (0.75, 2 / 3)


def test_acceptance_ratio_is_draft_over_target():
    weights = target_weights()
    head, target = random_head(head_config(), weights)
    one = passage(weights, 20, 6)
    drafts, ratios = overlap_passage(head, one, target)
    drafted = set(head.draft_vocab.tolist())
    probs = weights.logits(one.last_hidden).softmax(-1)
    for row, slot in [(0, 0), (3, 1), (8, 2)]:
        label = int(drafts.labels[row, slot])
        if label not in drafted:
            assert ratios[row, slot] == 0
        elif ratios[row, slot] < 1:
            assert ratios[row, slot] * float(probs[6 + row + slot, label]) <= drafts.largest[row, slot] + 1e-6
    assert (ratios[drafts.labels < 0] == 0).all()


def test_score_tells_temperatures_apart():
    weights = target_weights()
    head, target = random_head(head_config(), weights)
    texts = [(t, passage(weights, 30, 6, seed)) for seed, t in enumerate((0.0, 1.0, 0.7))]
    both, greedy = score(head, texts, target), score(head, texts[:1], target)
    assert both.greedy == greedy.greedy
    assert greedy.sampled == 1.0 < both.sampled
