"""Rejection keeps the target's distribution, and the tests that say so see rules and budgets that do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import some_logits, step_batch
from scipy import stats
from torch import Tensor

from dspark_serve.sampling import target_probs, target_support
from dspark_serve.speculation import verify as module
from dspark_serve.speculation.verify import accept_lengths, verify
from dspark_serve.types import VerifyMode


def first_two_tokens(trials: int, certain: bool, top: dict[str, float]) -> tuple[Tensor, Tensor]:
    """Tokens of `trials` independent speculative steps with two drafts each -> histograms [6, 6], expected [6, 6].

    Target logits depend on the token before, drafts come from a similar but different distribution, and a step that
    accepts nothing takes its second token from a plain draw, as the next step would.
    """
    vocab = 6
    target = some_logits(vocab + 1, vocab, seed=1)  # row v: after token v; the last row: after the anchor
    drafter = (target + some_logits(vocab + 1, vocab, seed=2, spread=0.7)).softmax(-1)
    seeds, n = torch.arange(trials), torch.arange(trials) * 0
    if certain:  # the most likely token, without randomness
        first = drafter[vocab].argmax() + n
        second = drafter[first].argmax(-1)
    else:
        rng = torch.Generator().manual_seed(9)
        first = torch.multinomial(drafter[vocab].expand(trials, -1), 1, generator=rng)[:, 0]
        second = torch.multinomial(drafter[first], 1, generator=rng)[:, 0]
    probs = torch.stack([drafter[vocab].expand(trials, -1), drafter[first]], dim=1)
    drafts = torch.stack([first, second], dim=1)
    logits = torch.stack([target[vocab].expand(trials, -1), target[first], target[second]], dim=1).flatten(0, 1)
    batch = step_batch(drafts.tolist(), [1.0] * trials, draft_probs=None if certain else probs, **top)  # type: ignore[arg-type]
    tokens = verify(logits, batch, "rejection").tokens
    plain = step_batch([[]] * trials, [1.0] * trials, first_seed=10**6, **top)  # type: ignore[arg-type]
    plain = replace(plain, sampling=replace(plain.sampling, position=seeds))
    after = verify(target[tokens[:, 0]], plain, "rejection").tokens[:, 0]
    second_token = torch.where(tokens[:, 1] >= 0, tokens[:, 1], after)
    counts = torch.bincount(tokens[:, 0] * vocab + second_token, minlength=vocab * vocab)

    shapes = step_batch([[]] * (vocab + 1), [1.0] * (vocab + 1), **top)  # type: ignore[arg-type]
    support = target_support(target, shapes.sampling)
    exact = torch.zeros(vocab + 1, vocab).scatter_add_(1, support.ids, target_probs(support)).double()
    return counts, (exact[vocab].unsqueeze(1) * exact[:vocab]).flatten() * trials


def chi_square_pvalue(counts: Tensor, expected: Tensor) -> float:
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    observed, wanted = counts[seen].double(), expected[seen]
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("top", [{}, {"top_k": 4}])
def test_rejection_has_the_targets_distribution(certain: bool, top: dict[str, float]) -> None:
    assert chi_square_pvalue(*first_two_tokens(20_000, certain, top)) > 1e-4


@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("bias", ["accept too much", "accept too little", "residual is the target"])
def test_biased_rules_are_caught(certain: bool, bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above has the power to see a rule that is only slightly wrong."""
    if bias == "residual is the target":
        monkeypatch.setattr(module, "residual_probs", lambda target, draft: target)
    else:
        factor = 0.9 if bias == "accept too much" else 1.15
        monkeypatch.setattr(module, "accept_lengths", lambda t, d, u: accept_lengths(t, d, u * factor))
    assert chi_square_pvalue(*first_two_tokens(20_000, certain, {})) < 1e-6


# Pure parts.


# --- the paper's Appendix A: what a budget may look at ---------------------------------------------------------------

SPEED = (1.0, 0.5, 0.45)  # steps per second at 1, 2 and 3 tokens
TARGET_A, REQUESTS = 0.7, 4000


def best_of_the_curve(first_draft: int, looks_ahead: bool) -> int:
    """Drafts kept for one request: survival 0.8 for the first, and for the second 0.9 of that or nothing, by what the
    first one is. A causal budget stops at the first draft that does not pay; the other one sees both and picks."""
    expected = (1.0, 1.8, 1.8 + 0.8 * (0.9 if first_draft == 0 else 0.0))
    rates = [tokens * speed for tokens, speed in zip(expected, SPEED, strict=True)]
    if looks_ahead:
        return int(np.argmax(rates))
    return next((kept for kept in (0, 1) if rates[kept + 1] <= rates[kept]), 2)


def first_tokens(looks_ahead: bool, mode: VerifyMode) -> Tensor:
    """The first token of many requests whose target says A with 0.7, drafted by fair coins."""
    first = torch.randint(0, 2, (REQUESTS,), generator=torch.Generator().manual_seed(1)).tolist()
    drafts = [[token, 0][: best_of_the_curve(token, looks_ahead)] for token in first]
    width = max(map(len, drafts))
    probs = torch.full((REQUESTS, width, 2), 0.5) if width else None
    batch = step_batch(drafts, [1.0] * REQUESTS, draft_probs=probs)
    logits = torch.tensor([TARGET_A, 1 - TARGET_A]).log().expand(batch.num_samples, 2).contiguous()
    return verify(logits, batch, mode).tokens[:, 0]


def p_value(tokens: Tensor) -> float:
    counts = torch.bincount(tokens, minlength=2).tolist()
    return float(stats.chisquare(counts, [TARGET_A * REQUESTS, (1 - TARGET_A) * REQUESTS]).pvalue)


def test_a_budget_that_looks_ahead_biases_rejection() -> None:
    biased = first_tokens(looks_ahead=True, mode="rejection")
    assert p_value(biased) < 1e-20
    assert abs(float((biased == 0).float().mean()) - 0.85) < 0.02  # the figure of the paper
    assert p_value(first_tokens(looks_ahead=False, mode="rejection")) > 1e-3


def test_a_budget_may_look_ahead_in_coupled_mode() -> None:
    ahead = first_tokens(looks_ahead=True, mode="coupled")
    assert torch.equal(ahead, first_tokens(looks_ahead=False, mode="coupled"))
    assert p_value(ahead) > 1e-3
