"""benchmarks/llama.py as far as llama.cpp is not needed: the widened file, the figures, the pipe between engines."""

import importlib
import os
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import typer

from tests.models.gguf_files import original_weights, write_gguf

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
llama, pipe = (importlib.import_module(name) for name in ("llama", "pipe"))

ECHO = """
import os
from pipe import serve
serve({"spins": os.environ.get("GOMP_SPINCOUNT")}, lambda task: {"half of 42": 42 // task["number"]})
"""


def test_the_widened_file_says_the_same_in_float32(tmp_path):
    source, wide = tmp_path / "q4.gguf", tmp_path / "f32.gguf"
    write_gguf(source, "llama", original_weights("llama"), gguf.GGMLQuantizationType.Q4_1)
    llama.widen(source, wide)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(wide)
    assert {tensor.tensor_type.name for tensor in before.tensors} == {"Q4_1", "F32"}
    assert [(t.name, list(t.shape)) for t in before.tensors] == [(t.name, list(t.shape)) for t in after.tensors]
    for blocks, floats in zip(before.tensors, after.tensors, strict=True):
        assert floats.tensor_type.name == "F32"
        assert np.array_equal(gguf.dequantize(blocks.data, blocks.tensor_type), floats.data)
    told = [{name: field.contents() for name, field in reader.fields.items()} for reader in (before, after)]
    assert told[0] == told[1]
    assert "tokenizer.ggml.tokens" in told[0]


def test_figures():
    def runs(*tokens):
        return {f"side {i}": llama.Run(1.0, 2.0 / (i + 1), 8, list(own)) for i, own in enumerate(tokens)}

    found = [runs([[1, 2, 3, 4]], [[1, 2, 9, 4]]), runs([[5, 6, 7, 8]], [[5, 6, 7, 8]])]
    assert llama.agreement(found) == {"side 0": 1.0, "side 1": 6 / 8}
    rates = llama.rates(found, lambda run: run.decode_rate)
    assert [rates["tokens_per_s"][side].median for side in ("side 0", "side 1")] == [4.0, 8.0]
    assert rates["ratio"]["side 1"].median == 2.0
    assert llama.rates(found, lambda run: run.whole_rate)["tokens_per_s"]["side 1"].median == 4 / 2


def test_another_engine_answers_without_our_settings_and_tells_when_it_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=os.pathsep)
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    other = pipe.Pipe([sys.executable, str(script)])
    assert other.about == {"spins": None}
    assert other.ask(number=2) == {"half of 42": 21}
    with pytest.raises(RuntimeError, match=r"ended with exit code 1: .*echo\.py"):
        other.ask(number=0)


def test_an_interpreter_without_llama_cpp_is_named_with_what_to_do(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'llama_cpp'\" >&2; exit 1\n")
    python.chmod(0o755)
    with pytest.raises(typer.BadParameter, match=r"No module named 'llama_cpp'.*pip install llama-cpp-python"):
        llama._check(str(python))
