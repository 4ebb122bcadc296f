"""One layer of a head, where no recording reaches: biases of its attention."""

from dataclasses import replace

import torch

from dspark_serve.drafters.head_layers import HeadLayer
from dspark_serve.drafters.head_weights import HeadWeights
from tests.drafters.golden import golden_target
from tests.drafters.made_heads import stored


def test_attention_biases_are_added():
    config, tensors = stored("dspark_vanilla")
    plain = HeadLayer.load(config, HeadWeights(tensors, golden_target()), 0, config.hidden_size)
    widths = {"q": 64, "k": 32, "v": 32, "o": 64}
    biases = {name: torch.arange(1.0, width + 1) for name, width in widths.items()}
    tensors = {**tensors, **{f"layers.0.self_attn.{name}_proj.bias": bias for name, bias in biases.items()}}
    weights = HeadWeights(tensors, golden_target())
    biased = HeadLayer.load(replace(config, attention_bias=True), weights, 0, config.hidden_size)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for one, other, bias in (
        (plain.q, biased.q, biases["q"]),
        (plain.kv, biased.kv, torch.cat([biases["k"], biases["v"]])),
    ):
        torch.testing.assert_close(other(x) - one(x), bias.expand(3, -1), atol=1e-4, rtol=1e-5)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(biased.finish(x, hidden), plain.finish(x, hidden + biases["o"]), atol=1e-4, rtol=1e-4)
