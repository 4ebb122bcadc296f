"""The rule of verify.py by Triton kernels: logits are read where they are, and no distribution is written to memory.

Coupled mode decides as verify.py bit for bit, rejection mode up to the rounding of a probability. What the kernels lack
is decided by verify.py itself: top-k, top-p and min-p, and drafts whose probabilities come written out.
Must not know: who drafted, budgets, requests, models.
"""

from __future__ import annotations

from torch import Tensor

from dspark_kernels.triton import accept
from dspark_serve.sampling import apply_adjustments
from dspark_serve.speculation import verify as reference
from dspark_serve.tensors import StepBatch, Verdict
from dspark_serve.types import GREEDY_TEMPERATURE, VerifyMode


def verify(logits: Tensor, batch: StepBatch, mode: VerifyMode) -> Verdict:
    """See verify.verify."""
    sampling, drafted = batch.sampling, batch.draft_probs if batch.drafts.shape[1] else None
    drafted = None if mode == "coupled" else drafted  # there a draft is a token and nothing else
    filtered = sampling.any_filter and not sampling.all_greedy
    if filtered or not batch.num_samples or isinstance(drafted, Tensor):
        return reference.verify(logits, batch, mode)
    logits = apply_adjustments(logits[: batch.num_samples], sampling)
    first, count = batch.sample_spans
    rows = logits, batch.drafts, first, count, sampling.temperature, sampling.seed, sampling.position
    if mode == "coupled":
        return Verdict(*accept.accept_coupled(*rows, greedy_temperature=GREEDY_TEMPERATURE))
    draft = None if drafted is None else accept.DraftLogits(drafted.logits, drafted.log_mass)
    return Verdict(*accept.accept_rejection(*rows, draft, greedy_temperature=GREEDY_TEMPERATURE))
