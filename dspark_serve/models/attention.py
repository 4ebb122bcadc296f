"""Ragged paged attention: prefill, decode and verify are one call. Reference in plain torch, bitwise row-invariant.

AttnMeta is built once per step and passed along; whatever does not depend on the layer is computed there, lazily.
Must not know: requests, models, what the rows are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dspark_kernels.attention import AttentionKernels
from dspark_serve.cache.store import KVStore
from dspark_serve.tensors import StepBatch
from dspark_serve.transfers import to_device

# Row invariance (float32 on CPU) rests on four habits, each found by measurement of MKL's matrix products:
KEY_MULTIPLE = 32  # keys are padded to this with -inf: softmax and QK^T then never see a vector remainder
KEY_BLOCK = 128  # P@V goes in blocks of so many keys, added in order: MKL splits longer sums unevenly (on AMD from 224)
MIN_GEMM_ROWS = 8  # fewer query rows per product select other kernels; wide heads need head_dim / 16 rows

_MAX_SCORES = 2 << 20  # scores held at once: long chunks are attended in pieces
_MAX_QUERIES = 128  # queries per piece: a piece of a chunk reads only the keys up to its own last token
_GROUP_COST = 1 << 20  # what one more group of rows costs per layer, in units of _Shape.cost (about 30 microseconds)


@dataclass(frozen=True)
class _Shape:
    """Heads and widths of one kind of attention layer, and what they imply for the padding of queries."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def per_kv(self) -> int:
        return self.heads // self.kv_heads

    @property
    def min_queries(self) -> int:
        rows = max(MIN_GEMM_ROWS, max(self.head_dim, self.value_dim) // 16)
        return -(-rows // self.per_kv)

    def cost(self, rows: int, queries: int, keys: int) -> int:
        """Relative time of a group: each key element is copied once (about 7 products' worth), then multiplied."""
        return rows * keys * self.kv_heads * (self.head_dim + self.value_dim) * (7 + queries * self.per_kv)


@dataclass
class _Draft:
    """A group of rows while it is being put together (host integers only)."""

    rows: list[int]
    queries: int
    keys: int


@dataclass(frozen=True)
class _Piece:
    """Some queries of a group, attended at once over the group's first `keys` keys."""

    query_index: Tensor  # [rows * kv_heads * queries * per_kv] int64, into [tokens * heads]
    positions: Tensor  # [rows, queries] int64
    keys: int
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by sliding window

    def mask(self, window: int | None) -> Tensor:
        """0 where query sees key, -inf elsewhere: [rows, 1, queries, 1, keys] float32."""
        known = self.masks.get(window)
        if known is None:
            key = torch.arange(self.keys, device=self.positions.device)
            query = self.positions[:, :, None]
            hidden = key > query if window is None else (key > query) | (key <= query - window)
            known = torch.zeros(hidden.shape, device=key.device).masked_fill_(hidden, float("-inf"))
            known = self.masks[window] = known[:, None, :, None, :]
        return known


@dataclass(frozen=True)
class _Group:
    rows: int
    keys: int
    key_index: Tensor  # [rows * kv_heads * keys] int64, into [slots * kv_heads]
    pieces: tuple[_Piece, ...]


@dataclass(frozen=True)
class _Plan:
    groups: tuple[_Group, ...]
    output_index: Tensor  # [tokens * heads] int64, into the pieces' results one after the other


@dataclass(frozen=True)
class AttnMeta:
    """What every attention layer of one step shares. Build with `AttnMeta.build`; valid for that batch only."""

    slots: Tensor  # [tokens] int64
    page_table: Tensor  # [rows, max_pages] int64
    rows: Tensor  # [3, rows] int64: first token, number of tokens, keys visible to the last token
    query_lens: tuple[int, ...]  # [rows]
    context_lens: tuple[int, ...]  # [rows]
    page_size: int
    kernels: AttentionKernels | None = None  # None: torch
    _plans: dict[_Shape, _Plan] = field(default_factory=dict, repr=False)

    @staticmethod
    def build(batch: StepBatch, page_size: int, kernels: AttentionKernels | None = None) -> AttnMeta:
        """Raises ValueError when a row's lengths contradict each other or its page table."""
        room = batch.page_table.shape[1] * page_size
        for row, (queries, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            if not 0 < queries <= context <= room:
                raise ValueError(
                    f"row {row}: {queries} tokens of {context} keys do not fit a page table of {room} slots"
                )
        if sum(batch.query_lens) != batch.slots.shape[0]:
            raise ValueError(f"query_lens add up to {sum(batch.query_lens)}, not {batch.slots.shape[0]} tokens")
        lens = batch.query_lens, batch.context_lens
        return AttnMeta(batch.slots, batch.page_table, batch.spans, *lens, page_size, kernels)

    def plan(self, shape: _Shape) -> _Plan:
        known = self._plans.get(shape)
        if known is None:
            known = self._plans[shape] = _make_plan(self, shape)
        return known


def attend(
    q: Tensor,  # [tokens, heads, head_dim]
    k: Tensor,  # [tokens, kv_heads, head_dim]
    v: Tensor,  # [tokens, kv_heads, value_dim]
    layer: int,
    meta: AttnMeta,
    store: KVStore,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads]
) -> Tensor:
    """Write K/V at the batch's slots of `layer`, then causal attention of every token over its own row's keys.

    `sliding_window` w lets a token see itself and the w - 1 keys before it. `softcap` c bends scaled scores to
    c * tanh(score / c). `sinks` adds one keyless logit per head to each softmax. Returns [tokens, heads, value_dim].
    """
    tokens, heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[1], v.shape[2]
    keys, values = store.keys[layer], store.values[layer]
    if runs_native(meta.kernels, q, keys, value_dim, sinks):
        options = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "sinks": sinks}
        return attend_native(q, k, v, layer, meta, store, **options)  # type: ignore[arg-type]
    store.write(layer, meta.slots, k.to(keys.dtype), v.to(values.dtype))
    plan = meta.plan(_Shape(heads, kv_heads, head_dim, value_dim))
    flat_q = q.reshape(tokens * heads, head_dim)
    flat_k, flat_v = keys.view(-1, head_dim), values.view(-1, value_dim)
    per_kv = heads // kv_heads
    results = []
    for group in plan.groups:
        batch = group.rows * kv_heads
        group_k = flat_k.index_select(0, group.key_index).to(q.dtype).view(batch, group.keys, head_dim)
        group_v = flat_v.index_select(0, group.key_index).to(q.dtype).view(batch, group.keys, value_dim)
        for piece in group.pieces:
            piece_q = flat_q.index_select(0, piece.query_index).mul_(scale).view(batch, -1, head_dim)
            scores = torch.bmm(piece_q, group_k[:, : piece.keys].transpose(1, 2))  # [batch, queries * per_kv, keys]
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            scores.view(group.rows, kv_heads, -1, per_kv, piece.keys).add_(piece.mask(sliding_window))
            probs = _softmax(scores, sinks, kv_heads, per_kv)
            results.append(_weighted_sum(probs, group_v[:, : piece.keys]).view(-1, value_dim))
    flat = results[0] if len(results) == 1 else torch.cat(results)
    return flat.index_select(0, plan.output_index).view(tokens, heads, value_dim)


def runs_native(
    kernels: AttentionKernels | None, q: Tensor, keys: Tensor, value_dim: int, sinks: Tensor | None = None
) -> bool:
    """Whether the kernels have what these heads need."""
    if kernels is None or not kernels.takes(q, keys, sinks is not None):
        return False
    return kernels.attends(q.shape[-1], value_dim)


def attend_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    meta: AttnMeta,
    store: KVStore,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads]
    rotary: tuple[Tensor, Tensor] | None = None,  # positions [tokens], table [positions, 2, head_dim]
    norms: tuple[Tensor, Tensor, float] | None = None,  # RMSNorm weights of queries and keys [head_dim], eps
) -> Tensor:
    """`attend` by the kernels, which norm and rotate queries and keys (in place) on the way."""
    assert meta.kernels is not None
    q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k, v))
    return meta.kernels.attention(
        q,
        k,
        v,
        store.keys[layer],
        store.values[layer],
        meta.slots,
        meta.page_table,
        meta.rows,
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        rotary=rotary,
        norms=norms,
    )


