"""The doctor on models and heads that are small, broken, too large, or not made for each other."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dspark_kernels import native
from dspark_kernels.blocks import BlockWeight
from dspark_serve.config import load_config
from dspark_serve.doctor import served
from dspark_serve.doctor.served import examine, weight_gib
from dspark_serve.engine import build, curves
from dspark_serve.models.blocks_file import BLOCKS_FILE, write_blocks
from tests.drafters.golden import GOLDENS

TARGET = str(GOLDENS / "target")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))


def findings(model=TARGET, **options):
    """By check, with every draft verified: what steps cost is measured in one test only."""
    config = load_config({"model": model, "kv_cache_gib": 0.01, "budget": "full", **options})
    return {finding.check: finding for finding in examine(config)}


def levels(found):
    return {check: finding.level for check, finding in found.items()}


def test_a_model_alone():
    found = findings(method="none")
    assert levels(found) == dict.fromkeys(("room", "model", "pool", "exactness", "head"), "ok")
    assert "Qwen3ForCausalLM, float32 on cpu" in found["model"].found
    assert "nothing drafts" in found["head"].found
    assert found["exactness"].found.endswith("(remembered: the next start skips this check)")


def test_a_head_that_fits_and_what_it_brings(monkeypatch):
    head = GOLDENS / "dspark_vanilla"
    monkeypatch.setattr(served, "expected_length", lambda directory: 6.0 if directory == head else None)
    config = load_config({"model": TARGET, "head": str(head), "kv_cache_gib": 0.01, "max_num_seqs": 8})
    found = list(examine(config))
    [fits] = [finding for finding in found if finding.check == "head"]
    assert fits.level == "ok"
    assert "fits and passed its self-test: 7 drafts a step" in fits.found
    assert "remembered" in fits.found
    speeds = [finding for finding in found if finding.check == "speed"]
    assert [speed.found.split(":")[0] for speed in speeds] == ["1 at once", "8 at once"]


def test_a_head_that_is_worth_nothing():
    found = findings(head=str(GOLDENS / "gemma4_dspark_random"))
    assert levels(found)["head"] == "warn"
    assert "serving without speculation" in found["head"].found
    assert "remembered" not in found["head"].found


def test_a_head_for_another_model(tmp_path):
    """The head fails; what can be said of the model is said."""
    head = tmp_path / "head"
    shutil.copytree(GOLDENS / "dspark_vanilla", head)
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 8}))
    config = load_config({"model": TARGET, "head": str(head), "kv_cache_gib": 0.01, "budget": "full"})
    found = list(examine(config))
    [failed] = [finding for finding in found if finding.level == "fail"]
    assert failed.check == "head"
    assert "vocab" in failed.found
    assert {"model", "pool", "exactness"} <= {finding.check for finding in found if finding.level == "ok"}


@pytest.mark.parametrize(("share", "level"), [(1.1, "fail"), (0.9, "warn"), (0.5, "ok")])
def test_memory_for_weights_and_pool(monkeypatch, share, level):
    """The weights take this share of what the pool leaves."""
    weights = weight_gib(GOLDENS / "target", load_config())
    memory = SimpleNamespace(available=int((weights / share + 0.01) * 2**30))
    monkeypatch.setattr(served.psutil, "virtual_memory", lambda: memory)
    built = []
    monkeypatch.setattr(served, "build_engine", lambda *_: built.append(1) or _stop())
    found = findings()
    assert found["room"].level == level
    assert "beside a pool of 0.01" in found["room"].found
    assert bool(built) == (level != "fail")  # what does not fit is not loaded
    assert levels(found).get("model") == (None if level == "fail" else "fail")


def _stop():
    raise ValueError("no further")


@pytest.mark.parametrize(
    ("model", "said"), [("no-such-model", "No model 'no-such-model'"), ("EMPTY", "config.json"), ("x.bin", "pickle")]
)
def test_a_model_that_is_not_there(tmp_path, model, said):
    found = findings(model=str(tmp_path) if model == "EMPTY" else model)
    assert levels(found) == {"model": "fail"}
    assert said in found["model"].found


def test_a_small_pool_and_arithmetic_that_varies(monkeypatch):
    monkeypatch.setattr(build, "row_variance", lambda *_: "logits differ")
    monkeypatch.setattr(served, "row_variance", lambda *_: "logits differ")
    found = findings(method="none", kv_cache_gib=0.001)
    assert (found["pool"].level, found["exactness"].level) == ("warn", "warn")
    assert "less than one request at the full length" in found["pool"].found
    assert found["exactness"].found.endswith("in a batch: logits differ")


def test_transformers_code_is_said_to_be_slower():
    found = findings(model=str(GOLDENS / "gemma4_target"), method="none")
    assert found["model"].level == "warn"
    assert "through Transformers' code" in found["model"].found


def test_weights_take_what_they_take_when_loaded(tmp_path, monkeypatch):
    """bfloat16 and blocks stay as they are where there are kernels for them; torch needs float32."""
    save_file({"norm": torch.zeros(10), "w": torch.zeros(100, 10, dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    block = BlockWeight(torch.zeros(64, 32, dtype=torch.int8), torch.zeros(64, 1), torch.zeros(64, 1))
    write_blocks({"b": block}, tmp_path / BLOCKS_FILE)

    def size(**options):
        return weight_gib(tmp_path, load_config({"device": "cpu", **options})) * 2**30

    as_stored, widened = 40 + 2000 + 64 * (32 + 4 + 4), 40 + 4000 + 64 * 32 * 4
    monkeypatch.setattr(native, "load", lambda: object())
    assert size() == as_stored
    assert size(dtype="float32") == size(kernels="torch") == widened
    assert size(dtype="bfloat16") == 20 + 2000 + 64 * 32 * 2
    monkeypatch.setattr(native, "load", lambda: None)
    assert size() == widened


def test_the_number_of_drafts_that_earns_most(monkeypatch):
    """Steps of 10 to 14 ms, a draft of 2, every other draft accepted: 1.5 / 13, 1.75 / 14, 1.875 / 16 tokens per ms."""
    engine = SimpleNamespace(info=SimpleNamespace(num_speculative_tokens=3))

    def costs(draft_ms):
        curve = np.interp(np.arange(4, 17), [4, 8, 12, 16], [10.0, 11.0, 12.0, 14.0])  # by tokens, for four rows
        return SimpleNamespace(step_curve=lambda *_, **__: curve, draft_ms=lambda *_, greedy: draft_ms)

    monkeypatch.setattr(curves, "_costs", lambda _: costs(2.0))
    assert curves.best_drafts(engine, 4, 2.0) == (2, pytest.approx(1.25))
    monkeypatch.setattr(curves, "_costs", lambda _: costs(9.0))
    assert curves.best_drafts(engine, 4, 2.0) == (0, 1.0)
