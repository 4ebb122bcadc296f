"""Rotary embedding of queries and keys, with Qwen3's norms of each head before it, and the scatter of K/V into pages.

Su et al. 2021, in the half-split layout of Transformers; the angles come as a table.
Must not know: requests, who owns a page.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # per program


@triton.jit
def rope_kernel(
    q_ptr,  # [tokens, heads, 2 * HALF], tokens q_stride apart; overwritten
    k_ptr,  # [tokens, kv_heads, 2 * HALF], likewise
    v_ptr,  # [tokens, kv_heads, VALUE_DIM]
    positions_ptr,  # [tokens] int64; not read without ROTATE, nor the next
    table_ptr,  # [positions, 2, 2 * HALF]: cosines, then sines, those of the first half negated
    q_norm_ptr,  # [2 * HALF]; not read without HAS_NORM, nor the next
    k_norm_ptr,  # [2 * HALF]
    slots_ptr,  # [tokens] int64; not read without KEEP, nor the next two
    keys_ptr,  # [slots, kv_heads, 2 * HALF] contiguous, written
    values_ptr,  # [slots, kv_heads, VALUE_DIM] contiguous, written
    heads,
    kv_heads,
    q_stride,
    k_stride,
    v_stride,
    eps,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    ROTATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    KEEP: tl.constexpr,
    HEADS: tl.constexpr,
):
    """HEADS heads of a token: grid (tokens, blocks of query heads, then of K/V heads)."""
    token = tl.program_id(0).to(tl.int64)
    query_blocks = tl.cdiv(heads, HEADS)
    block = tl.program_id(1)
    is_query = block < query_blocks
    if is_query:
        x_ptr = q_ptr + token * q_stride
        norm_ptr = q_norm_ptr
        first = block * HEADS
        count = heads
    else:
        x_ptr = k_ptr + token * k_stride
        norm_ptr = k_norm_ptr
        first = (block - query_blocks) * HEADS
        count = kv_heads
    head = first + tl.arange(0, HEADS)
    dim = tl.arange(0, HALF_PAD)
    in_half = dim < HALF
    mask = (head < count)[:, None] & in_half[None, :]
    x_at = x_ptr + head[:, None] * 2 * HALF + dim[None, :]
    low = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)  # [HEADS, HALF_PAD]
    high = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
        low = low * scale * tl.load(norm_ptr + dim, mask=in_half, other=0.0).to(tl.float32)[None, :]
        high = high * scale * tl.load(norm_ptr + HALF + dim, mask=in_half, other=0.0).to(tl.float32)[None, :]
    turned_low = low
    turned_high = high
    if ROTATE:
        angles = table_ptr + tl.load(positions_ptr + token) * 4 * HALF + dim
        cos_low = tl.load(angles, mask=in_half, other=0.0).to(tl.float32)[None, :]
        cos_high = tl.load(angles + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
        sin_low = tl.load(angles + 2 * HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
        sin_high = tl.load(angles + 3 * HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
        turned_low = low * cos_low + high * sin_low
        turned_high = high * cos_high + low * sin_high
    turned_low = turned_low.to(q_ptr.dtype.element_ty)
    turned_high = turned_high.to(q_ptr.dtype.element_ty)
    if ROTATE or HAS_NORM:
        tl.store(x_at, turned_low, mask=mask)
        tl.store(x_at + HALF, turned_high, mask=mask)
    if KEEP:  # noqa: SIM102 - this is known when compiling, the other is not
        if not is_query:
            place = (tl.load(slots_ptr + token) * kv_heads + head)[:, None]
            kept = keys_ptr + place * 2 * HALF + dim[None, :]
            tl.store(kept, turned_low.to(keys_ptr.dtype.element_ty), mask=mask)
            tl.store(kept + HALF, turned_high.to(keys_ptr.dtype.element_ty), mask=mask)
            value = tl.arange(0, VALUE_PAD)
            in_value = (head < kv_heads)[:, None] & (value < VALUE_DIM)[None, :]
            v_at = v_ptr + token * v_stride + head[:, None] * VALUE_DIM + value[None, :]
            v = tl.load(v_at, mask=in_value, other=0.0)
            v_kept = values_ptr + place * VALUE_DIM + value[None, :]
            tl.store(v_kept, v.to(values_ptr.dtype.element_ty), mask=in_value)


def rotate_and_keep(
    q: Tensor,  # [tokens, heads, head_dim]: overwritten; heads of a token adjacent
    k: Tensor,  # [tokens, kv_heads, head_dim], likewise
    v: Tensor,  # [tokens, kv_heads, value_dim], heads of a token adjacent
    rotary: tuple[Tensor, Tensor] | None,  # positions [tokens] int64; table [positions, 2, head_dim] contiguous
    store: tuple[Tensor, Tensor, Tensor] | None,  # slots [tokens] int64, keys and values [pages, page_size, ..]
    norms: tuple[Tensor, Tensor, float] | None = None,  # RMSNorm of queries, of keys [head_dim] each, eps
) -> None:
    """Norm and rotate queries and keys in place, and write keys and values to their slots; float32 inside.

    The table holds cosines and signed sines, and every position must lie within it. Each part may be left out: without
    a `store` nothing is kept, as of a drafter's block. Slots must be distinct, and within the pages. float32,
    bfloat16 or float16. Raises ValueError for shapes that do not fit.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    _check(q, k, v, rotary, store, norms)
    if not tokens or (rotary is None and store is None and norms is None):
        return
    positions, table = (q, q) if rotary is None else rotary
    slots, keys, values = (q, k, v) if store is None else store
    q_norm, k_norm, eps = (q, k, 0.0) if norms is None else norms
    half = head_dim // 2
    rope_kernel[(tokens, triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS))](
        q,
        k,
        v,
        positions,
        table,
        q_norm,
        k_norm,
        slots,
        keys,
        values,
        heads,
        kv_heads,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        eps,
        HALF=half,
        HALF_PAD=triton.next_power_of_2(half),
        VALUE_DIM=value_dim,
        VALUE_PAD=triton.next_power_of_2(value_dim),
        ROTATE=rotary is not None,
        HAS_NORM=norms is not None,
        KEEP=store is not None,
        HEADS=HEADS,
        num_warps=1,
        enable_fp_fusion=True,
    )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    store: tuple[Tensor, Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor, float] | None,
) -> None:
    tokens, _, head_dim = q.shape
    if head_dim % 2 or k.shape != (tokens, v.shape[1], head_dim) or len(v) != tokens:
        raise ValueError(f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not fit")
    if any(x.stride()[1:] != (x.shape[2], 1) for x in (q, k, v)) or q.dtype != k.dtype:
        raise ValueError(f"heads of a token must be adjacent, and queries and keys of one dtype, not {k.dtype}")
    if rotary is not None:
        positions, table = rotary
        if positions.shape != (tokens,) or not positions.is_contiguous():
            raise ValueError(f"positions must be {tokens} adjacent integers, not {list(positions.shape)}")
        if table.shape[1:] != (2, head_dim) or not table.is_contiguous():
            raise ValueError(f"the table must be contiguous [positions, 2, {head_dim}], not {list(table.shape)}")
    if store is not None:
        slots, keys, values = store
        if slots.shape != (tokens,) or not slots.is_contiguous():
            raise ValueError(f"slots must be {tokens} adjacent integers, not {list(slots.shape)}")
        if keys.shape[2:] != k.shape[1:] or values.shape[2:] != v.shape[1:]:
            raise ValueError(f"keys {list(k.shape)} and values {list(v.shape)} do not fit the pages")
        if not (keys.is_contiguous() and values.is_contiguous()):
            raise ValueError("pages must be contiguous")
    if norms is not None and any(w.shape != (head_dim,) or w.dtype != norms[0].dtype for w in norms[:2]):
        raise ValueError(f"norms of heads must have {head_dim} weights of one dtype")
