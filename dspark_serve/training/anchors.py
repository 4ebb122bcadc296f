"""Anchors and their blocks: where a head would have drafted, what it may see there, and what it should have said.

A block at anchor a has `size` slots at positions a, a+1, ...; slot k predicts token a+1+k; it sees context strictly
before a and its own block. Must not know: heads, losses, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark_serve.training.device import moved


@dataclass(frozen=True)
class Passage:
    """One conversation as tensors, all on one device. States cover all tokens but the last."""

    tokens: Tensor  # [tokens] int64
    states: Tensor  # [tokens - 1, taps * hidden] float32, the head's taps
    last_hidden: Tensor  # [tokens - 1, hidden] float32, after the target's final norm
    log_totals: Tensor  # [tokens - 1] float32, log of the sum of exp(logits); 0 inside the prompt
    num_prompt: int


@dataclass(frozen=True)
class Blocks:
    """Blocks of many anchors in a few passages, on their device. Contexts and slots come in passage order."""

    size: int  # slots per block
    anchors: Tensor  # [anchors] int64, position within the passage
    anchor_tokens: Tensor  # [anchors] int64
    labels: Tensor  # [anchors, size] int64, -1 past the end of the passage
    sources: Tensor  # [anchors, size] int64, index into the concatenated states of the position that predicts the label
    slot_positions: Tensor  # [anchors * size] int64
    context_positions: Tensor  # [context tokens] int64
    context_mask: Tensor  # [anchors, longest context] float32: 0 before the anchor, -inf from it on
    context_lens: tuple[int, ...]  # [passages]
    anchor_counts: tuple[int, ...]  # [passages]

    def slot_tokens(self, mask_token_id: int) -> Tensor:
        """The head's input ids: the anchor, then masks; [anchors * size]."""
        tokens = self.anchor_tokens.new_full((len(self.anchors), self.size), mask_token_id)
        tokens[:, 0] = self.anchor_tokens
        return tokens.view(-1)

    def previous_tokens(self) -> Tensor:
        """The token before each slot's label, as the Markov head is taught with: [anchors, size]."""
        return torch.cat([self.anchor_tokens.unsqueeze(1), self.labels[:, :-1].clamp(min=0)], dim=1)


def choose_anchors(passage: Passage, count: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """Up to `count` different positions of the answer that have a token after them, ascending."""
    candidates = np.arange(passage.num_prompt, len(passage.tokens) - 1)
    if len(candidates) > count:
        candidates = np.sort(draw.choice(candidates, count, replace=False))
    return candidates


def build_blocks(passages: Sequence[Passage], anchors: Sequence[npt.NDArray[np.int64]], size: int) -> Blocks:
    """Blocks at the given anchors of each passage (each [anchors], ascending, at least 1, inside the answer)."""
    device = passages[0].tokens.device
    steps = torch.arange(size, device=device)
    per_passage = [moved(torch.from_numpy(chosen), device) for chosen in anchors]
    labels, sources, lens = [], [], []
    first = 0
    for passage, chosen, on_device in zip(passages, anchors, per_passage, strict=True):
        at = on_device.unsqueeze(1) + steps  # [anchors, size] position of each slot
        known = at + 1 < len(passage.tokens)
        labels.append(torch.where(known, passage.tokens[(at + 1).clamp(max=len(passage.tokens) - 1)], -1))
        # The state at a slot's own position is what predicts its label.
        sources.append(first + at.clamp(max=passage.states.shape[0] - 1))
        lens.append(int(chosen[-1]))  # nothing from the last anchor on is seen by any block
        first += passage.states.shape[0]
    positions = torch.cat(per_passage)
    mask = torch.zeros((len(positions), max(lens)), device=device)
    mask.masked_fill_(torch.arange(max(lens), device=device) >= positions.unsqueeze(1), float("-inf"))
    return Blocks(
        size=size,
        anchors=positions,
        anchor_tokens=torch.cat([p.tokens[chosen] for p, chosen in zip(passages, per_passage, strict=True)]),
        labels=torch.cat(labels),
        sources=torch.cat(sources),
        slot_positions=(positions.unsqueeze(1) + steps).view(-1),
        context_positions=torch.cat([torch.arange(length, device=device) for length in lens]),
        context_mask=mask,
        context_lens=tuple(lens),
        anchor_counts=tuple(len(chosen) for chosen in anchors),
    )


def context_states(passages: Sequence[Passage], blocks: Blocks) -> Tensor:
    """The states that the blocks may see, concatenated: [context tokens, taps * hidden]."""
    return torch.cat([p.states[:n] for p, n in zip(passages, blocks.context_lens, strict=True)])
