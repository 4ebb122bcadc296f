"""How learning rate and loss weights move over a run, as a function of its progress alone.

Must not know: clocks, heads, data.
"""

from __future__ import annotations

from dataclasses import dataclass

from dspark_serve.training.losses import LossWeights


@dataclass(frozen=True)
class Schedule:
    """Progress goes from 0 to 1. The first part teaches the whole distribution, the last what acceptance counts."""

    learning_rate: float = 1e-3
    warmup_updates: int = 20
    switch_at: float = 0.6  # from here on the paper's loss, and a learning rate that falls linearly
    final_share: float = 0.02  # of the learning rate, at the end
    divergence: float = 1.0
    early_variation: float = 0.3
    regression: float = 0.5  # at the start; falls to 0 at the switch
    cross_entropy: float = 0.1  # the paper's, after the switch
    variation: float = 0.9
    confidence: float = 1.0

    def rate(self, update: int, progress: float) -> float:
        """Learning rate of the update with this number, counted from 0."""
        rate = self.learning_rate * min(1.0, (update + 1) / self.warmup_updates)
        if progress > self.switch_at:
            left = (1 - min(progress, 1.0)) / (1 - self.switch_at)
            rate *= max(left, self.final_share)
        return rate

    def weights(self, progress: float) -> LossWeights:
        if progress >= self.switch_at:
            return LossWeights(
                cross_entropy=self.cross_entropy, total_variation=self.variation, confidence=self.confidence
            )
        return LossWeights(
            divergence=self.divergence,
            total_variation=self.early_variation,
            confidence=self.confidence,
            regression=self.regression * (1 - progress / self.switch_at),
        )
