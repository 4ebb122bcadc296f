"""Rounds walked over precomputed blocks, against a speculative run that drafts only where it must."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_head import head_config, passage, random_head, target_weights

from dspark_serve.training.anchors import build_blocks, context_states
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
    probs = weights.logits(one.last_hidden).softmax(-1)
    anchors = np.arange(6, 19)
    blocks = build_blocks([one], [anchors], 3)
    seen = set()
    with torch.no_grad():
        hidden = head.backbone(context_states([one], blocks), blocks, target).view(len(anchors), 3, -1)
        for row, slot in np.ndindex(ratios.shape):
            at = 6 + row + slot  # the slot's own position: it predicts the next token, and knows the one that is there
            if at + 1 >= len(one.tokens):
                assert ratios[row, slot] == 0
                continue
            bias = head.markov.previous(one.tokens[at : at + 1], target, head.rank_of)[0]
            draft = (target.head @ hidden[row, slot] + head.markov.outgoing(target) @ bias).softmax(-1)
            label = int(one.tokens[at + 1])
            place = head.draft_vocab.tolist().index(label) if label in head.draft_vocab else None
            expected = 0.0 if place is None else min(1.0, float(draft[place] / probs[at, label]))
            assert ratios[row, slot] == pytest.approx(expected, abs=1e-5)
            seen.add(0 if place is None else 1 if expected == 1 else 2)
            assert drafts.labels[row, slot] == label
    assert seen == {0, 1, 2}


def test_score_tells_temperatures_apart():
    weights = target_weights()
    head, target = random_head(head_config(), weights)
    texts = [(t, passage(weights, 30, 6, seed)) for seed, t in enumerate((0.0, 1.0, 0.7))]
    both, greedy = score(head, texts, target), score(head, texts[:1], target)
    assert both.greedy == greedy.greedy
    assert greedy.sampled == 1.0 < both.sampled
