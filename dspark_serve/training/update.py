"""One update's loss: passages and anchors in, a scalar with a gradient and the numbers to watch out.

Must not know: optimisers, schedules, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_serve.training.anchors import Blocks, Passage, build_blocks, context_states
from dspark_serve.training.head import FrozenTarget, MarkovTables, TrainableHead
from dspark_serve.training.losses import (
    LossWeights,
    confidence_loss,
    distribution_loss,
    regression_loss,
    slot_weights,
)


@dataclass(frozen=True)
class UpdateResult:
    loss: Tensor  # scalar
    overlap: Tensor  # [anchors, size] 1 - TV per slot, 0 where there is no label
    anchors: int
    tokens: int  # of the passages

    @property
    def accepted_length(self) -> float:
        """Expected tokens per round at temperature 1, the bonus included: the overlap is the acceptance rate."""
        return 1 + float(self.overlap.cumprod(1).sum(1).mean())


def draft_logits(
    head: TrainableHead, hidden: Tensor, previous: Tensor | None, outgoing: Tensor | None, target: FrozenTarget
) -> Tensor:
    """[slots, drafted]: the shared LM head's, and the Markov bias where there is one."""
    logits = hidden @ target.head.T
    if previous is not None and outgoing is not None:
        logits = torch.addmm(logits, previous, outgoing.T)
    return logits


def target_probs(passages: Sequence[Passage], sources: Tensor, target: FrozenTarget) -> Tensor:
    """The target's probabilities of the drafted tokens at sources [slots]: [slots, drafted].

    Exact without the rest of the vocabulary: the log of the full sum was stored when the text was written.
    """
    unique, inverse = torch.unique(sources, return_inverse=True)
    hidden = torch.cat([p.last_hidden for p in passages])[unique]
    log_totals = torch.cat([p.log_totals for p in passages])[unique]
    return torch.mm(hidden, target.head.T).sub_(log_totals.unsqueeze(1)).exp_()[inverse]


def update_loss(
    head: TrainableHead,
    passages: Sequence[Passage],
    anchors: Sequence[npt.NDArray[np.int64]],
    target: FrozenTarget,
    weights: LossWeights,
    spread: Tensor,
) -> UpdateResult:
    """The loss of these anchors, averaged over slots with the paper's weights; spread: see regression_loss."""
    blocks = build_blocks(passages, anchors, head.config.block_size)
    hidden = head.backbone(context_states(passages, blocks), blocks, target)
    previous = outgoing = None
    combined = hidden
    if head.markov is not None:
        previous = head.markov.previous(blocks.previous_tokens().view(-1), target, head.rank_of)
        outgoing = head.markov.outgoing(target)
        assert isinstance(head.markov, MarkovTables)
        combined = hidden + previous @ head.markov.out_map.T  # what the LM head reads, but for the tables' free parts
    logits = draft_logits(head, hidden, previous, outgoing, target)
    slot_weight = slot_weights(blocks.labels).view(-1)
    labels = blocks.labels.view(-1)
    ranks = torch.where(labels >= 0, head.rank_of[labels.clamp(min=0)], -1)
    with torch.no_grad():
        probs = target_probs(passages, blocks.sources.view(-1), target)
    loss, overlap = distribution_loss(logits, probs, ranks, slot_weight, weights)
    if head.confidence is not None and weights.confidence:
        predicted = head.confidence_logits(hidden, previous)
        loss = loss + weights.confidence * confidence_loss(predicted, overlap, slot_weight)
    if weights.regression:
        wanted = _last_hidden(passages, blocks)
        loss = loss + weights.regression * regression_loss(combined, wanted, spread, slot_weight)
    overlap = overlap.view(blocks.labels.shape) * (blocks.labels >= 0)
    return UpdateResult(loss, overlap, len(blocks.anchors), sum(len(p.tokens) for p in passages))


def _last_hidden(passages: Sequence[Passage], blocks: Blocks) -> Tensor:
    return torch.cat([p.last_hidden for p in passages])[blocks.sources.view(-1)]
