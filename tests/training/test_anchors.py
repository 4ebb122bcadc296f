"""Blocks against a loop over anchors and slots."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_head import passage, target_weights

from dspark_serve.training.anchors import build_blocks, choose_anchors, context_states

WEIGHTS = target_weights()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(8, 30), min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_blocks_say_what_a_loop_says(lengths, size, count, seed):
    draw = np.random.default_rng(seed)
    passages = [passage(WEIGHTS, length, 5, seed + i) for i, length in enumerate(lengths)]
    anchors = [choose_anchors(p, count, draw) for p in passages]
    blocks = build_blocks(passages, anchors, size)
    states = context_states(passages, blocks)
    assert states.shape[0] == sum(blocks.context_lens) == len(blocks.context_positions)
    row = before = 0
    for one, chosen, seen in zip(passages, anchors, blocks.context_lens, strict=True):
        assert len(set(chosen.tolist())) == len(chosen) == min(count, len(one.tokens) - 6)
        for anchor in chosen.tolist():
            assert 5 <= anchor < len(one.tokens) - 1  # in the answer, with a token after it
            assert blocks.anchor_tokens[row] == one.tokens[anchor]
            visible = [p for p in range(seen) if blocks.context_mask[row, p] == 0]
            assert visible == list(range(anchor))  # strictly before the anchor, and all of that
            for slot in range(size):
                assert blocks.slot_positions[row * size + slot] == anchor + slot
                label = int(one.tokens[anchor + 1 + slot]) if anchor + 1 + slot < len(one.tokens) else -1
                assert blocks.labels[row, slot] == label
                if label >= 0:  # the target's state that predicts the label is the one at the slot's own position
                    assert blocks.sources[row, slot] == before + anchor + slot
                    previous = one.tokens[anchor + slot]
                    assert blocks.previous_tokens()[row, slot] == previous
            row += 1
        before += one.states.shape[0]
    tokens = blocks.slot_tokens(39).view(-1, size)
    assert tokens[:, 0].equal(blocks.anchor_tokens)
    assert (tokens[:, 1:] == 39).all()
