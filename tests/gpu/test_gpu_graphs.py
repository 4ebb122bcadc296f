"""CUDA graphs on the device: every size has the bits of the model on the same padded step, whatever was played before.

The rehearsal plays them by a recorder that calls again, on the CPU's kernels.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, ON_KERNELS, REHEARSAL
from shapes import QWEN3_4B, Shape, write_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from ragged import ragged_step, written_store

from dspark_serve.cache.store import KVStore
from dspark_serve.config import Config
from dspark_serve.engine.build import build_engine
from dspark_serve.engine.graph_check import with_graphs
from dspark_serve.engine.graphs import StepGraphs
from dspark_serve.engine.padding import Limits, StepInputs
from dspark_serve.engine.recorders import CudaRecorder, EagerRecorder, Recorder
from dspark_serve.engine.runner import Runner
from dspark_serve.models.base import StagedModel
from dspark_serve.models.loader import load_model, resolve
from dspark_serve.tensors import StepBatch
from dspark_serve.types import Request, SamplingParams

pytestmark = ON_KERNELS
PAGE, PAGES, TAPS, LAYERS = 16, 700, (0, 1), 2
SHAPE = Shape(64, 96, 4, 2, 16, 300) if REHEARSAL else replace(QWEN3_4B, vocab=32_000)
LIMITS = Limits(max_num_seqs=40, max_tokens=256, max_model_len=240)
DTYPES = ["float32"] if REHEARSAL else ["bfloat16", "float32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpu") / "qwen3", SHAPE, LAYERS)


@pytest.fixture(scope="module", params=DTYPES)
def model(checkpoint: Path, request: pytest.FixtureRequest) -> StagedModel:
    made = load_model(resolve(str(checkpoint)), request.param, DEVICE.type)
    assert isinstance(made, StagedModel)
    assert made.recordable(KVStore(made.info.kv_layers, 2, PAGE, made.info.dtype, DEVICE)), made.info.backend
    return made


def recorder() -> Recorder:
    return EagerRecorder() if REHEARSAL else CudaRecorder(DEVICE)


def steps() -> list[StepBatch]:
    """Of all sizes and shapes, not in order: decoding, verification, chunks, and some of each."""
    shapes = [
        [(1, 100)],
        [(1, 7)] * 40,
        [(8, 90), (8, 11), (1, 3), (5, 64)],
        [(200, 0)],
        [(1, 230), (1, 0)],
        [(3, 17)] * 33,
        [(120, 40), (1, 40), (8, 40)],
        [(1, 0)] * 3,
        [(6, 50)],
        [(6, 30)] * 40,
        [(2, 9)] * 8,
        [(1, 33)] * 24,
        [(2, 239)],
        [(16, 0), (16, 16), (15, 31)],
        [(1, 5)] * 4,
        [(1, 60)] * 28,
        [(3, 70)] * 20,
        [(90, 10)],
    ]
    legal = [[(count, min(context, 240 - count)) for count, context in shape] for shape in shapes]
    return [ragged_step(shape, PAGES, SHAPE.vocab, seed, PAGE, DEVICE.type) for seed, shape in enumerate(legal)]


def store_of(model: StagedModel) -> KVStore:
    return written_store(model.info, PAGES, PAGE, DEVICE.type)


def pages_of(store: KVStore) -> list[torch.Tensor]:
    return [tensor[1:] for tensor in (*store.keys, *store.values)]


@torch.inference_mode()
def test_every_size_has_the_bits_of_the_padded_step(model: StagedModel) -> None:
    """Both sides write the same pages from step to step, so contexts come from the steps before; twice over all."""
    store, plain = store_of(model), store_of(model)
    graphs = StepGraphs(model, store, TAPS, LIMITS, recorder())
    used = set()
    for batch in [*steps(), *reversed(steps())]:
        count = len(batch.token_ids)
        size = next(size for size in graphs.sizes if size >= count)
        used.add(size)
        width = -(-LIMITS.max_model_len // PAGE)
        table = torch.zeros(LIMITS.rows_of(size), width, dtype=torch.int64, device=DEVICE)
        inputs = StepInputs(size, table, PAGE)
        inputs.fill(batch)
        hidden, taps = model.trunk(inputs.batch, plain, TAPS)
        assert taps is not None
        want = model.logits(hidden[:count], batch)
        got = graphs.run(batch)
        assert got is not None
        assert got.taps is not None
        assert bool(want.isfinite().all())
        assert torch.equal(got.logits, want), size
        assert torch.equal(got.taps, taps[:count]), size
        assert all(torch.equal(a, b) for a, b in zip(pages_of(store), pages_of(plain), strict=True)), size
    assert used == set(graphs.sizes)


@torch.inference_mode()
def test_neighbours_and_earlier_steps_never_leak(model: StagedModel) -> None:
    """The same step again after any other, with everything that is not its own made NaN, has the same bits."""
    store = store_of(model)
    graphs = StepGraphs(model, store, TAPS, LIMITS, recorder())
    before = [tensor.clone() for tensor in (*store.keys, *store.values)]

    def restore(own: set[int] | None = None) -> None:
        for tensor, values in zip((*store.keys, *store.values), before, strict=True):
            tensor.copy_(values)
            if own is not None:
                others = torch.tensor([page for page in range(PAGES) if page not in own], device=DEVICE)
                tensor[others] = torch.nan

    found = steps()
    for batch, other in zip(found, found[3:] + found[:3], strict=True):
        restore()
        first = graphs.run(batch)
        assert first is not None
        logits = first.logits.clone()
        graphs.run(other)
        restore(set(batch.page_table.flatten().tolist()) - {0})
        again = graphs.run(batch)
        assert again is not None
        assert torch.equal(again.logits, logits)


@torch.inference_mode()
def test_the_same_play_has_the_same_bits(model: StagedModel) -> None:
    graphs = StepGraphs(model, store_of(model), (), LIMITS, recorder())
    for batch in steps()[2:9:3]:
        first = graphs.run(batch)
        assert first is not None
        logits = first.logits.clone()
        for _ in range(2 if REHEARSAL else 20):
            again = graphs.run(batch)
            assert again is not None
            assert torch.equal(again.logits, logits)


def test_the_start_up_check_passes(model: StagedModel) -> None:
    runner, warnings = with_graphs(Runner(model, store_of(model), TAPS), LIMITS, recorder())
    assert warnings == ()
    assert runner.graphs is not None
    assert runner.graphs.sizes[-1] == LIMITS.max_tokens


@pytest.mark.skipif(REHEARSAL, reason="needs a CUDA GPU: an engine on a CPU records nothing")
def test_an_engine_serves_from_graphs(checkpoint: Path) -> None:
    """Greedy text of a few requests; the same one by one, where the engine says that neighbours do not matter."""
    options = {
        "model": {"model": str(checkpoint), "device": DEVICE.type, "dtype": "bfloat16", "max_model_len": 240},
        "cache": {"kv_cache_gib": 0.25},
        "speculation": {"method": "ngram", "budget": "full"},
    }
    engine = build_engine(Config.model_validate(options))
    assert engine.info.graph_tokens > 0, engine.info.warnings
    assert engine.info.warnings == ()

    def serve(names: list[str]) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {name: [] for name in names}
        for name in names:
            prompt = tuple(3 + (int(name) * 7 + place) % 40 for place in range(5 + int(name)))
            engine.add(Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True), seed=0))
        while engine.has_work:
            for delta in engine.step().deltas:
                tokens[delta.request_id] += delta.token_ids
        return tokens

    together = serve([str(index) for index in range(8)])
    assert all(len(tokens) == 24 for tokens in together.values())
    if engine.info.row_invariant:
        for name, tokens in together.items():
            assert serve([name]) == {name: tokens}
