"""The decoder layers of a head, in Qwen3's layout and in Gemma 4's, and attention over paged context plus a block.

Context keys and values lie in the paged store; those of the block being drafted are passed along and thrown away.
Must not know: requests, how drafts are drawn, which head the layers belong to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels.attention import AttentionKernels
from dspark_kernels.blocks import BlockWeight
from dspark_kernels.packed import PackedWeight
from dspark_serve.cache.store import KVStore
from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.drafters.head_weights import HeadWeights
from dspark_serve.drafters.rows import DraftRows
from dspark_serve.models.layers import Affine, Finish, Linear, NativeLinear, RMSNorm


@dataclass(frozen=True)
class Context:
    """Where the context of some rows lies: entries of every K/V head, rows padded to a common length and masked."""

    key_index: Tensor  # [rows * kv_heads * keys] int64, into [slots * kv_heads]
    mask: Tensor  # [rows, 1, keys] float32: 0, or -inf for padding
    keys: int

    @staticmethod
    def build(slots: Tensor, visible: Tensor, kv_heads: int) -> Context:
        """slots [rows, keys] int64; visible [rows, keys] bool."""
        head = torch.arange(kv_heads, device=slots.device).unsqueeze(1)
        index = slots.unsqueeze(1) * kv_heads + head  # [rows, kv_heads, keys]
        mask = torch.zeros(visible.shape, device=slots.device).masked_fill_(~visible, float("-inf"))
        return Context(index.flatten(), mask.unsqueeze(1), slots.shape[1])


@dataclass(frozen=True)
class HeadLayer:
    """One decoder layer. `width` features go in (EAGLE-3: twice the hidden size), hidden_size come out."""

    config: HeadConfig
    input_norm: RMSNorm
    q: Linear  # width -> heads * head_dim
    kv: Linear  # width -> 2 * kv_heads * head_dim; keys alone where values equal them
    q_norm: RMSNorm
    k_norm: RMSNorm
    v_norm: RMSNorm | None  # Gemma 4, without a weight
    finish: Finish  # out-projection and MLP: (heads * head_dim, hidden_size) -> hidden_size
    kernels: AttentionKernels | None  # that attention within a block may use
    qkv: PackedWeight | None  # both projections as one, where the C++ kernels have them so

    @staticmethod
    def load(config: HeadConfig, weights: HeadWeights, layer: int, width: int) -> HeadLayer:
        c, prefix = config, f"layers.{layer}."
        attention = f"{prefix}self_attn."
        input_norm = weights.norm(f"{prefix}input_layernorm.weight", c.hidden_size, c.norm_eps)
        q, kv, qkv = _projections(c, weights, attention, width)
        gemma = c.family == "gemma4"
        return HeadLayer(
            config=c,
            input_norm=input_norm,
            q=q,
            kv=kv,
            q_norm=weights.norm(f"{attention}q_norm.weight", c.head_dim, c.norm_eps),
            k_norm=weights.norm(f"{attention}k_norm.weight", c.head_dim, c.norm_eps),
            v_norm=RMSNorm(weights.ones(c.head_dim), c.norm_eps) if gemma else None,
            finish=(_gemma_finish if gemma else _qwen_finish)(c, weights, prefix),
            kernels=weights.ops.attention,
            qkv=qkv,
        )

    @property
    def scale(self) -> float:
        return self.config.head_dim**-0.5 if self.config.family == "qwen3" else 1.0

    def attend_block(
        self, x: Tensor, positions: Tensor, table: Tensor, rows: DraftRows, spans: Tensor, store: KVStore, layer: int
    ) -> Tensor:
        """By the kernels, from normed input x [n, width]; see `attend`.

        positions [n] index the rotary table; spans [3, rows]: each row's first token, tokens, and keys it sees.
        """
        assert self.kernels is not None
        c = self.config
        q = self.q(x).view(-1, c.heads, c.head_dim)
        kv = self.kv(x).view(-1, 1 if c.k_eq_v else 2, c.kv_heads, c.head_dim)
        values = kv[:, -1] if self.v_norm is None else self.v_norm(kv[:, -1])
        out = self.kernels.attention(
            q,
            kv[:, 0],
            values,
            store.keys[layer],
            store.values[layer],
            positions,  # not used: nothing is kept
            rows.pages,
            spans,
            scale=self.scale,
            rotary=(positions, table),
            norms=(self.q_norm.weight, self.k_norm.weight, c.norm_eps),
            block=True,
        )
        return out.view(-1, c.heads * c.head_dim)

    def queries(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, heads, head_dim], normed, not yet turned."""
        return self.q_norm(self.q(x).view(-1, self.config.heads, self.config.head_dim))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[n, width] -> keys, normed but not yet turned, and values: both [n, kv_heads, head_dim]."""
        c = self.config
        kv = self.kv(x).view(-1, 1 if c.k_eq_v else 2, c.kv_heads, c.head_dim)
        values = kv[:, -1]
        return self.k_norm(kv[:, 0]), values if self.v_norm is None else self.v_norm(values)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context, store: KVStore, layer: int) -> Tensor:
        """Every query sees its row's whole context and all of the block's keys: no mask within the block.

        q: [rows, queries, heads, head_dim], k and v: [rows, block, kv_heads, head_dim], turned; `layer` counts in the
        store. Returns [rows * queries, heads * head_dim].
        """
        c = self.config
        rows, queries, block = q.shape[0], q.shape[1], k.shape[1]
        k = torch.cat([self._gather(store.keys[layer], context, rows), k.transpose(1, 2).to(q.dtype)], dim=2)
        v = torch.cat([self._gather(store.values[layer], context, rows), v.transpose(1, 2).to(q.dtype)], dim=2)
        # [rows * kv_heads, queries * heads per K/V head, head_dim]
        grouped = q.view(rows, queries, c.kv_heads, -1, c.head_dim).transpose(1, 2)
        grouped = grouped.reshape(rows * c.kv_heads, -1, c.head_dim)
        scores = torch.bmm(grouped * self.scale, k.flatten(0, 1).transpose(1, 2)).float()  # [.., keys + block]
        mask = F.pad(context.mask, (0, block))  # [rows, 1, keys + block]
        scores = scores.view(rows, -1, scores.shape[-1]).add_(mask).view_as(scores)
        probs = scores.softmax(-1).to(v.dtype)
        out = torch.bmm(probs, v.flatten(0, 1))  # [rows * kv_heads, queries * per_kv, head_dim]
        out = out.view(rows, c.kv_heads, queries, -1, c.head_dim).transpose(1, 2)
        return out.reshape(rows * queries, -1)

    def _gather(self, stored: Tensor, context: Context, rows: int) -> Tensor:
        """[rows, kv_heads, keys, head_dim] of the context."""
        head_dim = stored.shape[-1]
        flat = stored.view(-1, head_dim).index_select(0, context.key_index)
        return flat.view(rows, self.config.kv_heads, context.keys, head_dim)


def _projections(
    config: HeadConfig, weights: HeadWeights, prefix: str, width: int
) -> tuple[Linear, Linear, PackedWeight | None]:
    """Queries, keys with values, and both as one weight where the C++ kernels can share it."""
    c, q_width, kv_width = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    parts = {f"{prefix}q_proj": q_width, f"{prefix}k_proj": kv_width}
    if not c.k_eq_v:
        parts[f"{prefix}v_proj"] = kv_width
    weight, bias = weights.affine(parts, width, c.attention_bias)
    if weights.ops.library is not None:
        joint = PackedWeight(weights.ops.library, weight, bias, gated=False)
        q, kv = joint.part(0, q_width), joint.part(q_width, joint.outputs)
        if q is not None and kv is not None:
            linears = (NativeLinear(weights.ops.library, part, norm=None) for part in (q, kv))
            return next(linears), next(linears), joint
    biases = (None, None) if bias is None else (bias[:q_width], bias[q_width:])
    rows = weight.rows if isinstance(weight, BlockWeight) else weight.__getitem__
    q_rows, kv_rows = rows(slice(q_width)), rows(slice(q_width, None))
    return weights.ops.linear(q_rows, biases[0]), weights.ops.linear(kv_rows, biases[1]), None


def _parts(config: HeadConfig, weights: HeadWeights, prefix: str) -> tuple[Affine, Affine, Affine]:
    """out-projection, gates with ups, and down-projection."""
    c = config
    out = weights.affine({f"{prefix}self_attn.o_proj": c.hidden_size}, c.heads * c.head_dim, c.attention_bias)
    gate_up = {f"{prefix}mlp.gate_proj": c.intermediate_size, f"{prefix}mlp.up_proj": c.intermediate_size}
    down = weights.affine({f"{prefix}mlp.down_proj": c.hidden_size}, c.intermediate_size)
    return out, weights.affine(gate_up, c.hidden_size), down


def _qwen_finish(config: HeadConfig, weights: HeadWeights, prefix: str) -> Finish:
    out, gate_up, down = _parts(config, weights, prefix)
    norm = weights.norm(f"{prefix}post_attention_layernorm.weight", config.hidden_size, config.norm_eps)
    return weights.ops.finish(out, norm, gate_up, down)


def _gemma_finish(config: HeadConfig, weights: HeadWeights, prefix: str) -> Finish:
    """Norms on what attention adds and on what the MLP adds, and a factor for the layer's output."""
    out, gate_up, down = (weights.ops.linear(*affine) for affine in _parts(config, weights, prefix))
    after_attention, before_mlp, after_mlp = (
        weights.norm(f"{prefix}{name}_layernorm.weight", config.hidden_size, config.norm_eps)
        for name in ("post_attention", "pre_feedforward", "post_feedforward")
    )
    scalar = weights.take(f"{prefix}layer_scalar", 1)

    def finish(attended: Tensor, hidden: Tensor) -> Tensor:
        hidden = hidden + after_attention(out(attended))
        gate, up = gate_up(before_mlp(hidden)).chunk(2, dim=-1)
        return (hidden + after_mlp(down(F.gelu(gate, approximate="tanh") * up))) * scalar

    return finish
