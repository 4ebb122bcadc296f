"""The decoder layers of a head, in Qwen3's layout and in Gemma 4's, and attention over paged context plus a block.

Context keys and values lie in the paged store; those of the block being drafted are passed along and thrown away.
Must not know: requests, how drafts are drawn, which head the layers belong to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_serve.cache.store import KVStore
from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.drafters.head_weights import HeadWeights
from dspark_serve.models.layers import Linear, RMSNorm, swiglu


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
    out: Linear
    gate_up: Linear
    down: Linear
    mlp_norm: RMSNorm
    attention_norm: RMSNorm | None  # Gemma 4: on what attention adds, and on what the MLP adds
    after_mlp_norm: RMSNorm | None
    scalar: Tensor | None  # Gemma 4: [1], times the layer's output

    @staticmethod
    def load(config: HeadConfig, weights: HeadWeights, layer: int, width: int) -> HeadLayer:
        c, prefix = config, f"layers.{layer}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim
        kv = {f"{attention}k_proj": kv_width}
        if not c.k_eq_v:
            kv[f"{attention}v_proj"] = kv_width
        gemma = c.family == "gemma4"

        def norm(name: str) -> RMSNorm:
            return weights.norm(f"{prefix}{name}.weight", c.hidden_size, c.norm_eps)

        return HeadLayer(
            config=c,
            input_norm=norm("input_layernorm"),
            q=weights.linear({f"{attention}q_proj": q_width}, width, c.attention_bias),
            kv=weights.linear(kv, width, c.attention_bias),
            q_norm=weights.norm(f"{attention}q_norm.weight", c.head_dim, c.norm_eps),
            k_norm=weights.norm(f"{attention}k_norm.weight", c.head_dim, c.norm_eps),
            v_norm=RMSNorm(weights.ones(c.head_dim), c.norm_eps) if gemma else None,
            out=weights.linear({f"{attention}o_proj": c.hidden_size}, q_width, c.attention_bias),
            gate_up=weights.linear(
                {f"{mlp}gate_proj": c.intermediate_size, f"{mlp}up_proj": c.intermediate_size}, c.hidden_size
            ),
            down=weights.linear({f"{mlp}down_proj": c.hidden_size}, c.intermediate_size),
            mlp_norm=norm("pre_feedforward_layernorm" if gemma else "post_attention_layernorm"),
            attention_norm=norm("post_attention_layernorm") if gemma else None,
            after_mlp_norm=norm("post_feedforward_layernorm") if gemma else None,
            scalar=weights.take(f"{prefix}layer_scalar", 1) if gemma else None,
        )

    def queries(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, heads, head_dim], normed, not yet turned."""
        return self.q_norm(self.q(x).view(-1, self.config.heads, self.config.head_dim))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[n, width] -> keys, normed but not yet turned, and values: both [n, kv_heads, head_dim]."""
        c = self.config
        kv = self.kv(x).view(-1, 1 if c.k_eq_v else 2, c.kv_heads, c.head_dim)
        values = kv[:, -1]
        return self.k_norm(kv[:, 0]), values if self.v_norm is None else self.v_norm(values)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Residual stream [n, hidden_size] after attention's result [n, heads * head_dim] and the MLP are added."""
        added = self.out(attended)
        hidden = hidden + (added if self.attention_norm is None else self.attention_norm(added))
        gate_up = self.gate_up(self.mlp_norm(hidden))
        if self.after_mlp_norm is None:
            return hidden + self.down(swiglu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = hidden + self.after_mlp_norm(self.down(F.gelu(gate, approximate="tanh") * up))
        return hidden if self.scalar is None else hidden * self.scalar

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
        if c.family == "qwen3":
            grouped = grouped * c.head_dim**-0.5
        scores = torch.bmm(grouped, k.flatten(0, 1).transpose(1, 2)).float()  # [.., keys + block]
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
