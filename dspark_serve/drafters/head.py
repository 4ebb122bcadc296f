"""A draft head's network as loaded: what DSpark, DFlash and EAGLE-3 have in common.

Must not know: requests, pages, what the layers are joined to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.drafters.head_layers import HeadLayer
from dspark_serve.drafters.head_weights import (
    Embed,
    HeadWeights,
    LMHead,
    load_draft_vocab,
    shared_embedding,
    shared_lm_head,
)
from dspark_serve.drafters.markov import ConfidenceHead, MarkovHead
from dspark_serve.models.base import TargetModel
from dspark_serve.models.layers import Linear, RMSNorm, Rotary


@dataclass(frozen=True)
class Head:
    """The network, without any state. Make one of its kind with `from_weights`."""

    config: HeadConfig
    embed: Embed
    lm_head: LMHead
    fc: Linear  # len(taps) * hidden -> hidden
    hidden_norm: RMSNorm  # of what fc gives
    layers: tuple[HeadLayer, ...]
    norm: RMSNorm
    rotary: Rotary
    markov: MarkovHead | None
    confidence: ConfidenceHead | None
    draft_vocab: Tensor | None  # [n] int64, ascending
    kernels: str  # as the target's: "auto", "torch" or "triton"

    @classmethod
    def from_weights(cls, config: HeadConfig, weights: HeadWeights, target: TargetModel) -> Self:
        """Raises HeadError naming tensors that are missing, misshapen, unexpected or not finite."""
        c, hidden, eagle = config, config.hidden_size, config.kind == "eagle3"
        draft_vocab = load_draft_vocab(c, weights)
        embed = shared_embedding(c, weights, target)
        lm_head = shared_lm_head(c, weights, target, draft_vocab)
        width = 2 * hidden if eagle else hidden  # EAGLE-3's layer reads an embedding and features side by side
        head = cls(
            config=c,
            embed=embed,
            lm_head=lm_head,
            fc=weights.linear({"fc": hidden}, len(c.taps) * hidden),
            hidden_norm=weights.norm(f"{'layers.0.' if eagle else ''}hidden_norm.weight", hidden, c.norm_eps),
            layers=tuple(HeadLayer.load(c, weights, layer, width) for layer in range(c.num_layers)),
            norm=weights.norm("norm.weight", hidden, c.norm_eps),
            rotary=Rotary(c.rope, c.head_dim, c.max_positions, target.info.dtype, target.device),
            markov=MarkovHead(c, weights) if c.markov_rank else None,
            confidence=ConfidenceHead(c, weights) if c.confidence else None,
            draft_vocab=draft_vocab,
            kernels=weights.ops.choice,
        )
        weights.check_empty()
        return head

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Logits before a Markov bias, capped where the family caps them.

        hidden [.., hidden], after the final norm -> [.., drafted tokens] float32.
        """
        logits = self.lm_head(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
