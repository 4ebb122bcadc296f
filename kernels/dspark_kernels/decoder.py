"""A stack of decoder layers in one call of the C++ kernels: what native.py does layer by layer, the same bits."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dspark_kernels.native import Attention, Kernels
from dspark_kernels.packed import Packed, PackedWeight, pointer


class _Layer(ctypes.Structure):  # mirrors decoder.h, as does Decoding
    _fields_ = (
        *((name, Packed) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "keys", "values")),
        ("window", c_int64),
    )


class Decoding(ctypes.Structure):
    """A pass over a DecoderStack, to be run by itself or within a larger call."""

    taps: Tensor | None  # outputs of the layers asked for side by side [tokens, len(taps) * hidden]
    alive: tuple[object, ...]  # what the pointers lead to
    library: ctypes.CDLL
    _fields_ = (
        *((name, c_void_p) for name in ("layers", "attention", "tap_column", "norm", "hidden", "tapped", "tap_slots")),
        *((name, c_void_p) for name in ("normed", "qkv", "attended", "middle", "between")),
        *((name, c_int64) for name in ("count", "rows", "width", "tap_stride")),
        ("eps", c_float),
    )

    def run(self) -> Tensor | None:
        """All layers, once. Returns the taps, None without any or where they went elsewhere."""
        self.library.dspark_decoder(ctypes.byref(self))
        return self.taps


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer: norm, q/k/v, norms of heads, attention, out-projection, norm, gated MLP, two residuals."""

    attention_norm: Tensor  # [hidden] contiguous float32, as all norms; hidden must fill vectors
    qkv: PackedWeight  # hidden -> (heads + 2 * kv_heads) * head_dim
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    out: PackedWeight
    mlp_norm: Tensor  # [hidden]
    gate_up: PackedWeight  # gated
    down: PackedWeight
    window: int | None


class DecoderStack:
    """Layers of equal shape over a paged store. Not safe for several threads at once."""

    def __init__(
        self, kernels: Kernels, layers: Sequence[LayerWeights], heads: int, kv_heads: int, head_dim: int, eps: float
    ) -> None:
        """Raises ValueError where `fits` says no."""
        if not self.fits(kernels, layers, head_dim):
            raise ValueError(f"heads of {head_dim} or these norms do not fill vectors of {kernels.lanes}")
        self._kernels, self._weights = kernels, tuple(layers)
        self._heads, self._kv_heads, self._head_dim, self._eps = heads, kv_heads, head_dim, eps
        self._layers = (_Layer * len(layers))(*(_Layer(*_fields(layer), window=layer.window or 0) for layer in layers))
        self._store: list[Tensor] = []  # whose keys and values those layers have

    @staticmethod
    def fits(kernels: Kernels, layers: Sequence[LayerWeights], head_dim: int) -> bool:
        """Whether heads and norms fill whole vectors."""
        widths = {width for layer in layers for width in (layer.qkv.inputs, layer.gate_up.inputs)}
        return kernels.attends(head_dim, head_dim) and all(width % kernels.lanes == 0 for width in widths)

    def __call__(
        self,
        hidden: Tensor,  # [tokens, hidden] float32 contiguous; overwritten with the last layer's output
        keys: Sequence[Tensor],  # per layer [pages, page_size, kv_heads, head_dim]: the step's are written here
        values: Sequence[Tensor],
        slots: Tensor,  # [tokens] int64
        pages: Tensor,  # [rows, max_pages] int64
        rows: Tensor,  # [3, rows] int64, as for Kernels.attention
        rotary: tuple[Tensor, Tensor],  # positions [tokens], table [positions, 2, head_dim]
        *,
        block: bool = False,  # as for Kernels.attention; slots are not looked at then
        taps: Sequence[int] = (),  # different layers, whose output is wanted
        into: Tensor | None = None,  # [slots of the store, len(taps) * hidden]: there, each token's at its slot
        norm: Tensor | None = None,  # [hidden] contiguous: RMSNorm of the last layer's output; not of taps
    ) -> Decoding:
        """Of which nothing is computed yet. Good until the stack is called with another store."""
        tokens, width = hidden.shape
        self._store = into_layers(self._layers, keys, values, self._store)
        first = self._weights[0]
        sizes = (width, first.qkv.outputs, self._heads * self._head_dim, width, first.gate_up.outputs)
        scratch = hidden.new_empty(tokens * sum(sizes))
        if into is not None and into.shape[1] != len(taps) * width:
            raise ValueError(f"{len(taps)} taps of {width} do not fill rows of {into.shape[1]}")
        tapped = hidden.new_empty(tokens, len(taps) * width) if taps and into is None else None
        columns = [-1] * len(self._layers)
        for index, tap in enumerate(taps):
            columns[tap] = index * width
        attention = self._attention(keys[0].shape[1], tokens, slots, pages, rows, rotary)
        attention.block = block
        column = (c_int64 * len(columns))(*columns)
        run = Decoding(
            ctypes.addressof(self._layers),
            ctypes.addressof(attention),
            ctypes.addressof(column),
            pointer(norm),
            hidden.data_ptr(),
            pointer(tapped if into is None else into),
            None if into is None else slots.data_ptr(),
            *(scratch.data_ptr() + 4 * tokens * before for before in accumulate(sizes[:-1], initial=0)),
            len(self._layers),
            tokens,
            width,
            len(taps) * width,
            self._eps,
        )
        run.taps, run.library = tapped, self._kernels.library
        run.alive = attention, column, scratch, hidden, slots, pages, rows, rotary, norm, into, self
        return run

    def _attention(
        self, page_size: int, tokens: int, slots: Tensor, pages: Tensor, rows: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Attention:
        """What is the same in every layer."""
        positions, table = rotary
        first, row_bytes = rows.data_ptr(), rows.shape[1] * 8
        return Attention(
            cosine=table.data_ptr(),
            sine=table.data_ptr() + self._head_dim * 4,
            positions=positions.data_ptr(),
            slots=slots.data_ptr(),
            pages=pages.data_ptr(),
            first=first,
            queries=first + row_bytes,
            contexts=first + 2 * row_bytes,
            tokens=tokens,
            rows=rows.shape[1],
            max_pages=pages.shape[1],
            page_size=page_size,
            heads=self._heads,
            kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            value_dim=self._head_dim,
            table_stride=2 * self._head_dim,
            threads=torch.get_num_threads(),
            scale=self._head_dim**-0.5,
            eps=self._eps,
        )


def into_layers(layers: Any, keys: Sequence[Tensor], values: Sequence[Tensor], before: list[Tensor]) -> list[Tensor]:
    """Tells structures of layers where their keys and values are. `before`: what they were told last, mostly the same;
    returns what to pass as that next time."""
    if len(keys) != len(layers) or len(values) != len(layers):
        raise ValueError(f"{len(layers)} layers with keys for {len(keys)} and values for {len(values)}")
    store = [*keys, *values]
    if len(store) != len(before) or not all(map(operator.is_, store, before)):
        for layer, k, v in zip(layers, keys, values, strict=True):
            layer.keys, layer.values = k.data_ptr(), v.data_ptr()
    return store


def _fields(layer: LayerWeights) -> list[object]:
    packed = (layer.qkv, layer.out, layer.gate_up, layer.down)
    norms = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
    return [
        *(weight.structure for weight in packed),
        *(None if norm is None else norm.data_ptr() for norm in norms),
    ]
