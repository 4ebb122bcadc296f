"""The Triton kernels behind the interface of the C++ ones (native.Kernels), for K/V stores and activations on a GPU.

Must not know: models, requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_kernels.triton import attention, noise, rope

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels:
    """Stateless; made so that a model can hold it where it would hold native.Kernels."""

    def attends(self, head_dim: int, value_dim: int) -> bool:
        """Whether there are tiles for heads of these widths, of two bytes an element."""
        return head_dim % 2 == 0 and max(head_dim, value_dim) <= attention.WIDEST_HEAD

    def takes(self, q: Tensor, keys: Tensor, sinks: bool = False) -> bool:
        """Whole or half floats, queries and pages alike, with or without sinks; the device was asked before."""
        return q.dtype == keys.dtype and q.dtype in _DTYPES

    def attention(
        self,
        q: Tensor,  # [tokens, heads, head_dim]; heads of a token adjacent; overwritten if normed or rotated
        k: Tensor,  # [tokens, kv_heads, head_dim], likewise
        v: Tensor,  # [tokens, kv_heads, value_dim]
        keys: Tensor,  # [pages, page_size, kv_heads, head_dim]: k is written here first
        values: Tensor,  # [pages, page_size, kv_heads, value_dim]
        slots: Tensor,  # [tokens] int64, page * page_size + offset
        pages: Tensor,  # [rows, max_pages] int64
        rows: Tensor,  # [3, rows] int64 contiguous: first token, tokens, and keys its last token sees
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,  # [heads]: one keyless logit per head in each softmax
        rotary: tuple[Tensor, Tensor] | None = None,  # positions [tokens], table [positions, 2, head_dim]
        norms: tuple[Tensor, Tensor, float] | None = None,  # RMSNorm of queries, of keys [head_dim] each, eps
        block: bool = False,
    ) -> Tensor:
        """Causal attention of every token over its row's keys; returns [tokens, heads, value_dim].

        As a `block` a row's tokens see its whole context and each other, and their keys and values are not kept.
        """
        rope.rotate_and_keep(q, k, v, rotary, None if block else (slots, keys, values), norms)
        own = (k, v) if block else None
        sinks = None if sinks is None else sinks.float().contiguous()
        paged = q, keys, values, pages, rows
        return attention.attend(*paged, scale=scale, window=window, softcap=softcap, sinks=sinks, block=own)

    def argmax(self, x: Tensor) -> Tensor:
        """Index of the largest entry per row, the lowest on ties, the first NaN if any; x [rows, width]."""
        nothing = x.new_zeros(x.shape[0]).float()
        index = nothing.long()
        return noise.draw(x.contiguous(), nothing, index, index)
