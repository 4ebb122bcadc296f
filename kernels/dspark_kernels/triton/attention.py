"""Ragged paged attention: prefill, decode and verification are rows of 1..n queries over their pages, in one launch.

Online softmax over blocks of keys in order (Milakov and Gimelshein 2018; Dao et al. 2022); pages: Kwon et al. 2023.
A query's sums depend on its own keys alone: blocks start at multiples of one size, and a block that a query does not
see leaves its sums as they are. Must not know: requests, what the rows are for, how K/V came into the pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_kernels.triton import tiles

LOG2_E = 1.4426950408889634
WIDEST_HEAD = 512


@triton.jit
def find_row(firsts, rows, tile, QUERIES: tl.constexpr):
    """The row that owns a tile. Row r's tiles start at firsts[r] // QUERIES + r, which is beyond those of row r - 1."""
    low = tile * 0
    high = low + rows
    while low < high:
        middle = (low + high) // 2
        start = tl.load(firsts + middle).to(tl.int32) // QUERIES + middle
        low = tl.where(start <= tile, middle + 1, low)
        high = tl.where(start <= tile, high, middle)
    return low - 1


@triton.jit
def attend_block(
    q,  # [M, K] in the keys' dtype
    q_position,  # [M] int32
    k,  # [N, K]
    v,  # [N, V]
    visible,  # [N] bool: within the row
    key,  # [N] int32 positions
    sums,  # [M, V] float32
    mass,  # [M] float32
    top,  # [M] float32, in units of log2
    scale,  # scale * log2(e), or scale / softcap
    softcap,  # softcap * log2(e)
    window,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax. Float32 throughout, except the operands of the two products."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_SOFTCAP:  # tanh by way of exp, right at both ends
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * 2.8853900817779268) + 1.0))
    seen = visible[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= q_position[:, None])
    if HAS_WINDOW:
        seen = seen & (key[None, :] > q_position[:, None] - window)
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no difference of infinities
    probs = tl.exp2(scores - anchor[:, None])
    decay = tl.exp2(top - anchor)
    mass = mass * decay + tl.sum(probs, 1)
    sums = tl.dot(probs.to(v.dtype), v, sums * decay[:, None], input_precision=PRECISION)
    return sums, mass, new_top


