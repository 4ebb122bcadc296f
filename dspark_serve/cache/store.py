"""The K/V tensors behind the pages: one pair per layer, addressed by page id; geometry may differ by layer.

Target layers come first, draft layers after them in the same pages, so one page id names the context of both.
Must not know: who owns a page (pages.py), or what attention does with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_kernels import huge_pages


@dataclass(frozen=True)
class LayerGeometry:
    """K/V shape of one layer, in elements per token."""

    kv_heads: int
    head_dim: int
    v_head_dim: int | None = None  # None: the same as head_dim

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.kv_heads * (self.head_dim + self.value_dim) * dtype.itemsize


class KVStore:
    """K/V of `num_pages` pages of `page_size` tokens. Page 0 is never assigned: page tables are padded with it.

    Zero-filled: attention multiplies masked positions by zero, which must stay zero. A caller that fills the store
    with something else for a test must keep it finite.
    """

    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.layers = tuple(layers)

        def zeros(kv_heads: int, width: int) -> Tensor:
            shape = num_pages, page_size, kv_heads, width
            if torch.device(device).type == "cpu":
                return huge_pages.zeros(shape, dtype)
            return torch.zeros(shape, dtype=dtype, device=device)

        self.keys = [zeros(g.kv_heads, g.head_dim) for g in layers]
        self.values = [zeros(g.kv_heads, g.value_dim) for g in layers]
        # [slots, width]: a layer's memory, where a drafter that keeps the target's taps wants each token's at its slot.
        self.taps: Tensor | None = None

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k [tokens, kv_heads, head_dim] and v [tokens, kv_heads, value_dim] at slots [tokens]."""
        self.keys[layer].view(-1, *k.shape[1:]).index_copy_(0, slots, k)
        self.values[layer].view(-1, *v.shape[1:]).index_copy_(0, slots, v)

    @staticmethod
    def bytes_per_page(layers: Sequence[LayerGeometry], page_size: int, dtype: torch.dtype) -> int:
        return page_size * sum(g.bytes_per_token(dtype) for g in layers)
