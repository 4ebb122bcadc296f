"""The trainable head against a plain re-implementation that reads its exported files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_head import head_config, passage, random_head, slow_block, target_weights

from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.models.loader import read_config
from dspark_serve.training.anchors import build_blocks, context_states
from dspark_serve.training.evaluate import draft_passage
from dspark_serve.training.export import export_head, load_exported


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocks_equal_a_slow_forward_of_each(tmp_path, kv_heads):
    config, weights = head_config(kv_heads=kv_heads), target_weights()
    head, target = random_head(config, weights)
    export_head(tmp_path, head, target, weights.head, {})
    tensors = load_file(tmp_path / "model.safetensors")
    served, served_target = load_exported(tmp_path, weights.embedding, weights.head)
    assert HeadConfig.parse(read_config(tmp_path)) == config
    passages = [passage(weights, 20, 6, seed=1), passage(weights, 14, 3, seed=2)]
    anchors = [np.array([6, 9, 17]), np.array([3, 12])]
    blocks = build_blocks(passages, anchors, config.block_size)
    hidden = served.backbone(context_states(passages, blocks), blocks, served_target).view(5, config.block_size, -1)
    at = 0
    for one, chosen in zip(passages, anchors, strict=True):
        for anchor in chosen.tolist():
            slow = slow_block(tensors, config, weights.embedding, one.states, anchor, int(one.tokens[anchor]))
            torch.testing.assert_close(hidden[at], slow, atol=2e-5, rtol=1e-4)
            at += 1


@pytest.mark.parametrize("draft_vocab", [24, None])
def test_exported_heads_draft_as_the_trained_one(tmp_path, draft_vocab):
    config, weights = head_config(draft_vocab_size=draft_vocab), target_weights()
    head, target = random_head(config, weights)
    for parameter in head.parameters():  # what bfloat16 keeps, so that both compute with equal numbers
        parameter.data = parameter.data.bfloat16().float()
    export_head(tmp_path, head, target, weights.head, {})
    served, served_target = load_exported(tmp_path, weights.embedding, weights.head)
    one = passage(weights, 30, 6, seed=3)
    trained, exported = draft_passage(head, one, target), draft_passage(served, one, served_target)
    # Only the folded Markov tables are rounded again.
    np.testing.assert_allclose(exported.largest, trained.largest, atol=0.03)
    assert (exported.tokens == trained.tokens).mean() > 0.9
    assert {f"markov_head.markov_w{n}.weight" for n in (1, 2)} <= set(load_file(tmp_path / "model.safetensors"))


def test_drafting_follows_its_own_tokens():
    """Slot by slot as a server would: the Markov bias of slot k is that of the token drafted in slot k - 1."""
    config, weights = head_config(), target_weights()
    head, target = random_head(config, weights)
    one = passage(weights, 16, 6, seed=4)
    drafts = draft_passage(head, one, target)
    anchors = np.arange(6, 15)
    blocks = build_blocks([one], [anchors], config.block_size)
    with torch.no_grad():
        hidden = head.backbone(context_states([one], blocks), blocks, target).view(len(anchors), config.block_size, -1)
        for row in range(len(anchors)):
            before = blocks.anchor_tokens[row : row + 1]
            for slot in range(config.block_size):
                w1 = head.markov.previous(before, target, head.rank_of)
                logits = hidden[row, slot] @ target.head.T + (w1 @ head.markov.outgoing(target).T)[0]
                before = head.draft_vocab[logits.argmax()].view(1)
                assert int(before) == drafts.tokens[row, slot]
