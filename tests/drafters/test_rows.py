"""Drawing from a few tokens is drawing from the whole vocabulary in which the others cannot come."""

import pytest
import torch

from dspark_kernels import noise
from dspark_serve import sampling as sampling_module
from dspark_serve.drafters.rows import Drawer
from dspark_serve.sampling import draw, draw_target, target_probs, target_support
from dspark_serve.tensors import SamplingBatch

VOCAB, FEW, ROWS = 500, 64, 40


def sampling(temperature, top_k=0, top_p=1.0):
    generator = torch.Generator().manual_seed(1)
    return SamplingBatch(
        temperature=torch.tensor([temperature, 0.0] * (ROWS // 2)),
        top_k=torch.full((ROWS,), top_k),
        top_p=torch.full((ROWS,), top_p),
        min_p=torch.zeros(ROWS),
        seed=torch.randint(0, 1 << 40, (ROWS,), generator=generator),
        position=torch.arange(ROWS) + 7,
        all_greedy=False,
        any_filter=top_k > 0 or top_p < 1,
    )


@pytest.mark.parametrize("options", [(0.8,), (1.5,), (1.0, 5), (1.0, 0, 0.7)])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_draft_vocabulary_changes_no_draw(options, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(sampling_module, "_kernels", lambda logits: None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(VOCAB, generator=generator)[:FEW].sort().values
    logits = torch.randn(ROWS, FEW, generator=generator) * 2
    whole = torch.full((ROWS, VOCAB), -torch.inf).index_copy_(1, ids, logits)
    batch = sampling(*options)
    for slot in range(3):
        there = sampling(*options)
        object.__setattr__(there, "position", batch.position + slot)
        token, probs = Drawer("coupled", VOCAB, ids).draw(logits, batch, slot)
        assert probs is None
        assert torch.equal(token, draw_target(whole, there))
        token, probs = Drawer("rejection", VOCAB, ids).draw(logits, batch, slot)
        support = target_support(whole, there)
        assert torch.equal(token, draw(support, there.seed, there.position, noise.DRAFT))
        expected = torch.zeros(ROWS, VOCAB).scatter_add_(1, support.ids, target_probs(support))
        torch.testing.assert_close(probs, expected)
