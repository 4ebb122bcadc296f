"""What a model asks of attention kernels, whichever they are: those in C++ (native.py) or in Triton (triton/).

Must not know: requests, models, what the rows are for.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionKernels(Protocol):
    """Ragged paged attention: prefill, decode and verification are rows of 1..n queries."""

    def attends(self, head_dim: int, value_dim: int) -> bool:
        """Whether heads may be this wide."""
        ...

    def takes(self, q: Tensor, keys: Tensor, sinks: bool = False) -> bool:
        """Whether queries and pages are of a dtype and in a memory they work on; `sinks`: and there are such."""
        ...

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
        ...
