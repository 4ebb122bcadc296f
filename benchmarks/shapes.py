"""Checkpoints of random weights with the layers of a real model, and what kernels and steps read, write and multiply.

Counts are the least a computation can do: every byte once, whatever the caches do. Must not know: devices, clocks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Cost:
    """Bytes to and from memory, and floating-point operations; a multiply and an add are two."""

    num_bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def times(self, count: int) -> Cost:
        return Cost(self.num_bytes * count, self.flops * count)

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The roofline: no less time than the slower of the two takes (Williams et al. 2009)."""
        return max(self.num_bytes / bytes_per_s, self.flops / flops_per_s)


@dataclass(frozen=True)
class Shape:
    """Widths of a Qwen3 decoder with a tied embedding."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def config(self, layers: int, dtype: torch.dtype) -> dict[str, Any]:
        """config.json of a checkpoint with this many layers."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "dtype": str(dtype).removeprefix("torch."),
        }

    def matrices(self) -> dict[str, tuple[int, int]]:
        """[outputs, inputs] of a layer's products, by the checkpoint's names."""
        return {
            "self_attn.q_proj": (self.q_width, self.hidden),
            "self_attn.k_proj": (self.kv_width, self.hidden),
            "self_attn.v_proj": (self.kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.q_width),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def norms(self) -> dict[str, int]:
        """Widths of a layer's norms."""
        return {
            "input_layernorm": self.hidden,
            "post_attention_layernorm": self.hidden,
            "self_attn.q_norm": self.head_dim,
            "self_attn.k_norm": self.head_dim,
        }


QWEN3_4B = Shape(hidden=2560, intermediate=9728, heads=32, kv_heads=8, head_dim=128, vocab=151_936)


def write_checkpoint(
    directory: Path, shape: Shape, layers: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Save config.json and random weights, scaled so that activations keep their size; returns the directory."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)

    weights = {"model.embed_tokens.weight": random(shape.vocab, shape.hidden, shape.hidden**-0.5)}
    weights["model.norm.weight"] = torch.ones(shape.hidden, dtype=dtype)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, (outputs, inputs) in shape.matrices().items():
            weights[f"{prefix}{name}.weight"] = random(outputs, inputs, inputs**-0.5)
        for name, width in shape.norms().items():
            weights[f"{prefix}{name}.weight"] = torch.ones(width, dtype=dtype)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config(layers, dtype)), encoding="utf-8")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def product_cost(rows: int, inputs: int, outputs: int, size: int) -> Cost:
    """x [rows, inputs] times a weight [outputs, inputs], elements of `size` bytes."""
    return Cost(size * (inputs * outputs + rows * (inputs + outputs)), 2 * rows * inputs * outputs)


def attention_cost(rows: Sequence[tuple[int, int]], shape: Shape, size: int) -> Cost:
    """Causal attention; rows are (tokens, keys the last of them sees). Keys and values of a row are read once."""
    tokens = sum(count for count, _ in rows)
    contexts = sum(context for _, context in rows)
    seen = sum(count * context - count * (count - 1) // 2 for count, context in rows)
    num_bytes = size * (2 * tokens * shape.q_width + 2 * contexts * shape.kv_width)
    return Cost(num_bytes, 4 * seen * shape.q_width)  # products with keys, and with values


def norm_cost(rows: int, width: int, size: int, residual: bool) -> Cost:
    """RMSNorm; with a residual its sum is read and written too."""
    return Cost(size * ((4 if residual else 2) * rows * width + width), (5 if residual else 4) * rows * width)


def swiglu_cost(rows: int, width: int, size: int) -> Cost:
    """Gates and ups in, their product out; an exponential counts as one operation."""
    return Cost(size * 3 * rows * width, 5 * rows * width)


def rotation_cost(tokens: int, shape: Shape, size: int) -> Cost:
    """Norm and rotation of queries and keys in place, keys and values to their pages; a table row per token."""
    turned = tokens * (shape.q_width + shape.kv_width)
    moved = 2 * turned + 3 * tokens * shape.kv_width  # keys go out twice, values in and out
    return Cost(size * (moved + 2 * tokens * shape.head_dim), 8 * turned)


def draw_cost(samples: int, vocab: int, size: int) -> Cost:
    """A pass over logits. The noise is integer work and counts as nothing, so its share says how much it costs."""
    return Cost(size * samples * vocab, 2 * samples * vocab)


def markov_cost(rows: int, width: int, vocab: int, rank: int, size: int) -> Cost:
    """`width` slots one after the other, each reading its float32 logits and all of w2: none can wait for the next."""
    weights = size * (width * vocab * rank + rows * width * rank)
    return Cost(weights + 4 * rows * width * vocab, 2 * rows * width * vocab * rank)


def step_cost(rows: Sequence[tuple[int, int]], shape: Shape, layers: int, size: int) -> Cost:
    """Products and attention of a step with logits for every token: nearly all that a step is."""
    tokens = sum(count for count, _ in rows)
    layer = attention_cost(rows, shape, size)
    for outputs, inputs in shape.matrices().values():
        layer += product_cost(tokens, inputs, outputs, size)
    return layer.times(layers) + product_cost(tokens, shape.hidden, shape.vocab, size)
