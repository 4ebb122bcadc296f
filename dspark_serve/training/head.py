"""The trainable DSpark head: DeepSpec's Qwen3 layout as a torch module, in float32, over blocks of many anchors.

DFlash is the same with Markov rank 0. Must not know: where states come from, losses, files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.models.layers import rope_frequencies
from dspark_serve.training.anchors import Blocks


@dataclass(frozen=True)
class FrozenTarget:
    """The target's tensors that a head shares; never trained, never exported."""

    embedding: Tensor  # [vocab, hidden]
    head: Tensor  # [drafted, hidden]: rows of the LM head for the tokens that the head can draft


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + self._eps
        out: Tensor = x * scale.rsqrt() * self.weight
        return out


class Attention(nn.Module):
    """Every slot of a block sees the context before its anchor, and all slots of its own block."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.dim = config.heads, config.kv_heads, dim
        self.q_proj = nn.Linear(hidden, config.heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.heads * dim, hidden, bias=False)
        self.q_norm = Norm(dim, config.norm_eps)
        self.k_norm = Norm(dim, config.norm_eps)

    def forward(self, x: Tensor, context: Tensor, blocks: Blocks, angles: tuple[Tensor, Tensor]) -> Tensor:
        """x: [slots, hidden]; context: [context tokens, hidden]; angles: cos and sin by position [positions, dim]."""
        tokens = context.shape[0]
        both = torch.cat([context, x])  # one product for the keys of both
        q = _rotate(self.q_norm(self.q_proj(x).view(-1, self.heads, self.dim)), angles, blocks.slot_positions)
        positions = torch.cat([blocks.context_positions, blocks.slot_positions])
        k = _rotate(self.k_norm(self.k_proj(both).view(-1, self.kv_heads, self.dim)), angles, positions)
        v = self.v_proj(both).view(-1, self.kv_heads, self.dim)
        q = q * self.dim**-0.5
        out, anchor, first = [], 0, 0
        for length, count in zip(blocks.context_lens, blocks.anchor_counts, strict=True):
            slots = slice(anchor * blocks.size, (anchor + count) * blocks.size)
            own = slice(tokens + slots.start, tokens + slots.stop)
            seen = slice(first, first + length)
            mask = blocks.context_mask[anchor : anchor + count, :length]  # [anchors, length], 0 or -inf
            out.append(self._attend(q[slots], k[seen], v[seen], k[own], v[own], mask))
            anchor, first = anchor + count, first + length
        projected: Tensor = self.o_proj(torch.cat(out))
        return projected

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, mask: Tensor) -> Tensor:
        """One sequence: q [anchors * size, heads, dim] over k, v [length, kv_heads, dim] and the blocks' own."""
        anchors, length = mask.shape
        size, group = q.shape[0] // anchors, self.heads // self.kv_heads
        # [kv_heads, group * anchors * size, dim]
        q = q.view(-1, self.kv_heads, group, self.dim).permute(1, 2, 0, 3).reshape(self.kv_heads, -1, self.dim)
        own_k = own_k.view(anchors, size, self.kv_heads, self.dim).permute(2, 0, 1, 3)  # [kv_heads, anchors, size, dim]
        own_v = own_v.view(anchors, size, self.kv_heads, self.dim).permute(2, 0, 1, 3)
        far = torch.bmm(q, k.permute(1, 2, 0)).view(self.kv_heads, group, anchors, size, length)
        blocked = q.view(self.kv_heads, group, anchors, size, self.dim)
        near = torch.einsum("hgasd,hatd->hgast", blocked, own_k)
        probs = torch.cat([far + mask[:, None, :], near], dim=-1).softmax(-1)
        out = torch.bmm(probs[..., :length].reshape(self.kv_heads, -1, length), v.transpose(0, 1))
        out = out.view(blocked.shape) + torch.einsum("hgast,hatd->hgasd", probs[..., length:], own_v)
        return out.permute(2, 3, 0, 1, 4).reshape(anchors * size, self.heads * self.dim)


