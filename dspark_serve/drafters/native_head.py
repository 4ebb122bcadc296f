"""A DSpark head through the C++ kernels: its context, its layers and its drawing, which can be a single call.

Small arrays are numpy's: a call of torch's takes three times as long. Must not know: requests, how drafts are verified.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dspark_kernels import noise
from dspark_kernels.decoder import DecoderStack, Decoding, LayerWeights
from dspark_kernels.heads import ContextWriter, Drawing, MarkovSampler, Writing
from dspark_kernels.packed import PackedWeight
from dspark_serve.cache.store import KVStore
from dspark_serve.drafters.head import Head
from dspark_serve.drafters.rows import DraftRows
from dspark_serve.models.layers import NativeFinish, NativeLinear
from dspark_serve.types import GREEDY_TEMPERATURE, VerifyMode


@dataclass(frozen=True)
class NativeHead:
    """What there is of the head in the kernels. What it returns is computed when it is run."""

    head: Head
    stack: DecoderStack  # the layers of a block
    context: ContextWriter
    sampler: MarkovSampler | None  # None: there is no Markov part, or its bias needs more than the token before
    inputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # see _inputs

    def reads(self, store: KVStore, first_layer: int) -> bool:
        return store.keys[first_layer].dtype == torch.float32

    @property
    def lm_head(self) -> bool:
        """Whether logits before the bias are computed by `drawing`."""
        return self.sampler is not None and self.sampler.lm_head is not None

    def writing(
        self, kept: Tensor, positions: Tensor, slots: Tensor, stop: int, store: KVStore, first_layer: int
    ) -> Writing:
        """Context of tokens at positions [n] int64 < stop, whose taps are kept at these slots [n] int64.

        kept: [slots of the store, len(taps) * hidden].
        """
        layers, rotary = self._layers(first_layer), (positions, self.head.rotary.table(stop))
        return self.context(kept, slots, rotary, store.keys[layers], store.values[layers])

    def decoding(self, rows: DraftRows, store: KVStore, first_layer: int) -> tuple[Decoding, Tensor]:
        """The pass over a block; and where its hidden states will be [rows, block, hidden]."""
        head, size, start = self.head, self.head.config.block_size, rows.start.numpy()
        count = len(start)
        ids, spans = self._inputs(count)
        ids.numpy()[::size] = rows.anchors.numpy()
        np.add(start, size, out=spans.numpy()[2])
        hidden = head.embed(ids)  # [rows * block, hidden]
        positions = torch.from_numpy((start[:, None] + np.arange(size)).ravel())
        rotary, layers = (positions, head.rotary.table(rows.longest + size)), self._layers(first_layer)
        at = store.keys[layers], store.values[layers], positions, rows.pages, spans, rotary
        return self.stack(hidden, *at, block=True, norm=head.norm.weight), hidden.view(count, size, -1)

    def draws(self, rows: DraftRows, mode: VerifyMode) -> bool:
        """Whether `drawing` can be asked for: unfiltered tokens, without what they were drawn from."""
        sampling = rows.sampling
        plain = sampling.all_greedy or (mode == "coupled" and not sampling.any_filter)
        return plain and self.sampler is not None

    def drawing(self, hidden: Tensor, width: int, rows: DraftRows, base: Tensor | None = None) -> Drawing:
        """The first `width` slots of blocks [rows, block, hidden]. base: as MarkovSampler has it."""
        s = rows.sampling
        assert self.sampler is not None
        at = rows.anchors, s.temperature, s.seed, s.position, noise.GUMBEL, GREEDY_TEMPERATURE, self.head.draft_vocab
        return self.sampler(hidden, width, base, *at)

    def _layers(self, first: int) -> slice:
        """Of the store."""
        return slice(first, first + self.head.config.num_layers)

    def _inputs(self, count: int) -> tuple[Tensor, Tensor]:
        """For so many rows: token ids [rows * block], and each row's first token among them, how many, and the keys
        that they see [3, rows] int64. Without anchors and keys: those of the next pass are filled in."""
        if (made := self.inputs.get(count)) is None:
            size, mask = self.head.config.block_size, self.head.config.mask_token_id
            assert mask is not None
            spans = np.stack([np.arange(0, count * size, size), np.full(count, size), np.zeros(count, dtype=np.int64)])
            made = self.inputs[count] = torch.full((count * size,), mask), torch.from_numpy(spans)
        return made

    @staticmethod
    def of(head: Head) -> NativeHead | None:
        """None where the kernels are not built, or lack what the head's family or widths need."""
        c, fc = head.config, head.fc
        if not isinstance(fc, NativeLinear) or c.family != "qwen3" or c.k_eq_v:
            return None
        kernels = fc.kernels
        layers, context = [], []
        for layer in head.layers:
            finish, kv = layer.finish, layer.kv
            if layer.qkv is None or not isinstance(finish, NativeFinish) or not isinstance(kv, NativeLinear):
                return None
            context.append((kv.packed, layer.k_norm.weight))
            layers.append(
                LayerWeights(
                    attention_norm=layer.input_norm.weight,
                    qkv=layer.qkv,
                    q_norm=layer.q_norm.weight,
                    k_norm=layer.k_norm.weight,
                    out=finish.out,
                    mlp_norm=finish.norm.weight,
                    gate_up=finish.gate_up,
                    down=finish.down,
                    window=None,
                )
            )
        if not DecoderStack.fits(kernels, layers, c.head_dim):
            return None
        return NativeHead(
            head,
            DecoderStack(kernels, layers, c.heads, c.kv_heads, c.head_dim, c.norm_eps),
            ContextWriter(kernels, fc.packed, head.hidden_norm.weight, context, c.kv_heads, c.head_dim, c.norm_eps),
            None if head.markov is None else head.markov.sampler(kernels, head.confidence, _lm_head(head)),
        )


def _lm_head(head: Head) -> PackedWeight | None:
    """Whose product with hidden states is `head.base_logits`, if there is such a weight."""
    linear = head.lm_head
    if not isinstance(linear, NativeLinear) or linear.norm is not None or head.config.logit_softcap is not None:
        return None
    return linear.packed
