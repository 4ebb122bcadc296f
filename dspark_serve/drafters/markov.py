"""The sequential part of a DSpark head: a bias on each slot's logits by the token before it, and the confidence.

DSpark paper 3.1, formulas as in the reference code. Must not know: attention, pages, how tokens are drawn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels.heads import MarkovSampler
from dspark_kernels.native import Kernels
from dspark_kernels.packed import PackedWeight
from dspark_serve.drafters.head_config import HeadConfig
from dspark_serve.drafters.head_weights import HeadWeights
from dspark_serve.models.layers import Linear, NativeLinear, PlainLinear


class MarkovHead:
    """w2 @ f(w1[previous token]); f is the identity (vanilla), a gate (gated) or a small recurrent cell (rnn)."""

    def __init__(self, config: HeadConfig, weights: HeadWeights) -> None:
        rank, hidden, name = config.markov_rank, config.hidden_size, "markov_head."
        self._type, self._rank = config.markov_type, rank
        self._w1 = weights.take(f"{name}markov_w1.weight", config.vocab_size, rank)
        self._w2 = weights.linear({f"{name}markov_w2": config.drafted_tokens}, rank)
        self._joint: Linear | None = None
        if config.markov_type == "gated":
            self._joint = weights.linear({f"{name}gate_proj": rank}, hidden + rank, bias=True)
        elif config.markov_type == "rnn":
            self._joint = weights.linear({f"{name}joint_proj": 3 * rank}, 2 * rank + hidden, bias=True)

    def sampler(
        self, kernels: Kernels, confidence: ConfidenceHead | None, lm_head: PackedWeight | None
    ) -> MarkovSampler | None:
        """A whole block in one call of the kernels, where nothing but the token before decides the bias."""
        plain = self._type == "vanilla" and self._w1.dtype == torch.float32
        if not plain or not isinstance(self._w2, NativeLinear):
            return None
        told = None if confidence is None else confidence.joined(self._rank)
        return MarkovSampler(kernels, self._w1.contiguous(), self._w2.packed, told, lm_head)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """w1 [vocab, rank] and w2 [drafted tokens, rank], contiguous, where nothing else decides the bias."""
        if self._type != "vanilla" or not isinstance(self._w2, PlainLinear):
            return None
        return self._w1.contiguous(), self._w2.weight.contiguous()

    def embed(self, previous: Tensor) -> Tensor:
        """w1 rows of the previous tokens: [rows] int64 -> [rows, rank]."""
        return self._w1.index_select(0, previous)

    def first_state(self, rows: int) -> Tensor:
        """Every round starts from zero: [rows, rank]."""
        return self._w1.new_zeros(rows, self._rank)

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Bias [rows, drafted tokens] float32 for a slot, and the next state.

        embedded: `embed` of the token before it; hidden [rows, hidden_size]: the slot's own, after the final norm.
        """
        features = embedded
        if self._type == "gated":
            assert self._joint is not None
            features = torch.sigmoid(self._joint(torch.cat([hidden, embedded], dim=-1))) * embedded
        elif self._type == "rnn":
            assert self._joint is not None
            gate, candidate, output = self._joint(torch.cat([state, embedded, hidden], dim=-1)).chunk(3, dim=-1)
            gate, features = torch.sigmoid(gate), torch.tanh(output)
            state = gate * state + (1 - gate) * torch.tanh(candidate)
        return self._w2(features).float(), state


class ConfidenceHead:
    """The logit of a draft's acceptance, given that those before it are accepted; reads no token after the previous."""

    def __init__(self, config: HeadConfig, weights: HeadWeights) -> None:
        markov = config.markov_rank if config.confidence_with_markov else 0
        self._weight = weights.take("confidence_head.proj.weight", 1, config.hidden_size + markov)
        self._bias = weights.take("confidence_head.proj.bias", 1)
        self._with_markov = bool(markov)

    def joined(self, rank: int) -> Tensor:
        """Weights of hidden state and embedding, and the bias: [hidden_size + rank + 1] contiguous."""
        weight = self._weight[0] if self._with_markov else F.pad(self._weight[0], (0, rank))
        return torch.cat([weight, self._bias])

    def logits(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """hidden [rows, hidden_size], embedded [rows, rank] of the previous token -> [rows] float32."""
        if self._with_markov:
            assert embedded is not None
            hidden = torch.cat([hidden, embedded], dim=-1)
        return F.linear(hidden, self._weight, self._bias).squeeze(-1).float()
