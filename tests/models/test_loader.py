"""From a name to weights: GGUF conversion against gguf's own arithmetic, refusals, defaults, the default model."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import LLAMA_SHAPE, original_weights, write_gguf
from safetensors.torch import save_file
from transformers import LlamaConfig

from dspark_serve.models import gguf_convert
from dspark_serve.models.catalog import LoadError, ModelNotFound
from dspark_serve.models.loader import generation_defaults, iterate_weights, load_model, resolve, weight_files

TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 40}
Q = gguf.GGMLQuantizationType


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _model_dir(path: Path, **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    save_file({"a": torch.ones(2)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0, Q.F16, Q.F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_gguf_equals_dequantize(arch: str, kind: Q, tmp_path: Path, own_cache: Path) -> None:
    weights = original_weights(arch)
    write_gguf(tmp_path / "tiny.gguf", arch, weights, kind)
    resolved = resolve(str(tmp_path / "tiny.gguf"))
    assert resolved.source == "gguf"
    loaded = dict(iterate_weights(resolved.path, progress=False))
    assert set(loaded) == set(weights)
    for name, weight in weights.items():
        stored = kind if weight.ndim == 2 else Q.F32
        expected = gguf.dequantize(gguf.quantize(weight, stored), stored)
        assert loaded[name].dtype == torch.float32
        np.testing.assert_array_equal(loaded[name].numpy(), expected, err_msg=name)
    config = json.loads((resolved.path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM" if arch == "llama" else "Qwen2ForCausalLM"]
    assert config["num_key_value_heads"] == LLAMA_SHAPE.kv_heads
    assert config["tie_word_embeddings"] is False
    assert resolve(str(tmp_path / "tiny.gguf")).path == resolved.path  # once


def test_gguf_tokenizer_and_stop_ids(tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "llama", original_weights("llama"), Q.F32, pre="smollm", eot=3)
    path = resolve(str(tmp_path / "tiny.gguf")).path
    assert generation_defaults(path).eos_token_ids == (2, 3)
    from dspark_serve.text import Tokenizer

    tokenizer = Tokenizer.load(path)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("ab 12é")) == "ab 12é"
    assert [tokenizer.token_text(i) for i in tokenizer.encode("a12")] == ["a", "1", "2"]  # though "12" is a merge
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi"


def test_gguf_changed_file_is_converted_again(tmp_path: Path, own_cache: Path) -> None:
    weights = original_weights("llama")
    write_gguf(tmp_path / "tiny.gguf", "llama", weights, Q.F32)
    first = resolve(str(tmp_path / "tiny.gguf")).path
    write_gguf(tmp_path / "tiny.gguf", "llama", weights, Q.F16)
    assert resolve(str(tmp_path / "tiny.gguf")).path != first


def test_gguf_incomplete_truncated_garbage(tmp_path: Path, own_cache: Path) -> None:
    weights = original_weights("llama")
    write_gguf(tmp_path / "less.gguf", "llama", {k: v for k, v in weights.items() if "layers.1.mlp.up" not in k}, Q.F32)
    with pytest.raises(LoadError, match=r"lacks 1 tensors, model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve(str(tmp_path / "less.gguf"))
    write_gguf(tmp_path / "whole.gguf", "llama", weights, Q.F32)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:-5000])
    (tmp_path / "noise.gguf").write_bytes(b"not a gguf file at all" * 10)
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("cut", "noise", "empty"):
        with pytest.raises(LoadError, match="cannot be read"):
            resolve(str(tmp_path / f"{name}.gguf"))
    with pytest.raises(ModelNotFound, match="No such file"):
        resolve(str(tmp_path / "absent.gguf"))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_are_recognised(factor: float) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** (-torch.arange(0, 128, 2) / 128)
    found = gguf_convert._llama3_scaling(plain / frequencies, 5e5)
    assert found == {key: value for key, value in rope.items() if key != "rope_theta"}
    with pytest.raises(LoadError, match="no published Llama 3"):
        gguf_convert._llama3_scaling(plain / frequencies * 1.5, 5e5)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    for name in ("model.bin", "absent.pt", "x.PTH", "y.ckpt"):
        with pytest.raises(LoadError, match="pickle"):
            resolve(str(tmp_path / name))
    directory = _model_dir(tmp_path / "dir")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"no safetensors weights \(pytorch_model.bin is a pickle file"):
        resolve(str(directory))


def test_bad_directories(tmp_path: Path) -> None:
    directory = _model_dir(tmp_path / "dir")
    with pytest.raises(LoadError, match=r"\(LlamaForCausalLM\) cannot be loaded: '\w+' is missing"):
        load_model(resolve(str(directory)))
    _model_dir(directory, **LlamaConfig(**TINY).to_dict() | {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(LoadError, match=r"\(LlamaForCausalLM\) cannot be loaded: .*no place for: a$"):
        load_model(resolve(str(directory)))
    assert resolve(str(directory)).path == directory
    (directory / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(LoadError, match="damaged or truncated"):
        load_model(resolve(str(directory)))
    save_file({"a": torch.ones(1000)}, directory / "model.safetensors")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(LoadError, match="damaged or truncated"):
        list(iterate_weights(directory))
    for text, message in (("[]", "JSON object"), ("{", "as JSON"), ("{}", "names no architecture")):
        (directory / "config.json").write_text(text)
        with pytest.raises(LoadError, match=message):
            load_model(resolve(str(directory)))
    (directory / "config.json").unlink()
    with pytest.raises(LoadError, match=r"has no config\.json"):
        resolve(str(directory))


def test_sharded_index(tmp_path: Path) -> None:
    directory = _model_dir(tmp_path / "dir")
    (directory / "model.safetensors").unlink()
    save_file({"a": torch.ones(2)}, directory / "one.safetensors")
    save_file({"b": torch.zeros(3)}, directory / "two.safetensors")
    save_file({"c": torch.zeros(3)}, directory / "unlisted.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert [name for name, _ in iterate_weights(directory)] == ["a", "b"]
    (directory / "two.safetensors").unlink()
    with pytest.raises(LoadError, match=r"names two\.safetensors, which is not there"):
        weight_files(directory)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(LoadError, match="no weight_map"):
        weight_files(directory)


def test_unknown_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match="smollm2-135m-instruct"):
        resolve("no-such-model")
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(LoadError, match="neither a model directory"):
        resolve(str(tmp_path / "notes.md"))
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("cannot reach it\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelNotFound, match=r"the hub did not give it: cannot reach it$"):
        resolve("someone/some-model")


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_gguf_model_computes_what_transformers_computes(arch: str, tmp_path: Path, own_cache: Path) -> None:
    from helpers import run_one
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf", arch, original_weights(arch), Q.Q8_0)
    resolved = resolve(str(tmp_path / "tiny.gguf"))
    tokens = [5, 9, 100, 7, 7, 30]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(resolved.path)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(run_one(load_model(resolved), tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_unknown_architecture_and_dtype(tmp_path: Path) -> None:
    directory = _model_dir(tmp_path / "dir", architectures=["MadeUpForCausalLM"], model_type="made_up")
    with pytest.raises(LoadError, match="MadeUpForCausalLM"):
        load_model(resolve(str(directory)))
    with pytest.raises(LoadError, match="dtype int8"):
        load_model(resolve(str(directory)), dtype="int8")


def test_generation_defaults(tmp_path: Path) -> None:
    directory = _model_dir(tmp_path / "dir", eos_token_id=7, bos_token_id=1)
    assert generation_defaults(directory).eos_token_ids == (7,)
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 6], "temperature": 0.6, "top_k": 20, "do_sample": True})
    )
    defaults = generation_defaults(directory)
    assert defaults.eos_token_ids == (5, 6)
    assert defaults.bos_token_id == 1
    assert defaults.sampling == {"temperature": 0.6, "top_k": 20.0}
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 9, "content": "<end>"}]}))
    assert generation_defaults(directory).eos_token_ids == (5, 6, 9)


def test_default_model_is_the_file_dequantised(smollm2_dir: Path) -> None:
    from transformers.integrations.gguf.reader import GgufHeader  # GGUFReader takes seconds over the vocabulary

    file = next(smollm2_dir.glob("*.gguf"))
    header, data = GgufHeader.from_file(str(file)), np.memmap(file, mode="r", dtype=np.uint8)
    source = {}
    for tensor in header.tensors:
        start = header.data_start + tensor.offset
        blocks = data[start : start + tensor.nbytes].reshape(*tensor.shape[:-1], -1)
        source[tensor.name] = gguf.dequantize(np.asarray(blocks), Q(tensor.ggml_type))
    loaded = dict(iterate_weights(smollm2_dir, progress=False))
    assert len(loaded) == len(source) == 272
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(30):
        for ours, theirs in (
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    for ours, theirs in names.items():
        np.testing.assert_array_equal(loaded[ours].numpy(), source[theirs], err_msg=ours)
    for layer in (0, 29):  # llama.cpp keeps each head's two RoPE halves interleaved
        for ours, theirs, heads in (("q", "attn_q", 9), ("k", "attn_k", 3)):
            stored = source[f"blk.{layer}.{theirs}.weight"]
            halves = stored.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(stored.shape)
            weight = loaded[f"model.layers.{layer}.self_attn.{ours}_proj.weight"]
            np.testing.assert_array_equal(weight.numpy(), halves)
    assert generation_defaults(smollm2_dir).eos_token_ids == (2,)
