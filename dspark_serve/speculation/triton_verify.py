"""The rule of verify.py by Triton kernels: logits are read where they are, and no distribution is written to memory.

Coupled mode decides as verify.py bit for bit, rejection mode up to the rounding of a probability. Drafts whose
probabilities come written out the kernels lack: verify.py itself decides then. Filters are found in torch.
Must not know: who drafted, budgets, requests, models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dspark_kernels.triton import accept, rejection
from dspark_serve.sampling import apply_adjustments, filter_thresholds
from dspark_serve.speculation import verify as reference
from dspark_serve.tensors import StepBatch, Verdict
from dspark_serve.types import GREEDY_TEMPERATURE, VerifyMode


def verify(logits: Tensor, batch: StepBatch, mode: VerifyMode) -> Verdict:
    """See verify.verify."""
    sampling, drafted = batch.sampling, batch.draft_probs if batch.drafts.shape[1] else None
    drafted = None if mode == "coupled" else drafted  # there a draft is a token and nothing else
    if not batch.num_samples or isinstance(drafted, Tensor):
        return reference.verify(logits, batch, mode)
    logits = apply_adjustments(logits[: batch.num_samples], sampling)
    threshold = filter_thresholds(logits, sampling) if sampling.any_filter and not sampling.all_greedy else None
    options: dict[str, Any] = {"threshold": threshold, "greedy_temperature": GREEDY_TEMPERATURE}
    first, count = batch.sample_spans
    rows = logits, batch.drafts, first, count, sampling.temperature, sampling.seed, sampling.position
    if mode == "coupled":
        return Verdict(*accept.accept_coupled(*rows, **options))
    draft = None if drafted is None else rejection.DraftLogits(drafted.logits, drafted.log_mass)
    return Verdict(*rejection.accept_rejection(*rows, draft, **options))
