"""The parts of a draft head that are neither layers nor products, in one call each of the C++ kernels (head.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_kernels.decoder import into_layers
from dspark_kernels.native import Attention, Draw, Kernels
from dspark_kernels.packed import Packed, PackedWeight, pointer


class _ContextLayer(ctypes.Structure):  # mirrors head.cpp, as do the others
    _fields_ = (("kv", Packed), *((name, c_void_p) for name in ("k_norm", "keys", "values")))


class _Context(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("layers", "attention")),
        ("fc", Packed),
        *((name, c_void_p) for name in ("norm", "taps", "features", "normed", "kv")),
        ("count", c_int64),
        ("eps", c_float),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("base", "hidden", "embedding", "confidence", "anchors")),
        ("bias", Packed),
        ("draw", Draw),
        *((name, c_void_p) for name in ("logits", "tokens", "largest", "accepted", "embedded")),
        *((name, c_int64) for name in ("slots", "hidden_size")),
    )


@dataclass
class ContextWriter:
    """Draft K/V of committed tokens from the target's hidden states: norm(fc(taps)) through every layer's projection.

    Norms must fill vectors, and so must heads. Not safe for several threads at once.
    """

    kernels: Kernels
    fc: PackedWeight  # taps -> hidden
    norm: Tensor  # [hidden] float32, contiguous
    layers: Sequence[tuple[PackedWeight, Tensor]]  # hidden -> keys and values of all K/V heads; norm of keys [head_dim]
    kv_heads: int
    head_dim: int
    eps: float

    def __post_init__(self) -> None:
        made = (_ContextLayer(kv.structure, norm.data_ptr()) for kv, norm in self.layers)
        self._layers = (_ContextLayer * len(self.layers))(*made)
        self._fc = self.fc.structure
        self._store: list[Tensor] = []  # whose keys and values those layers have

    def __call__(
        self,
        taps: Tensor,  # [tokens, fc.inputs] float32 contiguous
        slots: Tensor,  # [tokens] int64, where in the store
        rotary: tuple[Tensor, Tensor],  # positions [tokens] int64, table [positions, 2, head_dim]
        keys: Sequence[Tensor],  # per layer [pages, page_size, kv_heads, head_dim]
        values: Sequence[Tensor],
    ) -> None:
        tokens, (positions, table) = taps.shape[0], rotary
        attention = Attention(
            cosine=table.data_ptr(),
            sine=table.data_ptr() + self.head_dim * 4,
            positions=positions.data_ptr(),
            slots=slots.data_ptr(),
            tokens=tokens,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            table_stride=2 * self.head_dim,
            threads=torch.get_num_threads(),
            eps=self.eps,
        )
        self._store = into_layers(self._layers, keys, values, self._store)
        hidden, width = self.fc.outputs, 2 * self.kv_heads * self.head_dim
        scratch = taps.new_empty(tokens * (2 * hidden + width))
        features = scratch.data_ptr()
        self.kernels.library.dspark_context(
            ctypes.byref(
                _Context(
                    ctypes.addressof(self._layers),
                    ctypes.addressof(attention),
                    self._fc,
                    self.norm.data_ptr(),
                    taps.data_ptr(),
                    features,
                    features + 4 * tokens * hidden,
                    features + 8 * tokens * hidden,
                    len(self._layers),
                    self.eps,
                )
            )
        )


@dataclass
class MarkovSampler:
    """A block of drafts, one after the other: each slot's logits get a bias by the token before, then a draw."""

    kernels: Kernels
    embedding: Tensor  # [vocab, rank] float32 contiguous
    bias: PackedWeight  # rank -> drafted tokens
    confidence: Tensor | None  # [hidden + rank + 1] float32: weights of hidden state and embedding, then a bias

    def __post_init__(self) -> None:
        self._bias = self.bias.structure
        self._weights = self.embedding.data_ptr(), pointer(self.confidence)

    def __call__(
        self,
        base: Tensor,  # [slots, rows, drafted tokens] float32 contiguous
        hidden: Tensor,  # [slots, rows, hidden] float32 contiguous
        anchors: Tensor,  # [rows] int64, the tokens before the first slot
        temperature: Tensor,  # [rows] float32
        seed: Tensor,  # [rows] int64
        position: Tensor,  # [rows] int64, of the first slot
        stream: int,
        greedy: float,  # rows of no higher temperature take their likeliest token
        ids: Tensor | None,  # [drafted tokens] int64, contiguous: what they are called
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, the largest draft probability and, if there is a confidence head, that of acceptance given the
        drafts before: each [rows, slots]."""
        slots, rows, width = base.shape
        tokens, largest = anchors.new_empty(rows, slots), base.new_empty(rows, slots)
        accepted = None if self.confidence is None else base.new_empty(rows, slots)
        scratch = base.new_empty(rows * (width + self.bias.inputs))
        logits = scratch.data_ptr()
        at = temperature.data_ptr(), pointer(ids), seed.data_ptr(), position.data_ptr()
        block = _Block(
            base.data_ptr(),
            hidden.data_ptr(),
            *self._weights,
            anchors.data_ptr(),
            self._bias,
            Draw(logits, *at, None, rows, width, width, 0, stream, torch.get_num_threads(), greedy),
            logits,
            tokens.data_ptr(),
            largest.data_ptr(),
            pointer(accepted),
            logits + rows * width * 4,
            slots,
            hidden.shape[2],
        )
        self.kernels.library.dspark_block(ctypes.byref(block))
        return tokens, largest, accepted
