"""The whole engine on the kernels: speculation, neighbours and chunks change no bit of what plain decoding says.

A toy model attends by the Triton kernels and the engine accepts by them; products are those of the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from dspark_kernels.triton import accept, backend
from dspark_serve.engine import engine as engine_module
from dspark_serve.models.dense import DenseModel
from dspark_serve.tensors import StepBatch, Verdict
from tests.tiny_model import tiny_config
from tests.toy import VOCAB, Collected, drafter_named, make_engine, make_request, run

LENGTHS = [1, 9, 24, 12]
launched: list[str] = []


class Counted(backend.Kernels):
    def attention(self, *args: Any, **options: Any) -> Tensor:
        launched.append("attention")
        return super().attention(*args, **options)


def verify(logits: Tensor, batch: StepBatch, mode: str) -> Verdict:
    assert mode == "coupled"
    launched.append("accept")
    count, sampling = torch.tensor(batch.sample_lens), batch.sampling
    parameters = sampling.temperature, sampling.seed, sampling.position
    rows = batch.drafts, count.cumsum(0) - count, count
    return Verdict(*accept.accept_coupled(logits[: batch.num_samples], *rows, *parameters))


@pytest.fixture(scope="module")
def model() -> DenseModel:
    torch.manual_seed(0)
    config = tiny_config(VOCAB, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    made = DenseModel.from_weights(config, LlamaForCausalLM(config).state_dict())
    made._stack, made._kernels = None, Counted()  # type: ignore[assignment]  # layer by layer, not in one C++ call
    return made


def requests() -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    options = {"max_tokens": 7, "logprobs": 0, "ignore_eos": True}
    return [
        make_request(f"r{i}", prompt, seed=i, temperature=0.8 * (i % 2), **options) for i, prompt in enumerate(prompts)
    ]


def serve(model: DenseModel, drafter: Any, some: list[Any], **options: Any) -> Collected:
    engine = make_engine(model, drafter, page_size=4, pages=80, prefix_caching=False, **options)
    for tensor in (*engine.runner.store.keys, *engine.runner.store.values):
        tensor.fill_(torch.nan)  # whatever is read has been written
    return run(engine, some)


@pytest.fixture(scope="module")
def plain(model: DenseModel) -> Collected:
    """Each request alone, without drafts, its prompt in one piece."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "verify", verify)
        alone = [serve(model, None, [request]) for request in requests()]
    whole = Collected()
    for got in alone:
        whole.tokens |= got.tokens
        whole.logprobs |= got.logprobs
    return whole


@pytest.mark.parametrize(("drafter", "chunk"), [("right", 7), ("random", None)])
def test_same_bits(
    model: DenseModel, plain: Collected, drafter: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "verify", verify)
    launched.clear()
    truth = {r.request_id: [*r.prompt_token_ids, *plain.tokens[r.request_id]] for r in requests()}
    got = serve(model, drafter_named(drafter, truth), requests(), chunk=chunk)
    assert got == plain
    assert {"attention", "accept"} == set(launched)
    assert got.accepted == got.kept if drafter == "right" else 0 < got.accepted < got.kept