@triton.jit(do_not_specialize=["rows", "max_pages", "window"])  # they follow the batch and the layer
def attention_kernel(
    q_ptr,  # [tokens, heads, HEAD_DIM]
    k_ptr,  # [tokens, kv_heads, HEAD_DIM]: of a drafted block; not read without BLOCK
    v_ptr,  # [tokens, kv_heads, VALUE_DIM], likewise
    keys_ptr,  # [pages, PAGE_SIZE, kv_heads, HEAD_DIM]
    values_ptr,  # [pages, PAGE_SIZE, kv_heads, VALUE_DIM]
    pages_ptr,  # [rows, max_pages] int64
    firsts_ptr,  # [rows] int64: first token
    counts_ptr,  # [rows] int64: tokens
    contexts_ptr,  # [rows] int64: keys the last token sees
    sinks_ptr,  # [heads] float32; not read without HAS_SINKS
    out_ptr,  # [tokens, heads, VALUE_DIM] contiguous, written
    rows,
    heads,
    kv_heads,
    q_stride,
    k_stride,
    v_stride,
    max_pages,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,  # query heads per K/V head
    GROUP_PAD: tl.constexpr,  # the power of two that holds them
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Some queries of one row, for the query heads of one K/V head: grid (tiles, kv_heads)."""
    QUERIES: tl.constexpr = M // GROUP_PAD
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = find_row(firsts_ptr, rows, tile, QUERIES)
    first = tl.load(firsts_ptr + row)
    count = tl.load(counts_ptr + row).to(tl.int32)
    context = tl.load(contexts_ptr + row).to(tl.int32)
    begin = (tile - (first.to(tl.int32) // QUERIES + row)) * QUERIES
    if begin >= count:  # the bound on tiles leaves one too many for some rows
        return
    lane = tl.arange(0, M)
    query = begin + lane // GROUP_PAD
    head = lane % GROUP_PAD
    real = (query < count) & (head < GROUP)
    q_position = context - count + query  # [M]
    dim = tl.arange(0, HEAD_PAD)
    value_dim = tl.arange(0, VALUE_PAD)
    in_head = dim < HEAD_DIM
    in_value = value_dim < VALUE_DIM
    q_at = (first + query) * q_stride + (kv_head * GROUP + head) * HEAD_DIM
    q = tl.load(q_ptr + q_at[:, None] + dim[None, :], mask=real[:, None] & in_head[None, :], other=0.0)
    q = q.to(keys_ptr.dtype.element_ty)
    sums = tl.zeros([M, VALUE_PAD], tl.float32)
    mass = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    if HAS_SINKS:  # a keyless logit: takes probability, gives nothing
        top = tl.load(sinks_ptr + kv_head * GROUP + head, mask=head < GROUP, other=0.0) * 1.4426950408889634
        mass = tl.full([M], 1.0, tl.float32)

    last = tl.minimum(begin + QUERIES, count)
    # No query of this tile sees further; a block's own keys come after the loop.
    stop = context - count + (0 if BLOCK else last)
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(context - count + begin - window + 1, 0) // N * N
    for at in range(start, stop, N):
        key = at + tl.arange(0, N)
        inside = key < stop
        page = tl.load(pages_ptr + row.to(tl.int64) * max_pages + key // PAGE_SIZE, mask=inside, other=0)
        slot = (page * PAGE_SIZE + key % PAGE_SIZE) * kv_heads + kv_head
        k_at = keys_ptr + slot[:, None] * HEAD_DIM + dim[None, :]
        v_at = values_ptr + slot[:, None] * VALUE_DIM + value_dim[None, :]
        k = tl.load(k_at, mask=inside[:, None] & in_head[None, :], other=0.0)
        v = tl.load(v_at, mask=inside[:, None] & in_value[None, :], other=0.0)  # 0 x garbage may be NaN, 0 x 0 is not
        sums, mass, top = attend_block(
            q, q_position, k, v, inside, key, sums, mass, top, scale, softcap, window,
            not BLOCK, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    if BLOCK:
        for at in range(0, count, N):
            key = at + tl.arange(0, N)
            inside = key < count
            token = first + key
            k_at = k_ptr + token[:, None] * k_stride + kv_head * HEAD_DIM + dim[None, :]
            v_at = v_ptr + token[:, None] * v_stride + kv_head * VALUE_DIM + value_dim[None, :]
            k = tl.load(k_at, mask=inside[:, None] & in_head[None, :], other=0.0).to(keys_ptr.dtype.element_ty)
            v = tl.load(v_at, mask=inside[:, None] & in_value[None, :], other=0.0).to(values_ptr.dtype.element_ty)
            sums, mass, top = attend_block(
                q, q_position, k, v, inside, key, sums, mass, top, scale, softcap, window,
                False, False, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
    out = sums / tl.where(mass > 0.0, mass, 1.0)[:, None]  # lanes that stand for no query saw nothing
    out_at = (first + query).to(tl.int64) * heads * VALUE_DIM + (kv_head * GROUP + head) * VALUE_DIM
    mask = real[:, None] & in_value[None, :]
    tl.store(out_ptr + out_at[:, None] + value_dim[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def attend(
    q: Tensor,  # [tokens, heads, head_dim], heads of a token adjacent
    keys: Tensor,  # [pages, page_size, kv_heads, head_dim] contiguous
    values: Tensor,  # [pages, page_size, kv_heads, value_dim] contiguous
    pages: Tensor,  # [rows, max_pages] int64
    rows: Tensor,  # [3, rows] int64: first token, tokens, and keys its last token sees
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads] float32: one keyless logit per head in each softmax
    block: tuple[Tensor, Tensor] | None = None,  # keys and values of the rows' own tokens, as q is laid out
) -> Tensor:
    """Causal attention of every token over its row's keys; returns [tokens, heads, value_dim] in q's dtype.

    With `block` a row's tokens see its whole context in the pages, which the block is no part of, and each other in
    both directions: a drafter's block. float32, bfloat16 or float16; products in the pages' dtype, sums in float32.
    Rows follow one another in q: rows[0] is the running sum of rows[1]. Slots that no row sees are not read. Raises
    ValueError for shapes that do not fit. Device memory is not looked at: bad page tables are the caller's fault.
    """
    tokens, heads, head_dim = q.shape
    page_size, kv_heads, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    _check(q, keys, values, pages, rows, window, sinks, block)
    out = q.new_empty(tokens, heads, value_dim)
    group = heads // kv_heads
    padded = [max(16, triton.next_power_of_2(width)) for width in (head_dim, value_dim)]
    tile = tiles.attention_tile(tiles.architecture(q.device), max(padded), keys.element_size())
    group_pad = triton.next_power_of_2(group)
    num_rows = rows.shape[1]
    if not tokens:
        return out
    queries = max(tile.rows, group_pad) // group_pad
    k, v = (q, q) if block is None else block
    attention_kernel[(tokens // queries + num_rows, kv_heads)](
        q,
        k,
        v,
        keys,
        values,
        pages,
        rows[0],
        rows[1],
        rows[2],
        q if sinks is None else sinks,
        out,
        num_rows,
        heads,
        kv_heads,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        pages.shape[1],
        scale / softcap if softcap else scale * LOG2_E,
        (softcap or 0.0) * LOG2_E,
        window or 0,
        GROUP=group,
        GROUP_PAD=group_pad,
        HEAD_DIM=head_dim,
        HEAD_PAD=padded[0],
        VALUE_DIM=value_dim,
        VALUE_PAD=padded[1],
        PAGE_SIZE=page_size,
        BLOCK=block is not None,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=bool(softcap),
        HAS_SINKS=sinks is not None,
        PRECISION="ieee",
        M=max(tile.rows, group_pad),
        N=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
    return out


def _check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    rows: Tensor,
    window: int | None,
    sinks: Tensor | None,
    block: tuple[Tensor, Tensor] | None,
) -> None:
    heads, head_dim = q.shape[1:]
    kv_heads, value_dim = keys.shape[2], values.shape[3]
    if not (keys.is_contiguous() and values.is_contiguous() and keys.shape[:3] == values.shape[:3]):
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} are not the pages of one store")
    if keys.dtype != values.dtype or keys.shape[3] != head_dim or heads % kv_heads:
        raise ValueError(f"queries {list(q.shape)} do not fit keys {list(keys.shape)} of {keys.dtype}")
    if pages.dtype != torch.int64 or rows.dtype != torch.int64 or not (pages.is_contiguous() and rows.is_contiguous()):
        raise ValueError("pages and rows must be contiguous int64")
    if rows.shape != (3, pages.shape[0]):
        raise ValueError(f"rows {list(rows.shape)} do not fit a page table of {pages.shape[0]} rows")
    if window is not None and (window < 1 or block is not None):
        raise ValueError(f"a window of {window} keys cannot be had: it needs a key, and no block")
    if sinks is not None and (sinks.shape != (heads,) or sinks.dtype != torch.float32):
        raise ValueError(f"sinks must be {heads} float32, not {list(sinks.shape)} {sinks.dtype}")
    wanted = [("queries", q, heads, head_dim)]
    if block is not None:
        wanted += [("block keys", block[0], kv_heads, head_dim), ("block values", block[1], kv_heads, value_dim)]
    for name, x, count, width in wanted:
        if x.shape != (q.shape[0], count, width) or x.stride()[1:] != (width, 1):
            raise ValueError(f"{name} must be {[q.shape[0], count, width]}, heads adjacent, not {list(x.shape)}")
