"""Markov and confidence heads against their formulas, token by token: what recordings cover, and what they do not."""

from dataclasses import replace

import pytest
import torch

from dspark_serve.drafters.head_weights import HeadWeights
from dspark_serve.drafters.markov import ConfidenceHead, MarkovHead
from tests.drafters.golden import golden_target
from tests.drafters.made_heads import stored

RANK, HIDDEN, VOCAB = 16, 64, 512
JOINT = {"gated": ("gate_proj", (RANK, HIDDEN + RANK)), "rnn": ("joint_proj", (3 * RANK, 2 * RANK + HIDDEN))}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_bias_of_every_kind(kind):
    w1, w2 = draw(VOCAB, RANK, seed=1), draw(VOCAB, RANK, seed=2)
    tensors = {"markov_head.markov_w1.weight": w1, "markov_head.markov_w2.weight": w2}
    if kind in JOINT:
        name, shape = JOINT[kind]
        weight, bias = draw(*shape, seed=3), draw(shape[0], seed=4)
        tensors |= {f"markov_head.{name}.weight": weight, f"markov_head.{name}.bias": bias}
    config = replace(stored("dspark_vanilla")[0], markov_type=kind)
    weights = HeadWeights(tensors, golden_target())
    head = MarkovHead(config, weights)
    weights.check_empty()
    tokens, hidden = torch.tensor([[3, 500, 3], [7, 7, 9]]), draw(2, 3, HIDDEN, seed=5)
    state = head.first_state(2)
    slow = torch.zeros(2, RANK)
    for slot in range(3):
        got, state = head.step(head.embed(tokens[:, slot]), hidden[:, slot], state)
        for row in range(2):
            e, h, feature = w1[tokens[row, slot]], hidden[row, slot], w1[tokens[row, slot]]
            if kind == "gated":
                feature = torch.sigmoid(weight @ torch.cat([h, e]) + bias) * e
            elif kind == "rnn":
                a, c, o = (weight @ torch.cat([slow[row], e, h]) + bias).split(RANK)
                slow[row] = torch.sigmoid(a) * slow[row] + (1 - torch.sigmoid(a)) * torch.tanh(c)
                feature = torch.tanh(o)
            torch.testing.assert_close(got[row], w2 @ feature, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_markov", [True, False])
def test_confidence(with_markov):
    weight, bias = draw(1, HIDDEN + RANK * with_markov), torch.tensor([0.7])
    config = replace(stored("dspark_vanilla")[0], confidence_with_markov=with_markov)
    weights = HeadWeights({"confidence_head.proj.weight": weight, "confidence_head.proj.bias": bias}, golden_target())
    hidden, embedded = draw(4, HIDDEN, seed=5), draw(4, RANK, seed=6)
    got = ConfidenceHead(config, weights).logits(hidden, embedded)
    read = torch.cat([hidden, embedded], dim=1) if with_markov else hidden
    torch.testing.assert_close(got, read @ weight[0] + 0.7)
