"""benchmarks/gpu.py as far as no GPU is needed: its counts against numbers worked out by hand, and how it ends here."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dspark_serve.engine.recorders import EagerRecorder
from dspark_serve.models.loader import load_model, resolve

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
gpu, shapes = (importlib.import_module(name) for name in ("gpu", "shapes"))
Cost, Shape = shapes.Cost, shapes.Shape
SMALL = Shape(hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab=300)


@pytest.mark.parametrize(
    ("cost", "num_bytes", "flops"),
    [
        # 10 x 20 weights, 3 rows of 10 in and of 20 out, 2 bytes each; 3 x 10 x 20 multiplications and additions
        (shapes.product_cost(3, 10, 20, 2), 2 * (200 + 30 + 60), 1200),
        # Row one: 1 query sees 5 keys. Row two: 3 queries see 2, 3, 4. 4 queries of 64 in and out, 9 keys and values
        # of 32; 5 + 9 = 14 pairs, each 64 multiplications and additions, twice.
        (shapes.attention_cost([(1, 5), (3, 4)], SMALL, 2), 2 * (2 * 4 * 64 + 2 * 9 * 32), 14 * 64 * 4),
        (shapes.norm_cost(3, 10, 4, residual=False), 4 * (30 + 30 + 10), 120),
        (shapes.norm_cost(3, 10, 4, residual=True), 4 * (30 + 30 + 30 + 30 + 10), 150),
        (shapes.swiglu_cost(3, 10, 2), 2 * (60 + 30), 150),
        # 2 tokens: 64 + 32 numbers are read and written; 32 keys once more, 32 values in and out; a table row of 32
        (shapes.rotation_cost(2, SMALL, 2), 2 * 2 * (2 * 96 + 3 * 32 + 32), 2 * 96 * 8),
        (shapes.draw_cost(5, 300, 4), 6000, 3000),
        # 7 slots: 300 x 8 weights each; 2 rows x 7 slots: a vector of 8, and 300 logits of 4 bytes
        (shapes.markov_cost(2, 7, 300, 8, 2), 2 * (7 * 2400 + 14 * 8) + 4 * 14 * 300, 2 * 14 * 300 * 8),
    ],
)
def test_counts(cost, num_bytes, flops):
    assert cost == Cost(num_bytes, flops)


def test_a_step_is_its_products_and_attention():
    rows = [(1, 5), (3, 4)]
    weights = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96  # queries, keys and values, out; gate, up, down
    around = (64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 96)  # numbers in and out of those, per token
    attention = shapes.attention_cost(rows, SMALL, 2)
    want_bytes = 3 * (2 * (weights + 4 * around) + attention.num_bytes) + 2 * (300 * 64 + 4 * 364)
    want_flops = 3 * (2 * 4 * weights + attention.flops) + 2 * 4 * 300 * 64
    assert shapes.step_cost(rows, SMALL, 3, 2) == Cost(want_bytes, want_flops)


def test_qwen3_4b_has_the_weights_its_name_says():
    step = shapes.step_cost([(1, 1)], shapes.QWEN3_4B, 36, 2)
    assert step.flops / 2 == pytest.approx(4.02e9, rel=0.01)
    assert step.num_bytes == pytest.approx(8.04e9, rel=0.01)


def test_the_roofline_takes_the_slower_of_the_two():
    assert Cost(1000, 50).seconds(100.0, 10.0) == 10.0
    assert Cost(100, 500).seconds(100.0, 10.0) == 50.0
    share = gpu.Share.of([20.0, 40.0, 25.0], Cost(1000, 50), gpu.Peaks(100.0, 10.0))
    assert (share.share, share.bound) == (10 / 25, "memory")
    assert share.micros.median == 25e6
    assert gpu.Share.of([100.0], Cost(100, 500), gpu.Peaks(100.0, 10.0)).bound == "arithmetic"


def test_a_checkpoint_made_on_the_spot_loads(tmp_path):
    path = shapes.write_checkpoint(tmp_path / "model", SMALL, 3)
    info = load_model(resolve(str(path)), "float32", "cpu").info
    assert (info.architecture, info.num_layers, info.vocab_size) == ("Qwen3ForCausalLM", 3, 300)
    with safe_open(path / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - it is no dict
    matrices = sum(tensor.numel() for tensor in tensors if tensor.dim() == 2)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert 2 * matrices == shapes.step_cost([(1, 1)], SMALL, 3, 2).flops - 3 * 4 * 64  # all a step multiplies by


def test_energy_that_cannot_be_read_is_said_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert gpu.energy_meter() == "not measured: nvidia-ml-py is not installed"


def test_graphs_are_measured_beside_the_same_steps_without(tmp_path, monkeypatch):
    """Rehearsed on the CPU, with a recorder that calls again: every step is run both ways, and padded as it should."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    path = shapes.write_checkpoint(tmp_path / "model", SMALL, 1)
    model = load_model(resolve(str(path)), "float32", "cpu")
    if model.recordable(gpu.step_store(model)):
        gains = gpu.graph_gains(model, EagerRecorder(), 1)
        assert list(gains) == [f"{rows} x {tokens}" for rows, tokens in gpu.STEPS]
        assert all(gain.speedup == gain.eager.median / gain.graph.median > 0 for gain in gains.values())
    plain = load_model(resolve(str(path)), "float32", "cpu", kernels="torch")
    assert gpu.graph_gains(plain, EagerRecorder(), 1).startswith("not measured: attention runs in plain torch")


def test_graphs_that_do_not_hold_are_not_measured(tmp_path, monkeypatch):
    class Stale(EagerRecorder):
        def record(self, call):
            first = call()
            return lambda: first

    path = shapes.write_checkpoint(tmp_path / "model", SMALL, 1)
    model = load_model(resolve(str(path)), "float32", "cpu")
    if not model.recordable(gpu.step_store(model)):
        pytest.skip("needs the C++ kernels, which were not built here")
    assert gpu.graph_gains(model, Stale(), 1).startswith("not measured: CUDA graphs of steps of up to 1 tokens differ")


def test_without_cuda_it_says_so_in_a_sentence(tmp_path):
    """Also where there is a GPU: it is hidden."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick", "--json", str(report)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == gpu.NO_CUDA + "\n"
    assert "\n" not in gpu.NO_CUDA
    assert not report.exists()


def test_reports_can_be_written(tmp_path):
    """Shares and peaks as JSON, without a GPU to measure them on."""
    share = gpu.Share.of([1.0, 2.0], Cost(1, 1), gpu.Peaks(1.0, 1.0))
    gpu.write_json(tmp_path / "r.json", {"peaks": gpu.Peaks(1.0, 2.0), "kernels": {"norm": share}})
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["kernels"]["norm"]["bound"] == "memory"
    assert read["peaks"] == {"bytes_per_s": 1.0, "flops_per_s": 2.0}
