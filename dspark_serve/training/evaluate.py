"""Accepted length, offline and exact: a head drafts at every position of the target's own text, then rounds are walked.

Speculation never changes the text, so the trajectory does not depend on the draft and one pass gives all blocks.
Must not know: training, files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_kernels import noise
from dspark_serve.training.anchors import Passage, build_blocks, context_states
from dspark_serve.training.head import FrozenTarget, TrainableHead

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Drafts:
    """What a head drafted at every anchor of one passage, from its first answer token to the last but one."""

    tokens: npt.NDArray[np.int64]  # [anchors, size]
    labels: npt.NDArray[np.int64]  # [anchors, size], -1 past the end
    confidence: Floats  # [anchors, size] logits; zeros without a confidence head
    largest: Floats  # [anchors, size] largest draft probability

    @property
    def matches(self) -> Flags:
        matches: Flags = self.tokens == self.labels
        return matches


@torch.no_grad()
def draft_passage(head: TrainableHead, passage: Passage, target: FrozenTarget, seed: int | None = None) -> Drafts:
    """Blocks at every anchor of the passage; each slot's Markov bias is that of the token drafted before.

    Greedy, or, with the seed that a text at temperature 1 was drawn with, drawn with the same noise (`coupled`).
    """
    return _draft(head, passage, target, None, seed)


@torch.no_grad()
def overlap_passage(head: TrainableHead, passage: Passage, target: FrozenTarget) -> tuple[Drafts, Floats]:
    """Blocks along the passage's own tokens, and per slot the probability [anchors, size] that `rejection` accepts
    the token that came, given that it came: min(1, draft / target)."""
    ratios: list[Tensor] = []
    drafts = _draft(head, passage, target, ratios, None)
    return drafts, torch.stack(ratios, dim=1).cpu().numpy()


def _draft(
    head: TrainableHead, passage: Passage, target: FrozenTarget, ratios: list[Tensor] | None, seed: int | None
) -> Drafts:
    """Along its own drafts, or, with `ratios` to fill, along the passage's tokens."""
    anchors = np.arange(passage.num_prompt, len(passage.tokens) - 1)
    blocks = build_blocks([passage], [anchors], head.config.block_size)
    hidden = head.backbone(context_states([passage], blocks), blocks, target)
    hidden = hidden.view(len(anchors), blocks.size, -1)
    outgoing = head.markov.outgoing(target) if head.markov is not None else None
    before = blocks.anchor_tokens
    tokens, confidence, largest = [], [], []
    for slot in range(blocks.size):
        logits = hidden[:, slot] @ target.head.T
        previous = None
        if head.markov is not None and outgoing is not None:
            previous = head.markov.previous(before, target, head.rank_of)
            logits = torch.addmm(logits, previous, outgoing.T)
        if head.confidence is not None:
            confidence.append(head.confidence_logits(hidden[:, slot], previous))
        log_probs = logits.log_softmax(-1)
        best = log_probs.max(-1)
        largest.append(best.values.exp())
        drawn = best.indices if seed is None else (log_probs + _noise(head, blocks.anchors + 1 + slot, seed)).argmax(-1)
        tokens.append(head.draft_vocab[drawn])
        label = blocks.labels[:, slot]
        if ratios is not None:
            ratios.append(_acceptance(log_probs, label, blocks.sources[:, slot], passage, head, target))
        before = tokens[-1] if ratios is None else label.clamp(min=0)
    return Drafts(
        tokens=torch.stack(tokens, 1).cpu().numpy(),
        labels=blocks.labels.cpu().numpy(),
        confidence=(torch.stack(confidence, 1) if confidence else torch.zeros(blocks.labels.shape)).cpu().numpy(),
        largest=torch.stack(largest, 1).cpu().numpy(),
    )


def _noise(head: TrainableHead, positions: Tensor, seed: int) -> Tensor:
    """The Gumbel noise of each drafted token at positions [anchors]: [anchors, drafted]."""
    seeds = torch.full_like(positions, seed - (1 << 64) if seed >> 63 else seed)
    return noise.gumbel(seeds.unsqueeze(1), positions.unsqueeze(1), head.draft_vocab.unsqueeze(0), noise.GUMBEL)


def _acceptance(
    log_probs: Tensor, label: Tensor, source: Tensor, passage: Passage, head: TrainableHead, target: FrozenTarget
) -> Tensor:
    """min(1, draft / target) of each label [anchors]; 0 where it cannot be drafted or there is none."""
    rank = torch.where(label >= 0, head.rank_of[label.clamp(min=0)], -1)
    place = rank.clamp(min=0)
    hidden = passage.last_hidden[source]
    log_target = torch.einsum("sh,sh->s", hidden, target.head[place]) - passage.log_totals[source]
    ratio = (log_probs.gather(1, place.unsqueeze(1)).squeeze(1) - log_target).exp().clamp(max=1)
    return ratio * (rank >= 0)


def walk_rounds(matches: Flags, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Accepted drafts of the rounds that a greedy run would have made: anchor, a accepted, next anchor a + 1 further.

    Rounds whose block reaches past the end of the text are not counted: how many they would accept is unknown.
    """
    accepted = matches.astype(np.int64).cumprod(1).sum(1)
    rounds, anchor = [], 0
    while anchor < len(matches) and labels[anchor, -1] >= 0:
        rounds.append(int(accepted[anchor]))
        anchor += int(accepted[anchor]) + 1
    return np.array(rounds, dtype=np.int64)


@dataclass(frozen=True)
class Score:
    """Accepted length, the bonus token included; `by_slot` is acceptance given that all slots before were accepted."""

    greedy: float  # mean over the rounds of greedy texts
    sampled: float  # expected under `rejection` at temperature 1, mean over the anchors of such texts
    by_slot: tuple[float, ...]  # greedy
    rounds: int


def score(head: TrainableHead, passages: Iterable[tuple[float, Passage]], target: FrozenTarget) -> Score:
    """Over (temperature, passage) pairs; other temperatures than 0 and 1 are skipped."""
    rounds: list[npt.NDArray[np.int64]] = []
    sampled: list[npt.NDArray[np.float32]] = []
    for temperature, passage in passages:
        if temperature == 0.0:
            drafts = draft_passage(head, passage, target)
            rounds.append(walk_rounds(drafts.matches, drafts.labels))
        elif temperature == 1.0:
            drafts, ratios = overlap_passage(head, passage, target)
            whole = drafts.labels[:, -1] >= 0
            sampled.append(1 + ratios[whole].cumprod(1).sum(1))
    accepted = np.concatenate(rounds) if rounds else np.zeros(0, dtype=np.int64)
    return Score(
        greedy=float(1 + accepted.mean()) if len(accepted) else 1.0,
        sampled=float(np.concatenate(sampled).mean()) if sampled else 1.0,
        by_slot=acceptance_by_slot(accepted, head.config.block_size),
        rounds=len(accepted),
    )


def acceptance_by_slot(accepted: npt.NDArray[np.int64], size: int) -> tuple[float, ...]:
    """Of the rounds that reached slot k, the share that accepted it."""
    reached: Sequence[int] = [int((accepted >= slot).sum()) for slot in range(size + 1)]
    return tuple(reached[k + 1] / reached[k] if reached[k] else 0.0 for k in range(size))
