"""Transformers models on the paged cache against Transformers' own forward.

Must not know: any checkpoint; models are tiny, random and built here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import chunked, run_one, run_steps, step_batch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, GEMMA4, MOE, SIZES, WINDOW, make_config, make_module
from torch import Tensor

from dspark_serve.cache.store import KVStore, LayerGeometry
from dspark_serve.models import hf
from dspark_serve.models.hf import HFModel
from dspark_serve.models.hf_probe import UnsupportedModel

LENGTHS = (41, 23, 30)
TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small only lose time to threads, above all beside other test processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequences(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in LENGTHS]


@dataclass(frozen=True)
class Subject:
    model: HFModel
    module: Any
    logits: list[Tensor]  # per sequence [tokens, vocab], by Transformers alone
    states: list[Tensor]  # per sequence [tokens, layers * hidden]: embeddings and all layers but the last
    last: list[Tensor]  # per sequence [tokens, hidden]: after the last layer and the final norm


@cache
def subject(family: str) -> Subject:
    name, changes = FAMILIES[family]
    module = make_module(make_config(name, **changes))
    with torch.no_grad():  # with the attention Transformers chooses by itself, before any code of ours has seen it
        outputs = [module(input_ids=torch.tensor([s]), output_hidden_states=True) for s in sequences()]
    logits = [o.logits[0] for o in outputs]
    states = [torch.cat([h[0] for h in o.hidden_states[:-1]], dim=-1) for o in outputs]
    return Subject(HFModel(module), module, logits, states, [o.hidden_states[-1][0] for o in outputs])


def close(got: Tensor | None, want: Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def every_tap(model: HFModel) -> range:
    return range(-1, model.info.num_layers - 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [LENGTHS[0], 1, 7])
def test_one_sequence_equals_transformers(family: str, chunk: int) -> None:
    s, tokens = subject(family), sequences()[0]
    page_size = 4 if chunk == 7 else 16
    trace = run_one(s.model, tokens, chunked(len(tokens), chunk), taps=every_tap(s.model), page_size=page_size)
    close(trace.logits, s.logits[0])
    close(trace.taps, s.states[0])
    assert trace.logits.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_company_and_stale_pages_change_nothing(family: str) -> None:
    s = subject(family)
    # Prefills beside decodes, rows that pause, another order of rows in every step.
    steps = [{0: 20}, {1: 9, 0: 1}, {2: 30, 0: 1, 1: 5}, {0: 19, 1: 9}]
    for fill in (None, 1e3):
        traces = run_steps(s.model, sequences(), steps, taps=every_tap(s.model), page_size=4, seed=3, fill=fill)
        for trace, logits, states in zip(traces, s.logits, s.states, strict=True):
            close(trace.logits, logits)
            close(trace.taps, states)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4"])
def test_the_last_tap_is_the_residual_before_the_final_norm(family: str) -> None:
    s, tokens = subject(family), sequences()[0]
    last = s.model.info.num_layers - 1
    taps = run_one(s.model, tokens, taps=(last,)).taps
    assert taps is not None
    close(s.module.model.norm(taps), s.last[0])


def test_taps_come_in_the_order_asked_for_and_leave_no_hooks() -> None:
    s, tokens = subject("gemma3"), sequences()[1]

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in s.module.modules())

    before = hooks()  # Transformers leaves some of its own
    taps = run_one(s.model, tokens, taps=(2, -1, 2)).taps
    states = s.states[1].split(SIZES["hidden_size"], dim=-1)
    close(taps, torch.cat([states[3], states[0], states[3]], dim=-1))
    for wrong in (-2, s.model.info.num_layers):
        with pytest.raises(ValueError, match="taps"):
            run_one(s.model, tokens, taps=(0, wrong))
    assert hooks() == before


def test_logits_of_samples_then_scores_and_of_nothing() -> None:
    s, tokens = subject("gemma4"), sequences()[1]
    batch = step_batch(tokens, [len(tokens)])[0]
    store = KVStore(s.model.info.kv_layers, 8, 16)
    some = replace(batch, sample_index=torch.tensor([22, 3]), score_index=torch.tensor([0, 7, 3]))
    close(s.model.forward(some, store).logits, s.logits[1][[22, 3, 0, 7, 3]])
    none = replace(batch, sample_index=torch.empty(0, dtype=torch.int64))
    out = s.model.forward(none, store)
    assert out.logits.shape == (0, SIZES["vocab_size"])
    assert out.taps is None


def test_the_dense_arithmetic_is_bitwise_row_invariant() -> None:
    s = subject("llama")
    alone = [run_one(s.model, tokens).logits for tokens in sequences()]
    assert torch.equal(run_one(s.model, sequences()[0], [1] * LENGTHS[0]).logits, alone[0])
    steps = [{0: 20}, {1: 9, 0: 1}, {2: 30, 0: 1, 1: 5}, {0: 19, 1: 9}]
    for trace, want in zip(run_steps(s.model, sequences(), steps, page_size=4), alone, strict=True):
        assert torch.equal(trace.logits, want)


def test_geometry_is_found_layer_by_layer() -> None:
    wide, narrow = LayerGeometry(1, 32), LayerGeometry(2, 16)
    info = subject("gemma4").model.info
    assert info.kv_layers == (narrow, wide, narrow, wide)
    assert (info.architecture, info.num_layers, info.hidden_size) == ("Gemma4ForCausalLM", 4, 64)
    assert (info.vocab_size, info.max_model_len, info.dtype) == (160, 512, torch.float32)
    shared = subject("gemma4-shared").model.info.kv_layers
    assert [g.kv_heads for g in shared] == [2, 2, 0, 0]  # the last two layers store nothing
    assert subject("deepseek-v3").model.info.kv_layers == (LayerGeometry(4, 24, 12),) * 3


def test_a_multimodal_model_is_served_for_text() -> None:
    text = make_config("Gemma3TextConfig", sliding_window=WINDOW).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision.update(image_size=28, patch_size=14)
    module = make_module(transformers.Gemma3Config(text_config=text, vision_config=vision))
    tokens = sequences()[0]
    with torch.no_grad():
        want = module(input_ids=torch.tensor([tokens])).logits[0]
    model = HFModel(module)
    assert model.info.num_layers == 3
    close(run_one(model, tokens, chunked(len(tokens), 7)).logits, want)


def test_half_precision_is_served_in_its_own_dtype() -> None:
    module = make_module(make_config("Qwen3MoeConfig", **MOE, num_experts=4)).to(torch.bfloat16)
    model = HFModel(module)
    assert model.info.dtype == torch.bfloat16
    trace = run_one(model, sequences()[0], taps=(0,))
    assert trace.logits.dtype == torch.float32
    assert trace.taps is not None
    assert trace.taps.dtype == torch.bfloat16


def test_longrope_is_served_up_to_where_its_rotation_changes() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = make_config("Phi3Config", rope_parameters=rope, original_max_position_embeddings=64)
    assert HFModel(make_module(config)).info.max_model_len == 64


def test_taps_of_layers_without_a_residual_stream_are_refused() -> None:
    changes = {**GEMMA4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    changes.update(intermediate_size=96, activation_sparsity_pattern=None)
    model = HFModel(make_module(make_config("Gemma3nTextConfig", **changes)))
    run_one(model, sequences()[1])
    with pytest.raises(UnsupportedModel, match="residual stream"):
        run_one(model, sequences()[1], taps=(0,))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_module(make_config("Qwen3Config", architectures=["Qwen3ForCausalLM"])).save_pretrained(tmp_path)
    return tmp_path


def load(path: Path) -> HFModel:
    return HFModel.from_pretrained(str(path), torch.float32, "cpu")


def test_a_saved_checkpoint_is_served_as_it_was(saved: Path) -> None:
    tokens = sequences()[0]
    with torch.no_grad():
        want = make_module(make_config("Qwen3Config"))(input_ids=torch.tensor([tokens])).logits[0]
    model = load(saved)
    assert model.info.architecture == "Qwen3ForCausalLM"
    close(run_one(model, tokens).logits, want)


def test_missing_tensors_are_named(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lacks the tensors model\.layers\.1\.mlp\.up_proj\.weight"):
        load(saved)


def test_pickles_are_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    torch.save(load_file(file), saved / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(UnsupportedModel, match=r"holds no \.safetensors"):
        load(saved)


def test_code_in_a_checkpoint_is_not_run(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config.update(model_type="homemade", architectures=["Homemade"], auto_map={"AutoConfig": "code.HomeConfig"})
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "code.py").write_text(f"open({str(saved / 'ran')!r}, 'w')\n")
    with pytest.raises(UnsupportedModel, match="Homemade"):
        load(saved)
    assert not (saved / "ran").exists()


def test_a_refusal_comes_before_the_weights_are_read(tmp_path: Path) -> None:
    make_config("Qwen3_5TextConfig", architectures=["Qwen3_5ForCausalLM"], num_hidden_layers=4).save_pretrained(
        tmp_path
    )
    with pytest.raises(UnsupportedModel, match="linear_attention layers"):
        load(tmp_path)


def test_serving_and_transformers_can_share_a_process() -> None:
    """Registered names are all that is global: another model keeps the attention it had."""
    other = make_module(make_config("LlamaConfig"), seed=1)
    before: str = other.config._attn_implementation
    HFModel(make_module(make_config("LlamaConfig")))
    assert other.config._attn_implementation == before
    assert before != hf.SERVING
