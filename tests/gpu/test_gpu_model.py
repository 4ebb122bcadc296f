"""The dense model's torch path on the device: logits as on the CPU, and greedy text alone and in a batch.

Text is compared where the engine itself found the device's arithmetic to be row-invariant. Where it is not, the
difference is reported as a warning: the promise of equal bits is one for CPUs.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, REHEARSAL
from shapes import QWEN3_4B, Shape, write_checkpoint

from dspark_serve.cache.store import KVStore
from dspark_serve.config import Config
from dspark_serve.engine.build import build_engine
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.models.loader import load_model, resolve
from dspark_serve.types import Request, SamplingParams

pytestmark = ON_GPU
LAYERS, PAGE, TOKENS = 2, 16, 24
# Qwen3-4B's layers under a vocabulary that is quickly written to disk.
SHAPE = Shape(64, 96, 4, 2, 16, 300) if REHEARSAL else replace(QWEN3_4B, vocab=32_000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / "qwen3", SHAPE, LAYERS)


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [
        tuple(torch.randint(3, SHAPE.vocab, (count,), generator=generator).tolist())
        for count in (1, 9, 40, 130, 17, 64, 3, 200)
    ]


def logits_of(model_dir: Path, dtype: str, device: str) -> torch.Tensor:
    """Of every position of two ragged rows, in float32 on the CPU."""
    model = load_model(resolve(str(model_dir)), dtype, device, kernels="torch")
    store = KVStore(model.info.kv_layers, 12, PAGE, model.info.dtype, model.device)
    long, short = prompts()[3], prompts()[1]
    chunks = [Chunk(long, 0, tuple(range(1, 10))), Chunk(short, 0, (10,))]
    return model.forward(probe_batch(chunks, PAGE, model.device), store).logits.float().cpu()


def generate(model_dir: Path, dtype: str, together: bool) -> tuple[list[list[int]], bool]:
    """Greedy tokens of every prompt, and whether the engine says that rows do not see each other's arithmetic."""
    options = {
        "model": {"model": str(model_dir), "device": DEVICE.type, "dtype": dtype, "max_model_len": 512},
        "cache": {"kv_cache_gib": 0.25},
        "speculation": {"method": "none"},
    }
    engine = build_engine(Config.model_validate(options))
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts()):
        tokens[str(index)] = []
        engine.add(Request(str(index), prompt, params, seed=0))
        while engine.has_work and (not together or index == len(prompts()) - 1):
            for delta in engine.step().deltas:
                tokens[delta.request_id] += delta.token_ids
    return list(tokens.values()), engine.info.row_invariant


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.15)])
def test_logits_are_those_of_the_cpu(checkpoint: Path, dtype: str, tolerance: float) -> None:
    assert torch.get_float32_matmul_precision() == "highest"  # TF32 would be a different question
    want = logits_of(checkpoint, "float32", "cpu")
    got = logits_of(checkpoint, dtype, DEVICE.type)
    assert float(want.std()) > 0.3  # there is something to compare
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_text_alone_and_in_a_batch(checkpoint: Path, dtype: str) -> None:
    alone, invariant = generate(checkpoint, dtype, together=False)
    batch, _ = generate(checkpoint, dtype, together=True)
    assert [len(text) for text in batch] == [TOKENS] * len(prompts())
    assert all(0 <= token < SHAPE.vocab for text in batch for token in text)
    equal = sum(one == other for one, other in zip(alone, batch, strict=True))
    if invariant:
        assert equal == len(alone)
    elif equal < len(alone):
        warnings.warn(
            f"{dtype} on {DEVICE.type} is not row-invariant: {equal} of {len(alone)} greedy texts of {TOKENS} tokens "
            "are the same alone and in a batch",
            stacklevel=1,
        )
