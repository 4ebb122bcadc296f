"""The start-up check must pass where arithmetic is invariant and say what differs where it is not."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from test_dense import reference

from dspark_serve.cache.store import KVStore
from dspark_serve.models import layers
from dspark_serve.models.base import ModelInfo, TargetModel
from dspark_serve.models.dense import DenseModel
from dspark_serve.models.invariance import Chunk, probe_batch, row_variance
from dspark_serve.tensors import StepBatch, TargetOutput


@pytest.fixture(scope="module")
def model() -> DenseModel:
    theirs = reference("Llama", {"num_attention_heads": 6, "head_dim": 32})
    return DenseModel.from_weights(theirs.config, theirs.state_dict())


class Disturbed:
    """A model whose answers depend a little on the company."""

    def __init__(self, model: TargetModel, where: str) -> None:
        self._model, self._where = model, where

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    @property
    def device(self) -> torch.device:
        return self._model.device

    def forward(self, batch: StepBatch, store: KVStore, taps: Sequence[int] = ()) -> TargetOutput:
        out = self._model.forward(batch, store, taps)
        tokens, rows = batch.token_ids.shape[0], len(batch.query_lens)
        assert out.taps is not None
        if self._where == "single" and tokens == 1:
            return TargetOutput(out.logits * (1 + 1e-6), out.taps)
        if self._where == "company" and rows == 3:
            return TargetOutput(out.logits, out.taps * (1 + 1e-6))
        if self._where == "crowd" and tokens > 64:
            return TargetOutput(out.logits + 1e-6, out.taps)
        return out


@pytest.mark.parametrize("page_size", [16, 24])
def test_the_dense_model_passes(model: DenseModel, page_size: int) -> None:
    assert row_variance(model, page_size) is None


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("single", "logits at position 505 differ .* token by token"),
        ("company", "taps at position .* in odd chunks beside other rows"),
        ("crowd", "logits at position .* in one step with many others"),
    ],
)
def test_a_disturbance_is_described(model: DenseModel, where: str, sentence: str) -> None:
    verdict = row_variance(Disturbed(model, where), 16)
    assert verdict is not None
    assert re.search(sentence, verdict), verdict


def test_a_model_without_taps_is_checked_by_its_logits(model: DenseModel) -> None:
    class Untapped(Disturbed):
        def forward(self, batch: StepBatch, store: KVStore, taps: Sequence[int] = ()) -> TargetOutput:
            if taps:
                raise ValueError("no taps here")
            return self._model.forward(batch, store)

    assert row_variance(Untapped(model, ""), 16) is None


def test_plain_linears_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded to four rows they are invariant on most machines; where they are not, the check must say so, not fail."""
    monkeypatch.setattr(layers, "_packs", lambda dtype, device: False)
    theirs = reference("Qwen2", {})
    plain = DenseModel.from_weights(theirs.config, theirs.state_dict(), kernels="torch")
    assert plain.info.backend == "torch float32, weights in float32"
    verdict = row_variance(plain, 16)
    assert verdict is None or "differ" in verdict


def test_probe_batches_follow_the_contract() -> None:
    batch = probe_batch([Chunk((7, 8, 9), 15, (4, 2)), Chunk((5,), 0, (3,))], 16)
    assert batch.token_ids.tolist() == [7, 8, 9, 5]
    assert batch.positions.tolist() == [15, 16, 17, 0]
    assert batch.slots.tolist() == [4 * 16 + 15, 2 * 16, 2 * 16 + 1, 3 * 16]
    assert batch.page_table.tolist() == [[4, 2], [3, 0]]
    assert (batch.query_lens, batch.context_lens, batch.sample_lens) == ((3, 1), (18, 1), (3, 1))
    assert batch.drafts.tolist() == [[8, 9], [-1, -1]]
    assert batch.sampling.position.tolist() == [16, 17, 18, 1]