class MLP(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Layer(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Tensor, blocks: Blocks, angles: tuple[Tensor, Tensor]) -> Tensor:
        # The context goes straight into the key and value projections, past this layer's input norm.
        x = x + self.self_attn(self.input_layernorm(x), context, blocks, angles)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class MarkovTables(nn.Module):
    """Vanilla Markov bias w2 @ w1[previous], trained as embedding @ A + a free part, so that rare tokens share."""

    def __init__(self, config: HeadConfig, drafted: int) -> None:
        super().__init__()
        rank, hidden = config.markov_rank, config.hidden_size
        self.in_map = nn.Parameter(torch.randn(hidden, rank) * hidden**-0.5)
        self.out_map = nn.Parameter(torch.zeros(hidden, rank))
        self.in_free = nn.Parameter(torch.zeros(drafted, rank))
        self.out_free = nn.Parameter(torch.zeros(drafted, rank))

    def previous(self, tokens: Tensor, target: FrozenTarget, rank_of: Tensor) -> Tensor:
        """Rows of w1 for tokens [slots]; rank_of [vocab] is a token's place among the drafted ones, or -1."""
        place = rank_of[tokens]
        free = F.embedding(place.clamp(min=0), self.in_free) * (place >= 0).unsqueeze(1)
        return target.embedding[tokens] @ self.in_map + free

    def outgoing(self, target: FrozenTarget) -> Tensor:
        """w2 [drafted, rank]."""
        return target.head @ self.out_map + self.out_free


class FoldedTables(nn.Module):
    """The same tables as they are exported and served."""

    def __init__(self, incoming: Tensor, outgoing: Tensor) -> None:
        """w1 [vocab, rank] and w2 [drafted, rank]."""
        super().__init__()
        self.incoming = nn.Parameter(incoming, requires_grad=False)
        self.outgoing_rows = nn.Parameter(outgoing, requires_grad=False)

    def previous(self, tokens: Tensor, target: FrozenTarget, rank_of: Tensor) -> Tensor:
        return F.embedding(tokens, self.incoming)

    def outgoing(self, target: FrozenTarget) -> Tensor:
        return self.outgoing_rows


class TrainableHead(nn.Module):
    """Everything of a head that is trained. Parameter names are DeepSpec's except for the Markov tables.

    Made in main memory, its first weights too: a seed gives the same head wherever it is moved then.
    """

    rank_of: Tensor  # [vocab] int64, a token's place among the drafted ones, or -1
    draft_vocab: Tensor  # [drafted] int64
    cos: Tensor  # [positions, head_dim]
    sin: Tensor

    def __init__(self, config: HeadConfig, draft_vocab: Tensor) -> None:
        """draft_vocab: [drafted] token ids, ascending; a head for the whole vocabulary is trained on its
        frequent tokens all the same."""
        super().__init__()
        if config.family != "qwen3" or config.kind != "dspark" or config.markov_type != "vanilla":
            raise ValueError("only DSpark and DFlash heads in the Qwen3 layout with a vanilla Markov head are trained")
        self.config = config
        hidden, eps = config.hidden_size, config.norm_eps
        self.fc = nn.Linear(len(config.taps) * hidden, hidden, bias=False)
        self.hidden_norm = Norm(hidden, eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = Norm(hidden, eps)
        self.markov: MarkovTables | FoldedTables | None = None
        if config.markov_rank:
            self.markov = MarkovTables(config, len(draft_vocab))
        width = hidden + (config.markov_rank if config.confidence_with_markov else 0)
        self.confidence = nn.Linear(width, 1) if config.confidence else None
        rank_of = torch.full((config.vocab_size,), -1, dtype=torch.int64)
        rank_of[draft_vocab] = torch.arange(len(draft_vocab))
        cos, sin = rope_table(config)
        # Buffers, so that they go where the weights go.
        for name, table in (("rank_of", rank_of), ("draft_vocab", draft_vocab), ("cos", cos), ("sin", sin)):
            self.register_buffer(name, table, persistent=False)

    def backbone(self, states: Tensor, blocks: Blocks, target: FrozenTarget) -> Tensor:
        """Hidden states of all slots after the final norm [slots, hidden]; states: [context tokens, taps * hidden]."""
        context = self.hidden_norm(self.fc(states))
        x = target.embedding[blocks.slot_tokens(self.config.mask_token_id or 0)]
        for layer in self.layers:
            x = layer(x, context, blocks, (self.cos, self.sin))
        out: Tensor = self.norm(x)
        return out

    def confidence_logits(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """[slots]; `previous` are the Markov rows of the tokens before each slot's."""
        assert self.confidence is not None
        if self.config.confidence_with_markov:
            assert previous is not None
            hidden = torch.cat([hidden, previous], dim=-1)
        out: Tensor = self.confidence(hidden).squeeze(-1)
        return out


def rope_table(config: HeadConfig, positions: int = 4096) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, head_dim], in the half-split layout."""
    frequencies, amplitude = rope_frequencies(config.rope, config.head_dim, config.max_positions)
    angles = torch.arange(min(positions, config.max_positions), dtype=torch.float32).outer(frequencies.float())
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * amplitude, angles.sin() * amplitude


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
    cos, sin = (table[positions].unsqueeze(1) for table in angles)  # [tokens, 1, dim]
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
