"""Draft distributions that are not written out, wherever written-out ones may go: the same decisions come of them."""

from dataclasses import replace

import pytest
import torch

from dspark_serve.drafters.portfolio import _merge
from dspark_serve.engine.batch import Batcher
from dspark_serve.speculation.verify import verify
from dspark_serve.tensors import DraftLogits, Proposal
from tests.engine.test_batch import three_rows
from tests.speculation.batches import some_logits, step_batch

TEMPERATURES = [1.0, 0.0, 0.6, 2.0]
ROWS, WIDTH, VOCAB = 4, 3, 50


def drawn_from(rows=ROWS, width=WIDTH, vocab=VOCAB, temperatures=TEMPERATURES):
    logits, temperature = some_logits(rows * width, vocab).view(rows, width, vocab), torch.tensor(temperatures[:rows])
    divisor = torch.where(temperature > 0, temperature, 1.0)[:, None, None]
    return DraftLogits(logits, (logits / divisor).logsumexp(-1), temperature)


def test_probabilities_are_the_softmax_at_each_rows_temperature():
    given = drawn_from()
    probs = given.probs()
    for row, temperature in enumerate(TEMPERATURES):
        if temperature == 0:
            want = torch.nn.functional.one_hot(given.logits[row].argmax(-1), VOCAB).float()
        else:
            want = (given.logits[row].double() / temperature).softmax(-1).float()
        torch.testing.assert_close(probs[row], want, atol=1e-6, rtol=1e-5)


def test_trimming_and_spreading_are_those_of_written_out_probabilities():
    given = drawn_from()
    tokens = torch.zeros((ROWS, WIDTH), dtype=torch.int64)
    lazy, dense = (Proposal(tokens, (WIDTH,) * ROWS, probs) for probs in (given, given.probs()))
    kept = [2, 0, 1, 2]
    assert torch.equal(lazy.trim(kept).draft_probs.probs(), dense.trim(kept).draft_probs)
    index = [4, 0, 2, 5]
    wide = lazy.spread(index, 6).draft_probs.probs()
    assert torch.equal(wide[index], dense.spread(index, 6).draft_probs[index])
    assert wide.isfinite().all()


def test_they_go_to_the_rows_that_drafted():
    given = drawn_from(1, 3)
    batch = Batcher(4).build(three_rows(), Proposal(torch.tensor([[1, 2, 3]]), (3,), given).trim([2]))
    assert batch.draft_probs.logits.shape == (3, 2, VOCAB)
    assert torch.equal(batch.draft_probs.probs()[1], given.probs()[0, :2])


def test_lookups_beside_them_are_certain():
    given, certain = drawn_from(1, 2), Proposal.from_lists([[3, 4, 0], ()], confidence=[[0.5] * 3, ()])
    stated = torch.full((1, 2), 0.5)
    parts = [Proposal(torch.tensor([[1, 2]]), (2,), probs, stated) for probs in (given, given.probs())]
    lazy, dense = (_merge(part, [1], certain, "dspark") for part in parts)
    assert torch.equal(lazy.draft_probs, dense.draft_probs)


@pytest.mark.parametrize("top_k", [0, 5])
def test_the_rule_takes_both(top_k):
    given = drawn_from()
    drafts = given.logits.argmax(-1).tolist()
    batch = step_batch(drafts, TEMPERATURES, top_k=top_k)
    likeness = torch.cat([given.logits, some_logits(ROWS, VOCAB, seed=4).unsqueeze(1)], dim=1).flatten(0, 1)
    logits = likeness + some_logits(batch.num_samples, VOCAB, seed=3, spread=0.3)
    lazy, dense = (verify(logits, replace(batch, draft_probs=p), "rejection") for p in (given, given.probs()))
    certain = verify(logits, batch, "rejection")
    assert torch.equal(lazy.tokens, dense.tokens)
    assert torch.equal(lazy.n_accepted, dense.n_accepted)
    assert not torch.equal(certain.tokens, dense.tokens)
