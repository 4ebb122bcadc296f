"""The portfolio's choice: what it has seen accepted decides, per request; rows of one proposal may mix drafters."""

import numpy as np
import torch

from dspark_serve.drafters.portfolio import Acceptance, _merge
from dspark_serve.tensors import Proposal


def test_acceptance_is_conditional_on_the_drafts_before():
    seen = Acceptance(4)
    line = seen.lines(["r"])
    before = seen.rates(line, 3)
    for _ in range(50):
        seen.record("r", 3, 4, 1)  # the first right, the second wrong, the rest never tried
    rates = seen.rates(line, 3)[0]
    assert rates[0] > 0.95
    assert rates[1] < 0.05
    assert (rates[2:] == before[0, 2:]).all()
    np.testing.assert_allclose(seen.rates(line, 2), before - 0.1)  # other kinds have learned nothing


def test_acceptance_of_a_new_request_is_that_of_all_and_a_released_one_is_forgotten():
    seen = Acceptance(2)
    for number in range(40):  # more than there are lines at first
        seen.record(str(number), 1, 2, 2 * (number % 2))
    right, wrong, new = (seen.rates(seen.lines([name]), 1)[0, 0] for name in ("39", "38", "new"))
    assert wrong < new < right
    seen.release("39")
    assert seen.rates(seen.lines(["another"]), 1)[0, 0] == new  # on the line that has become free
    assert len({int(line) for line in seen.lines([*map(str, range(39)), "new", "another"])}) == 41


def test_lookups_are_certain_among_drafts_with_probabilities():
    probs = torch.full((1, 2, 5), 0.2)
    drawn = Proposal(torch.tensor([[1, 2]]), (2,), probs, torch.tensor([[0.9, 0.8]]))
    copied = Proposal.from_lists([[3, 4, 0]])
    merged = _merge(drawn, [1], copied, [0], ("ngram", "dspark"), np.full((2, 3), 0.5))
    assert merged.tokens.tolist() == [[3, 4, 0], [1, 2, -1]]
    assert merged.n_draft == (3, 2)
    assert merged.draft_probs[0].argmax(-1).tolist() == [3, 4, 0]
    assert merged.draft_probs[0].sum(-1).tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(merged.draft_probs[1, :2], probs[0])
    torch.testing.assert_close(merged.confidence, torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.8, 0.5]]))
