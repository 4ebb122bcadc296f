"""THE rule: which drafts the target accepts, and the token that follows them. One decision for every row of a step.

Must not know: who drafted, budgets, requests, models. Decode is verification with zero drafts, and greedy is a
one-hot distribution; neither is a branch here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dspark_kernels import noise
from dspark_serve.sampling import Support, draw, draw_target, target_probs, target_support
from dspark_serve.tensors import DraftLogits, StepBatch, Verdict
from dspark_serve.transfers import to_device
from dspark_serve.types import VerifyMode

Rule = Callable[[Tensor, StepBatch, VerifyMode], Verdict]  # `verify`, or what decides as it does


def verify(logits: Tensor, batch: StepBatch, mode: VerifyMode) -> Verdict:
    """Accepts a prefix of every row's drafts and draws the token after it. logits: [>= num_samples, vocab] float32.

    "coupled": the token at a position is the target's own draw with the noise addressed by (seed, position), and a
    draft is accepted iff it is that token; the text is that of plain sampling. "rejection": Leviathan et al. 2023;
    the text is distributed as under plain sampling. Rows that do not sample accept nothing and get no token.
    """
    logits = logits[: batch.num_samples]
    device, width = logits.device, batch.drafts.shape[1] + 1
    # Which sample belongs to which slot is known on the host: a few integers, not a dozen operations on the device.
    lens, slot = np.array(batch.sample_lens, dtype=np.int64)[:, None], np.arange(width)  # [rows, 1], [width]
    if not batch.num_samples:
        nothing = torch.zeros(len(lens), dtype=torch.int64, device=device)
        return Verdict(nothing, torch.full((len(lens), width), -1, device=device))
    # Slots past a row's own samples point anywhere valid.
    places = np.minimum(lens.cumsum()[:, None] - lens + slot, batch.num_samples - 1)
    unused, sample = to_device(device, slot >= lens, places)  # [rows, width] both
    rule = _coupled if mode == "coupled" else _rejection
    n_accepted, tokens = rule(logits, batch, sample)
    past = unused | (torch.arange(width, device=device) > n_accepted.unsqueeze(1))  # [rows, width]
    return Verdict(n_accepted.masked_fill_(unused[:, 0], 0), tokens.masked_fill_(past, -1))


def _coupled(logits: Tensor, batch: StepBatch, sample: Tensor) -> tuple[Tensor, Tensor]:
    # An accepted draft is the target's token, and the first rejected one is replaced by it: the answer is always the
    # target's tokens up to and with the first that differs. Padding (-1) is no token, so it never matches.
    tokens = draw_target(logits, batch.sampling)[sample]  # [rows, width]
    return leading(tokens[:, :-1] == batch.drafts), tokens


def _rejection(logits: Tensor, batch: StepBatch, sample: Tensor) -> tuple[Tensor, Tensor]:
    support, sampling = target_support(logits, batch.sampling), batch.sampling
    probs = target_probs(support)  # [samples, support]
    drafts, at_draft = batch.drafts, sample[:, :-1]  # [rows, max_kept] both
    all_draft_probs = batch.draft_probs if drafts.shape[1] else None  # without drafts there is nothing to index
    if isinstance(all_draft_probs, DraftLogits):
        all_draft_probs = all_draft_probs.probs()
    token = drafts.clamp(min=0).unsqueeze(-1)  # [rows, max_kept, 1]
    target = _probs_of(support, probs, at_draft, token)  # [rows, max_kept]
    drafted = torch.ones_like(target) if all_draft_probs is None else all_draft_probs.gather(-1, token).squeeze(-1)
    uniforms = noise.uniform(sampling.seed[at_draft], sampling.position[at_draft], noise.ACCEPT)
    n_accepted = accept_lengths(target.masked_fill(drafts < 0, 0.0), drafted, uniforms)  # padding is never accepted

    # The next token comes from the first rejected slot, or from the slot after the last draft (the bonus).
    last = sample.gather(1, n_accepted.unsqueeze(1)).squeeze(1)  # [rows]
    ids, slot = support.ids[last], n_accepted.unsqueeze(1)  # [rows, support], [rows, 1]
    padded = torch.nn.functional.pad(drafts, (0, 1), value=-1)  # after the last draft: none
    refused = padded.gather(1, slot)  # [rows, 1] the rejected draft, -1 before a bonus token
    if all_draft_probs is None:
        draft_probs = (ids == refused).float()
    else:
        rows = torch.arange(len(last), device=last.device).unsqueeze(1)
        draft_probs = all_draft_probs[rows, slot.clamp(max=drafts.shape[1] - 1), ids] * (refused >= 0)
    weights = residual_probs(probs[last], draft_probs)  # [rows, support]
    residual = Support(ids, weights.log(), dense=support.dense)
    next_token = draw(residual, sampling.seed[last], sampling.position[last], noise.RESIDUAL)
    return n_accepted, padded.scatter(1, slot, next_token.unsqueeze(1))


def accept_lengths(target_probs: Tensor, draft_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Accepted drafts per row; all arguments [rows, width]: both models' probabilities of each draft, and uniforms.

    A draft is accepted with probability min(1, target_probs / draft_probs), given that all before it were.
    """
    return leading(uniforms * draft_probs < target_probs)


def residual_probs(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Unnormalised positive part of target_probs - draft_probs, what a rejected draft leaves to draw from; [.., vocab].

    With draft_probs of zero, the target's own distribution: nothing was rejected.
    """
    positive = (target_probs - draft_probs).clamp_(min=0.0)
    # Equal distributions leave nothing, and reject only by rounding: then the target's own is right.
    return torch.where((positive > 0).any(-1, keepdim=True), positive, target_probs)


def leading(accepted: Tensor) -> Tensor:
    """How many entries from the left are true: [rows, width] bool -> [rows] int64."""
    if not accepted.shape[1]:
        return accepted.new_zeros(len(accepted), dtype=torch.int64)
    return accepted.long().cumprod(-1).sum(-1)


def _probs_of(support: Support, probs: Tensor, sample: Tensor, token: Tensor) -> Tensor:
    """Probability of tokens [rows, slots, 1] at samples [rows, slots]; 0 outside the support -> [rows, slots]."""
    if support.dense:
        return probs[sample, token.squeeze(-1)]
    return (probs[sample] * (support.ids[sample] == token)).sum(-1)
