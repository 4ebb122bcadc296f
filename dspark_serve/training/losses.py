"""The losses of a head: distribution, confidence, hidden regression, each a weighted mean over supervised slots.

The distribution loss brings its own gradient: every term is simple in the softmax, and one pass instead of a graph
over [slots, drafted] is half of its time. Sources: DSpark paper, training section. Must not know: heads, data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SLOT_DECAY = 4.0  # slot k weighs exp(-k / SLOT_DECAY)


@dataclass(frozen=True)
class LossWeights:
    """What the terms count. `total_variation` weighs sum |target - draft|, twice the distance itself."""

    divergence: float = 0.0  # KL(target || draft)
    cross_entropy: float = 0.0  # of the token that came
    total_variation: float = 0.0
    confidence: float = 1.0
    regression: float = 0.0


def slot_weights(labels: Tensor) -> Tensor:
    """[anchors, size] labels, -1 where there is none -> weights [anchors, size] that add up to 1."""
    weights = torch.exp(-torch.arange(labels.shape[1], dtype=torch.float32, device=labels.device) / SLOT_DECAY)
    weights = weights * (labels >= 0)
    return weights / weights.sum().clamp(min=1e-9)


def distribution_loss(
    logits: Tensor,  # [slots, drafted], the draft's
    target_probs: Tensor,  # [slots, drafted], the target's probabilities of the drafted tokens; they may add up to < 1
    label_ranks: Tensor,  # [slots] place of the label among the drafted tokens, -1 if it is none of them
    slot_weight: Tensor,  # [slots]
    weights: LossWeights,
) -> tuple[Tensor, Tensor]:
    """The weighted loss (scalar), and each slot's overlap 1 - TV with the target (detached), its acceptance rate.

    Mass that the target puts on tokens outside the draft vocabulary cannot be drafted: it counts as variation, and
    the divergence is taken over what can.
    """
    loss, overlap = _DistributionLoss.apply(  # type: ignore[no-untyped-call]
        logits, target_probs, label_ranks, slot_weight, weights
    )
    return loss, overlap


class _DistributionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, label_ranks: Tensor, slot_weight: Tensor, weights: LossWeights
    ) -> tuple[Tensor, Tensor]:
        log_draft = logits.log_softmax(-1)
        draft = log_draft.exp()
        mass = target.sum(-1, keepdim=True)  # [slots, 1]
        difference = draft - target
        variation = difference.abs().sum(-1) + (1 - mass.squeeze(1)).clamp(min=0)  # [slots] sum |target - draft|
        known = label_ranks >= 0
        label = label_ranks.clamp(min=0).unsqueeze(1)
        surprise = -log_draft.gather(1, label).squeeze(1) * known  # [slots]
        # The target's entropy is a constant of the divergence and is left out of gradient and value alike.
        cross = -torch.einsum("sv,sv->s", target, log_draft)
        per_slot = weights.divergence * cross + weights.cross_entropy * surprise + weights.total_variation * variation
        grad = torch.zeros_like(draft)
        if weights.total_variation:
            sign = difference.sign_()
            inner = torch.einsum("sv,sv->s", draft, sign).unsqueeze(1)
            # d/dz sum |q - p| = q * (s - <q, s>) with s = sign(q - p)
            grad = sign.sub_(inner).mul_(draft).mul_(weights.total_variation)
        if weights.divergence:
            grad.add_(draft * mass - target, alpha=weights.divergence)
        if weights.cross_entropy:
            scale = weights.cross_entropy * known.to(draft.dtype).unsqueeze(1)
            grad.add_(draft * scale).scatter_add_(1, label, -scale)
        ctx.save_for_backward(grad.mul_(slot_weight.unsqueeze(1)))
        overlap = 1 - 0.5 * variation
        ctx.mark_non_differentiable(overlap)
        return (per_slot * slot_weight).sum(), overlap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None


def confidence_loss(logits: Tensor, overlap: Tensor, slot_weight: Tensor) -> Tensor:
    """Binary cross-entropy of [slots] against the acceptance rate 1 - TV, as a soft label."""
    losses = F.binary_cross_entropy_with_logits(logits, overlap.clamp(0, 1), reduction="none")
    return (losses * slot_weight).sum()


def regression_loss(hidden: Tensor, target_hidden: Tensor, spread: Tensor, slot_weight: Tensor) -> Tensor:
    """Squared error of [slots, hidden] against the target's last hidden, in units of its variance per channel."""
    errors = ((hidden - target_hidden) / spread).square().mean(-1)
    return (errors * slot_weight).sum()
