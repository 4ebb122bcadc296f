"""A DSpark head's drawing by Triton: the Markov biases and the draws of a whole block in one launch.

Must not know: requests, how drafts are verified.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark_kernels import noise
from dspark_kernels.triton import markov
from dspark_serve.drafters.head import Head
from dspark_serve.drafters.markov import ConfidenceHead, MarkovHead
from dspark_serve.drafters.rows import DraftRows, Drafts
from dspark_serve.tensors import DraftLogits, Proposal
from dspark_serve.types import GREEDY_TEMPERATURE, VerifyMode


@dataclass(frozen=True)
class TritonSampler:
    """What `DSparkDrafter` does slot by slot, for a head whose bias needs the token before and nothing else."""

    bias: MarkovHead
    w1: Tensor  # [vocab, rank] contiguous
    w2: Tensor  # [drafted tokens, rank] contiguous
    confidence: ConfidenceHead | None
    draft_vocab: Tensor | None  # [drafted tokens] int64

    @staticmethod
    def of(head: Head) -> TritonSampler | None:
        """None where there is no Markov part, or its bias needs more than the token before."""
        factors = None if head.markov is None else head.markov.factors()
        if head.markov is None or factors is None:
            return None
        return TritonSampler(head.markov, *factors, head.confidence, head.draft_vocab)

    def draws(self, rows: DraftRows, mode: VerifyMode) -> bool:
        """Whether these rows' tokens can be drawn here: from whole distributions, which verification can have so."""
        if rows.sampling.all_greedy:
            return True
        return not rows.sampling.any_filter and (mode == "coupled" or self.draft_vocab is None)

    def __call__(self, base: Tensor, hidden: Tensor, rows: DraftRows, mode: VerifyMode) -> Proposal:
        """base [rows, width, drafted tokens] float32: logits before the bias, overwritten; hidden [rows, width, .]."""
        sampling = rows.sampling
        drawn_from = mode == "rejection" and not sampling.all_greedy
        drawn = markov.draft_block(
            base,
            self.w1,
            self.w2,
            rows.anchors,
            sampling.temperature,
            sampling.seed,
            sampling.position,
            stream=noise.DRAFT if mode == "rejection" else noise.GUMBEL,
            keep=drawn_from,
            ids=self.draft_vocab,
            greedy_temperature=GREEDY_TEMPERATURE,
        )
        drafts = Drafts(rows.counts, list(drawn.tokens.unbind(1)), largest=list(drawn.largest.unbind(1)))
        proposal = drafts.proposal(self._told(hidden, rows.anchors, drawn.tokens))
        if not drawn_from:
            return proposal
        return replace(proposal, draft_probs=DraftLogits(base, drawn.log_mass, sampling.temperature))

    def _told(self, hidden: Tensor, anchors: Tensor, tokens: Tensor) -> Tensor | None:
        """The head's confidence in each slot, given the token before it: [rows, width]."""
        if self.confidence is None:
            return None
        previous = torch.cat([anchors.unsqueeze(1), tokens[:, :-1]], dim=1)
        logits = self.confidence.logits(hidden.flatten(0, 1), self.bias.embed(previous.flatten()))
        return logits.view(tokens.shape).sigmoid_()
