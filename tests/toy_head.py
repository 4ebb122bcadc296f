"""A random DSpark head on disk for a random target: real files of the real format, whose drafts are accepted by luck.

With coupled noise luck is frequent: two nearly flat distributions that share their noise mostly draw the same token.
"""

import json

import torch
from safetensors.torch import save_file

from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.models.loader import read_config


def write_toy_head(directory, target_dir, layers=1, block_size=4, rank=8, seed=1):
    """For the target in `target_dir`, whose embedding and LM head it borrows; returns the directory."""
    target = read_config(target_dir)
    config = HeadConfig(
        architecture="Qwen3DSparkModel",
        vocab_size=target["vocab_size"],
        hidden_size=target["hidden_size"],
        intermediate_size=target["intermediate_size"],
        num_layers=layers,
        heads=target["num_attention_heads"],
        kv_heads=target["num_key_value_heads"],
        head_dim=target["head_dim"],
        norm_eps=1e-6,
        max_positions=target["max_position_embeddings"],
        rope={"rope_type": "default", "rope_theta": 10_000.0},
        num_target_layers=target["num_hidden_layers"],
        taps=(-1, 0),
        block_size=block_size,
        mask_token_id=2,
        markov_rank=rank,
        confidence=True,
        confidence_with_markov=True,
    )
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(name, *shape, scale=None):
        scale = shape[-1] ** -0.5 if scale is None else scale
        tensors[f"{name}.weight"] = (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)

    def norm(name, width):
        drawn = 1 + 0.1 * torch.randn(width, generator=generator)
        tensors[f"{name}.weight"] = drawn.to(torch.bfloat16)

    c, hidden = config, config.hidden_size
    add("fc", hidden, len(c.taps) * hidden)
    norm("hidden_norm", hidden)
    norm("norm", hidden)
    for layer in range(layers):
        prefix = f"layers.{layer}."
        for name, width in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
            add(f"{prefix}self_attn.{name}_proj", width * c.head_dim, hidden)
        add(f"{prefix}self_attn.o_proj", hidden, c.heads * c.head_dim)
        for name in ("gate", "up"):
            add(f"{prefix}mlp.{name}_proj", c.intermediate_size, hidden)
        add(f"{prefix}mlp.down_proj", hidden, c.intermediate_size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm(prefix + name, hidden)
        for name in ("q_norm", "k_norm"):
            norm(f"{prefix}self_attn.{name}", c.head_dim)
    add("markov_head.markov_w1", c.vocab_size, rank, scale=1.0)
    add("markov_head.markov_w2", c.vocab_size, rank)
    add("confidence_head.proj", 1, hidden + rank)
    tensors["confidence_head.proj.bias"] = torch.zeros(1, dtype=torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