def _softmax(scores: Tensor, sinks: Tensor | None, kv_heads: int, per_kv: int) -> Tensor:
    """Over the last dimension, in float32, returned in the scores' dtype. A sink takes probability, gives nothing."""
    if sinks is None:
        probs = torch.softmax(scores, -1, dtype=torch.float32)
        return probs if scores.dtype == torch.float32 else probs.to(scores.dtype)
    batch, rows = scores.shape[:2]
    # A whole vector of columns goes in front, so that every key keeps its place within a vector for every length.
    front = scores.new_full((batch // kv_heads, kv_heads, rows // per_kv, per_kv, KEY_MULTIPLE), float("-inf"))
    front[..., 0] = sinks.to(scores.dtype).view(kv_heads, 1, per_kv)
    wide = torch.cat([front.view(batch, rows, KEY_MULTIPLE), scores], dim=-1)
    return torch.softmax(wide, -1, dtype=torch.float32).to(scores.dtype)[..., KEY_MULTIPLE:]


def _weighted_sum(probs: Tensor, values: Tensor) -> Tensor:
    """probs [batch, rows, keys] @ values [batch, keys, value_dim], summed over keys in an order that never varies.

    Blocks of keys are added one after the other: a row that masks the last blocks adds exact zeros.
    """
    keys = probs.shape[2]
    if keys <= KEY_BLOCK or probs.device.type != "cpu":
        return torch.bmm(probs, values)
    out = torch.bmm(probs[:, :, :KEY_BLOCK], values[:, :KEY_BLOCK])
    for start in range(KEY_BLOCK, keys, KEY_BLOCK):
        stop = min(start + KEY_BLOCK, keys)
        out += torch.bmm(probs[:, :, start:stop], values[:, start:stop])
    return out


def _group_rows(query_lens: Sequence[int], context_lens: Sequence[int], shape: _Shape) -> list[_Draft]:
    """Rows that are padded to common numbers of queries and keys. Greedy: a row joins where it adds the least time,
    unless a group of its own costs less, so that one long context does not stretch the short ones."""
    groups: list[_Draft] = []
    for row in sorted(range(len(query_lens)), key=lambda r: (-context_lens[r], -query_lens[r])):
        queries = max(query_lens[row], shape.min_queries)
        keys = -(-context_lens[row] // KEY_MULTIPLE) * KEY_MULTIPLE
        best, best_cost = None, _GROUP_COST + shape.cost(1, queries, keys)
        for group in groups:
            size, widest = len(group.rows), max(group.queries, queries)
            if (size + 1) * widest * shape.heads * group.keys > _MAX_SCORES:
                continue  # rows sorted by context: the group's keys are never fewer than this row's
            added = shape.cost(size + 1, widest, group.keys) - shape.cost(size, group.queries, group.keys)
            if added < best_cost:
                best, best_cost = group, added
        if best is None:
            groups.append(_Draft([row], queries, keys))
        else:
            best.rows.append(row)
            best.queries = max(best.queries, queries)
    return groups


def _make_plan(meta: AttnMeta, shape: _Shape) -> _Plan:
    groups = []
    indices: list[Tensor] = []
    first_tokens = [0]
    for queries in meta.query_lens:
        first_tokens.append(first_tokens[-1] + queries)
    for draft in _group_rows(meta.query_lens, meta.context_lens, shape):
        group = _make_group(meta, shape, draft, first_tokens)
        groups.append(group)
        indices.extend(piece.query_index for piece in group.pieces)
    device = meta.slots.device
    order = indices[0] if len(indices) == 1 else torch.cat(indices)
    output_index = torch.empty(first_tokens[-1] * shape.heads, dtype=torch.int64, device=device)
    # A padded query repeats a real one and has the same result: whichever of them is written last will do.
    output_index[order] = torch.arange(order.shape[0], device=device)
    return _Plan(tuple(groups), output_index)


def _make_group(meta: AttnMeta, shape: _Shape, draft: _Draft, first_tokens: Sequence[int]) -> _Group:
    device = meta.slots.device
    size = len(draft.rows)
    host = [[first_tokens[r], meta.query_lens[r], meta.context_lens[r], r] for r in draft.rows]
    first, count, context, row = to_device(device, np.array(host))[0].unsqueeze(2).unbind(1)  # each [rows, 1]
    key = torch.arange(draft.keys, device=device)
    # Padding keys beyond the page table read its last page: masked, so only their being finite matters.
    page = (key // meta.page_size).clamp_(max=meta.page_table.shape[1] - 1)
    slots = meta.page_table[row, page] * meta.page_size + key % meta.page_size  # [rows, keys]
    kv_head = torch.arange(shape.kv_heads, device=device)
    key_index = slots.unsqueeze(1) * shape.kv_heads + kv_head.unsqueeze(1)  # [rows, kv_heads, keys]

    room = max(_MAX_SCORES // (size * shape.heads * draft.keys), shape.min_queries)
    num_pieces = 1 if size > 1 else -(-draft.queries // min(room, max(_MAX_QUERIES, shape.min_queries)))
    per_piece = max(-(-draft.queries // num_pieces), shape.min_queries)
    head = torch.arange(shape.heads, device=device).view(shape.kv_heads, 1, shape.per_kv)
    pieces = []
    for start in range(0, draft.queries, per_piece):
        query = torch.arange(start, start + per_piece, device=device).clamp(max=count - 1)  # [rows, per_piece]
        index = (first + query).view(size, 1, per_piece, 1) * shape.heads + head  # [rows, kv_heads, queries, per_kv]
        last_key = max(meta.context_lens[r] - max(meta.query_lens[r] - start - per_piece, 0) for r in draft.rows)
        keys = min(-(-last_key // KEY_MULTIPLE) * KEY_MULTIPLE, draft.keys)
        pieces.append(_Piece(index.reshape(-1), context - count + query, keys))
    return _Group(size, draft.keys, key_index.reshape(-1), tuple(pieces))
