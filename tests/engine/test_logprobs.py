"""Log-probabilities of rows whose drafts were accepted in part, beside rows that did not ask and prompts to score."""

from types import SimpleNamespace

import pytest
import torch

from dspark_serve.engine import logprobs
from dspark_serve.tensors import Verdict
from dspark_serve.types import RowResult

VOCAB = 40


def entry(logits, token, count):
    """As (token, logprob, rank, alternatives)."""
    told = logits.double().log_softmax(-1)
    best = told.argsort(descending=True)[:count]
    rank = 1 + int((told > told[token]).sum())
    return token, pytest.approx(float(told[token]), abs=1e-5), rank, best.tolist()


def seen(entries):
    return [(each.token_id, each.logprob, each.rank, [token for token, _ in each.top]) for each in entries]


def test_every_row_gets_its_own() -> None:
    tokens = [[5, 6, -1], [1, 2, -1], [7, -1, -1], [8, 9, 3], [-1, -1, -1]]
    batch = SimpleNamespace(
        logprobs=(2, None, 0, 3, 1),
        sample_lens=(3, 2, 2, 3, 0),  # the last is still in its prompt
        num_samples=10,
        score_targets=torch.tensor([11, 12, 13]),
        score_lens=(0, 1, 0, 0, 2),
        score_top=(0, 2, 0, 0, 4),
    )
    logits = torch.randn(13, VOCAB, generator=torch.Generator().manual_seed(3))
    verdict = logprobs.asked(Verdict(torch.tensor([1, 1, 0, 2, 0]), torch.tensor(tokens)), batch, logits)  # type: ignore[arg-type]
    results = [RowResult(tokens=each) for each in verdict.host_tokens]
    found = logprobs.added(results, batch, verdict)  # type: ignore[arg-type]
    assert [each.tokens for each in found] == [(5, 6), (1, 2), (7,), (8, 9, 3), ()]
    assert seen(found[0].logprobs) == [entry(logits[0], 5, 2), entry(logits[1], 6, 2)]
    assert found[1].logprobs is None
    assert seen(found[2].logprobs) == [entry(logits[5], 7, 0)]
    assert seen(found[3].logprobs) == [entry(logits[7 + n], token, 3) for n, token in enumerate((8, 9, 3))]
    assert found[4].logprobs is None
    assert seen(found[1].prompt_logprobs) == [entry(logits[10], 11, 2)]
    assert seen(found[4].prompt_logprobs) == [entry(logits[11], 12, 4), entry(logits[12], 13, 4)]
    assert [each.prompt_logprobs for each in (found[0], found[2], found[3])] == [None] * 3


def test_nobody_asks() -> None:
    batch = SimpleNamespace(logprobs=(None,), sample_lens=(1,), score_targets=None, score_lens=(), score_top=())
    verdict = Verdict(torch.tensor([0]), torch.tensor([[4]]))
    assert logprobs.asked(verdict, batch, torch.zeros(1, VOCAB)) is verdict  # type: ignore[arg-type]
    results = [RowResult(tokens=(4,))]
    assert logprobs.added(results, batch, verdict) is results  # type: ignore[arg-type]
