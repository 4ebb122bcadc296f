"""Padded steps through the Triton attention: rows without tokens, rows of padding, and page 0 full of NaN."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from dspark_kernels.triton import backend
from dspark_serve.engine.graphs import StepGraphs
from dspark_serve.engine.padding import Limits
from dspark_serve.engine.recorders import EagerRecorder
from dspark_serve.models.dense import DenseModel
from tests.engine.ragged import ragged_step, written_store
from tests.tiny_model import tiny_config
from tests.toy import VOCAB

PAGE, PAGES = 16, 24
LIMITS = Limits(max_num_seqs=4, max_tokens=24, max_model_len=64)


@pytest.fixture(scope="module")
def model() -> DenseModel:
    torch.manual_seed(0)
    config = tiny_config(VOCAB, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    made = DenseModel.from_weights(config, LlamaForCausalLM(config).state_dict())
    made._stack, made._kernels = None, backend.Kernels()  # type: ignore[assignment]  # layer by layer
    return made


def test_bits_are_those_of_the_step_alone(model: DenseModel) -> None:
    store, plain = (written_store(model.info, PAGES, PAGE) for _ in range(2))
    assert model.recordable(store)
    graphs = StepGraphs(model, store, (0,), LIMITS, EagerRecorder())
    for tensor in (*store.keys, *store.values):
        tensor[0] = torch.nan
    for shape in ([(1, 40)], [(3, 7), (1, 33)], [(9, 0), (1, 20), (7, 41)], [(2, 3)] * 4, [(1, 63)], [(20, 30)]):
        step = ragged_step(shape, PAGES, VOCAB, len(shape), PAGE)
        want, got = model.forward(step, plain, (0,)), graphs.run(step)
        assert got is not None
        assert bool(want.logits.isfinite().all())
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.taps, want.taps)
        for tensor, other in zip((*store.keys, *store.values), (*plain.keys, *plain.values), strict=True):
            assert torch.equal(tensor[1:], other[1:])
