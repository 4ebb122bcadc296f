"""The portfolio's choice: what it has seen accepted decides, per request; rows of one proposal may mix drafters."""

import torch

from dspark_serve.drafters.portfolio import Acceptance, _merge
from dspark_serve.tensors import Proposal


def test_acceptance_is_conditional_on_the_drafts_before():
    seen = Acceptance()
    for _ in range(50):
        seen.record(4, 1)  # the first right, the second wrong, the rest never tried
    assert seen.rate(0, 0.5, 1.0) > 0.95
    assert seen.rate(1, 0.5, 1.0) < 0.05
    assert seen.rate(2, 0.5, 1.0) == 0.5


def test_lookups_are_certain_among_drafts_with_probabilities():
    probs = torch.full((1, 2, 5), 0.2)
    drawn = Proposal(torch.tensor([[1, 2]]), (2,), probs, torch.tensor([[0.9, 0.8]]))
    copied = Proposal.from_lists([[3, 4, 0]])
    merged = _merge(drawn, [1], copied, [0], ("ngram", "dspark"), [[0.5] * 3, [0.5] * 3])
    assert merged.tokens.tolist() == [[3, 4, 0], [1, 2, -1]]
    assert merged.n_draft == (3, 2)
    assert merged.draft_probs[0].argmax(-1).tolist() == [3, 4, 0]
    assert merged.draft_probs[0].sum(-1).tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(merged.draft_probs[1, :2], probs[0])
    torch.testing.assert_close(merged.confidence, torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.8, 0.5]]))
