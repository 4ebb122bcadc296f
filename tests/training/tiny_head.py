"""A tiny target's weights, passages and head, all random and seeded; and a head's forward written the slow way."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.models.dense_config import DenseConfig
from dspark_serve.training.anchors import Passage
from dspark_serve.training.head import FrozenTarget, TrainableHead
from dspark_serve.training.target import TargetWeights

VOCAB, HIDDEN, LAYERS = 40, 32, 4


def head_config(**changes: object) -> HeadConfig:
    plain = HeadConfig(
        architecture="Qwen3DSparkModel",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        max_positions=128,
        rope={"rope_type": "default", "rope_theta": 1000.0},
        num_target_layers=LAYERS,
        taps=(0, 2),
        block_size=3,
        mask_token_id=7,
        markov_rank=4,
        confidence=True,
        confidence_with_markov=True,
        draft_vocab_size=24,
    )
    return dataclasses.replace(plain, **changes)


def target_weights(seed: int = 0) -> TargetWeights:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rope_theta": 1000.0,
        "tie_word_embeddings": True,
    }
    shapes = {
        "self_attn.q_proj": (32, HIDDEN),
        "self_attn.k_proj": (16, HIDDEN),
        "self_attn.v_proj": (16, HIDDEN),
        "self_attn.o_proj": (HIDDEN, 32),
        "mlp.gate_proj": (48, HIDDEN),
        "mlp.up_proj": (48, HIDDEN),
        "mlp.down_proj": (HIDDEN, 48),
    }
    layers = {}
    for layer in (LAYERS - 2, LAYERS - 1):
        layers |= {f"{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        layers |= {f"{layer}.{name}.weight": torch.ones(HIDDEN) for name in _NORMS}
    embedding = random(VOCAB, HIDDEN)
    return TargetWeights(Path(), raw, DenseConfig.parse(raw), embedding, torch.ones(HIDDEN), embedding, layers)


_NORMS = ("input_layernorm", "post_attention_layernorm")


def passage(weights: TargetWeights, length: int = 20, prompt: int = 6, seed: int = 0, taps: int = 2) -> Passage:
    generator = torch.Generator().manual_seed(seed)
    last = weights.last_hidden(torch.randn(length - 1, HIDDEN, generator=generator))
    return Passage(
        tokens=torch.randint(0, VOCAB, (length,), generator=generator),
        states=torch.randn(length - 1, taps * HIDDEN, generator=generator),
        last_hidden=last,
        log_totals=weights.logits(last).logsumexp(-1),
        num_prompt=prompt,
    )


def random_head(config: HeadConfig, weights: TargetWeights, seed: int = 0) -> tuple[TrainableHead, FrozenTarget]:
    """Every weight drawn, so that a test sees all of them."""
    torch.manual_seed(seed)
    size = config.draft_vocab_size or config.vocab_size
    vocab = torch.randperm(config.vocab_size)[:size].sort().values
    head = TrainableHead(config, vocab)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return head, FrozenTarget(weights.embedding, weights.head[vocab].contiguous())


def slow_block(
    tensors: dict[str, Tensor], config: HeadConfig, embedding: Tensor, states: Tensor, anchor: int, anchor_token: int
) -> Tensor:
    """Hidden states [size, hidden] of one block from exported tensors, position by position and head by head."""
    t = {name: tensor.float() for name, tensor in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), t[f"{name}.weight"], config.norm_eps)

    def turn(x: Tensor, position: int) -> Tensor:  # x [head_dim]
        half = config.head_dim // 2
        out = x.clone()
        for i in range(half):
            angle = position * float(config.rope["rope_theta"]) ** (-2 * i / config.head_dim)
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    context = norm(states[:anchor] @ t["fc.weight"].T, "hidden_norm")
    ids = torch.tensor([anchor_token] + [config.mask_token_id or 0] * (config.block_size - 1))
    x, dim = embedding[ids], config.head_dim
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        inner = norm(x, f"{name}.input_layernorm")
        both = torch.cat([context, inner])
        rows = []
        for slot in range(config.block_size):
            heads = []
            for h in range(config.heads):
                kv = h // (config.heads // config.kv_heads)
                wq, wk, wv = (t[f"{name}.self_attn.{p}_proj.weight"] for p in "qkv")
                query = norm(inner[slot] @ wq[h * dim : (h + 1) * dim].T, f"{name}.self_attn.q_norm")
                query = turn(query, anchor + slot)
                keys = norm(both @ wk[kv * dim : (kv + 1) * dim].T, f"{name}.self_attn.k_norm")
                keys = torch.stack([turn(key, position) for position, key in enumerate(keys)])
                probs = (keys @ query / math.sqrt(dim)).softmax(-1)
                heads.append(probs @ (both @ wv[kv * dim : (kv + 1) * dim].T))
            rows.append(torch.cat(heads) @ t[f"{name}.self_attn.o_proj.weight"].T)
        x = x + torch.stack(rows)
        inner = norm(x, f"{name}.post_attention_layernorm")
        gate, up = (inner @ t[f"{name}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ t[f"{name}.mlp.down_proj.weight"].T
    return norm(x, "norm")
