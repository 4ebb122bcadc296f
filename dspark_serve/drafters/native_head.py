"""A DSpark head through the C++ kernels: its layers, its context and its drawing in one call each, where they can be.

Must not know: requests, how drafts are verified.
"""

from __future__ import annotations

from dataclasses import dataclass

from dspark_kernels.decoder import DecoderStack, LayerWeights
from dspark_kernels.heads import ContextWriter, MarkovSampler
from dspark_serve.drafters.head import Head
from dspark_serve.models.layers import NativeFinish, NativeLinear


@dataclass(frozen=True)
class NativeHead:
    """What there is of the head in the kernels."""

    stack: DecoderStack  # the layers of a block
    context: ContextWriter
    sampler: MarkovSampler | None  # None: there is no Markov part, or its bias needs more than the token before

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
            DecoderStack(kernels, layers, c.heads, c.kv_heads, c.head_dim, c.norm_eps),
            ContextWriter(kernels, fc.packed, head.hidden_norm.weight, context, c.kv_heads, c.head_dim, c.norm_eps),
            None if head.markov is None else head.markov.sampler(kernels, head.confidence),
        )
