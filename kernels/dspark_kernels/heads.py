"""The parts of a draft head that are neither layers nor products, in one call each of the C++ kernels (head.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dspark_kernels.decoder import Decoding, into_layers
from dspark_kernels.native import Attention, Draw, Kernels
from dspark_kernels.packed import Packed, PackedWeight, pointer


class _ContextLayer(ctypes.Structure):  # mirrors head.cpp, as do the others
    _fields_ = (("kv", Packed), *((name, c_void_p) for name in ("k_norm", "keys", "values")))


class Writing(ctypes.Structure):
    """What a ContextWriter is to write, by itself or within a larger call."""

    alive: tuple[object, ...]  # what the pointers lead to
    library: ctypes.CDLL
    _fields_ = (
        *((name, c_void_p) for name in ("layers", "attention")),
        ("fc", Packed),
        *((name, c_void_p) for name in ("norm", "kept", "taps", "features", "normed", "kv")),
        ("count", c_int64),
        ("eps", c_float),
    )

    def run(self) -> None:
        self.library.dspark_context(ctypes.byref(self))


class Drawing(ctypes.Structure):
    """A block that a MarkovSampler is to draw, by itself or within a larger call."""

    drawn: tuple[Tensor, Tensor, Tensor | None]  # see MarkovSampler; filled in when it is run
    alive: tuple[object, ...]  # what the pointers lead to
    library: ctypes.CDLL
    _fields_ = (
        ("lm_head", Packed),
        *((name, c_void_p) for name in ("base", "hidden", "by_slot", "embedding", "confidence", "anchors")),
        ("bias", Packed),
        ("draw", Draw),
        *((name, c_void_p) for name in ("logits", "tokens", "largest", "accepted", "embedded")),
        *((name, c_int64) for name in ("slots", "block", "hidden_size")),
    )

    def run(self) -> tuple[Tensor, Tensor, Tensor | None]:
        self.library.dspark_block(ctypes.byref(self))
        return self.drawn


class _Draft(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("context", "decoder", "block"))


def draft(context: Writing | None, decoding: Decoding, drawing: Drawing) -> tuple[Tensor, Tensor, Tensor | None]:
    """All three one after the other in one call; drawing.hidden is what decoding gives."""
    at = [None if part is None else ctypes.addressof(part) for part in (context, decoding, drawing)]
    drawing.library.dspark_draft(ctypes.byref(_Draft(*at)))
    return drawing.drawn


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
        kept: Tensor,  # [slots of the store, fc.inputs] float32 contiguous: hidden states, each token's at its slot
        slots: Tensor,  # [tokens] int64, where in the store
        rotary: tuple[Tensor, Tensor],  # positions [tokens] int64, table [positions, 2, head_dim]
        keys: Sequence[Tensor],  # per layer [pages, page_size, kv_heads, head_dim]
        values: Sequence[Tensor],
    ) -> Writing:
        """Of which nothing is computed yet. Good until this is called with another store."""
        tokens, (positions, table) = slots.shape[0], rotary
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
        sizes = self.fc.inputs, self.fc.outputs, self.fc.outputs, 2 * self.kv_heads * self.head_dim
        scratch = kept.new_empty(tokens * sum(sizes))
        task = Writing(
            ctypes.addressof(self._layers),
            ctypes.addressof(attention),
            self._fc,
            self.norm.data_ptr(),
            kept.data_ptr(),
            *(scratch.data_ptr() + 4 * tokens * before for before in accumulate(sizes[:-1], initial=0)),
            len(self._layers),
            self.eps,
        )
        task.alive, task.library = (attention, kept, slots, rotary, scratch, self), self.kernels.library
        return task


@dataclass
class MarkovSampler:
    """A block of drafts, one after the other: each slot's logits get a bias by the token before, then a draw."""

    kernels: Kernels
    embedding: Tensor  # [vocab, rank] float32 contiguous
    bias: PackedWeight  # rank -> drafted tokens
    confidence: Tensor | None  # [hidden + rank + 1] float32: weights of hidden state and embedding, then a bias
    lm_head: PackedWeight | None = None  # hidden -> drafted tokens

    def __post_init__(self) -> None:
        self._bias = self.bias.structure
        self._lm_head = Packed() if self.lm_head is None else self.lm_head.structure
        self._weights = self.embedding.data_ptr(), pointer(self.confidence)

    def __call__(
        self,
        hidden: Tensor,  # [rows, block, hidden] float32 contiguous
        slots: int,  # to be drawn of each block, from the first on
        base: Tensor | None,  # [slots, rows, drafted tokens] float32 contiguous: logits before the bias; None: lm_head
        anchors: Tensor,  # [rows] int64, the tokens before the first slot
        temperature: Tensor,  # [rows] float32
        seed: Tensor,  # [rows] int64
        position: Tensor,  # [rows] int64, of the first slot
        stream: int,
        greedy: float,  # rows of no higher temperature take their likeliest token
        ids: Tensor | None,  # [drafted tokens] int64, contiguous: what they are called
    ) -> Drawing:
        """Tokens, the largest draft probability and, if there is a confidence head, that of acceptance given the
        drafts before: each [rows, slots], once it is run."""
        (rows, size, hidden_size), width, lm_head = hidden.shape, self.bias.outputs, Packed()
        if base is None:
            base, lm_head = hidden.new_empty(slots, rows, width), self._lm_head
        tokens, largest = anchors.new_empty(rows, slots), hidden.new_empty(rows, slots)
        accepted = None if self.confidence is None else hidden.new_empty(rows, slots)
        scratch = hidden.new_empty(rows * (width + self.bias.inputs + slots * hidden_size))
        logits = scratch.data_ptr()
        embedded = logits + rows * width * 4
        at = temperature.data_ptr(), pointer(ids), seed.data_ptr(), position.data_ptr()
        task = Drawing(
            lm_head,
            base.data_ptr(),
            hidden.data_ptr(),
            embedded + rows * self.bias.inputs * 4,
            *self._weights,
            anchors.data_ptr(),
            self._bias,
            Draw(logits, *at, None, rows, width, width, 0, stream, torch.get_num_threads(), greedy),
            logits,
            tokens.data_ptr(),
            largest.data_ptr(),
            pointer(accepted),
            embedded,
            slots,
            size,
            hidden_size,
        )
        task.drawn, task.library = (tokens, largest, accepted), self.kernels.library
        task.alive = base, hidden, scratch, anchors, temperature, seed, position, ids, self
        return task
