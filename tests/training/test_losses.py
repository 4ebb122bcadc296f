"""Losses and their gradients against autograd over the textbook formulas."""

from __future__ import annotations

import pytest
import torch

from dspark_serve.training.losses import LossWeights, confidence_loss, distribution_loss, regression_loss, slot_weights
from dspark_serve.training.schedule import Schedule


@pytest.mark.parametrize(
    "weights",
    [
        LossWeights(divergence=1.0),
        LossWeights(cross_entropy=1.0),
        LossWeights(total_variation=1.0),
        LossWeights(divergence=0.7, cross_entropy=0.1, total_variation=0.9),
    ],
)
def test_distribution_loss_and_gradient(weights):
    torch.manual_seed(0)
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    mass = torch.tensor([1, 0.9, 0.8, 0.5, 1, 0.7], dtype=torch.float64).unsqueeze(1)  # the rest cannot be drafted
    target = torch.rand(6, 9, dtype=torch.float64)
    target = target / target.sum(-1, keepdim=True) * mass
    labels = torch.tensor([0, 3, -1, 8, 2, 1])
    slot_weight = torch.rand(6, dtype=torch.float64)
    loss, overlap = distribution_loss(logits, target, labels, slot_weight, weights)
    loss.backward()

    plain = logits.detach().clone().requires_grad_()
    log_draft = plain.log_softmax(-1)
    variation = (log_draft.exp() - target).abs().sum(-1) + 1 - mass.squeeze(1)
    surprise = -log_draft[torch.arange(6), labels.clamp(min=0)] * (labels >= 0)
    cross = -(target * log_draft).sum(-1)  # KL(target || draft) but for the target's entropy
    terms = weights.divergence * cross + weights.cross_entropy * surprise + weights.total_variation * variation
    expected = (terms * slot_weight).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, plain.grad)
    torch.testing.assert_close(overlap, 1 - variation.detach() / 2)


def test_overlap_is_the_acceptance_rate():
    target = torch.tensor([[0.7, 0.3]])
    draft = torch.tensor([[0.4, 0.6]])
    _, overlap = distribution_loss(draft.log(), target, torch.tensor([0]), torch.ones(1), LossWeights())
    assert overlap.item() == pytest.approx(0.4 + 0.3)


def test_slot_weights_fall_and_skip_missing_labels():
    weights = slot_weights(torch.tensor([[5, 6, 7], [5, -1, -1]]))
    assert weights.sum() == pytest.approx(1.0)
    assert weights[0, 1] / weights[0, 0] == pytest.approx(torch.exp(torch.tensor(-0.25)).item())
    assert weights[1, 0] == weights[0, 0]
    assert weights[1, 1:].tolist() == [0.0, 0.0]


def test_confidence_loss_is_least_at_the_overlap():
    overlap, weight = torch.tensor([0.3]), torch.ones(1)
    at = confidence_loss(torch.logit(overlap), overlap, weight)
    assert all(at < confidence_loss(torch.logit(overlap) + d, overlap, weight) for d in (-0.5, 0.5))


def test_regression_counts_in_units_of_spread():
    loss = regression_loss(torch.tensor([[1.0, 4.0]]), torch.zeros(1, 2), torch.tensor([1.0, 2.0]), torch.ones(1))
    assert loss.item() == pytest.approx((1 + 4) / 2)


def test_schedule():
    schedule = Schedule(learning_rate=1.0, warmup_updates=10, switch_at=0.6, final_share=0.02)
    assert schedule.rate(0, 0.0) == pytest.approx(0.1)
    assert schedule.rate(100, 0.5) == 1.0
    assert schedule.rate(100, 0.8) == pytest.approx(0.5)
    assert schedule.rate(100, 1.5) == pytest.approx(0.02)
    assert schedule.weights(0.0).regression == 0.5
    assert schedule.weights(0.3).regression == pytest.approx(0.25)
    assert schedule.weights(0.6) == LossWeights(cross_entropy=0.1, total_variation=0.9, confidence=1.0)
