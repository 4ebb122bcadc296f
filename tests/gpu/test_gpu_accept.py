"""Acceptance on the device equals the server's rule, both modes; a row's tokens do not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch
from gpu_device import ON_KERNELS, REHEARSAL, there
from test_interpreted_accept import (
    LENS,
    TEMPERATURES,
    draft_logits_for,
    kernel,
    ragged,
    same,
    spans,
    step_batch,
    # The interpreted tests themselves, with their tensors on the device: see conftest.py.
    test_a_step_without_drafts_is_a_draw,  # noqa: F401
    test_certain_drafts_are_refused_as_the_server_does,  # noqa: F401
    test_coupled_rows_are_the_servers,  # noqa: F401
    test_filters_as_thresholds,  # noqa: F401
    test_rejection_rows_are_the_servers,  # noqa: F401
)

from dspark_kernels.triton import accept, rejection

pytestmark = ON_KERNELS
VOCAB = 9001 if REHEARSAL else 151_936


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_rows_alone_at_a_real_vocabulary(mode: str) -> None:
    """Certain drafts: together as the server says, and each row alone with the same tokens."""
    logits, batch = ragged(VOCAB, torch.bfloat16)
    accepted, tokens = kernel(logits, batch, mode)
    same((accepted, tokens), logits, batch, mode)
    first, count = spans(batch)
    for row in range(len(LENS)):
        some = slice(int(first[row]), int(first[row] + count[row]))
        sampling = batch.sampling
        mine = [logits[some], batch.drafts[row : row + 1], first[:1] * 0, count[row : row + 1]]
        mine += [x[some] for x in (sampling.temperature, sampling.seed, sampling.position)]
        arguments = there(mine)
        alone = accept.accept_coupled(*arguments) if mode == "coupled" else rejection.accept_rejection(*arguments, None)
        assert alone[0].tolist() == [accepted[row]]
        assert alone[1].tolist() == [tokens[row].tolist()]


def test_drafts_with_distributions_at_a_real_vocabulary() -> None:
    batch = step_batch([[0] * n for n in LENS], TEMPERATURES)
    batch, draft, target = draft_logits_for(batch, VOCAB, seed=3)
    got = kernel(target, batch, "rejection", there(draft))
    same(got, target, batch, "rejection")
    assert 0 < int(got[0].sum()) < sum(LENS)
