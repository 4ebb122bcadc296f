"""Every reason to refuse a Transformers model, and that it is found at load.

Must not know: how served models compute (test_hf.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import make_config, make_module
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from dspark_serve.models.hf import HFModel
from dspark_serve.models.hf_probe import UnsupportedModel, read_options

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (lambda: make_config("MambaConfig"), "linear_attention layers"),
    "qwen3.5": (lambda: make_config("Qwen3_5TextConfig", num_hidden_layers=4), "linear_attention layers"),
    "lfm2": (lambda: make_config("Lfm2Config", full_attn_idxs=[1]), "conv layers"),
    "falcon-h1": (
        lambda: make_config("FalconH1Config", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16),
        "hybrid layers",
    ),
    "rwkv": (lambda: make_config("RwkvConfig"), "recurrent state"),
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=160, hidden_size=64, n_layer=2, n_head=4),
        "does not go through Transformers' attention interface",
    ),
    "llama4": (
        lambda: make_config("Llama4TextConfig", num_local_experts=2, attention_chunk_size=8, intermediate_size_mlp=96),
        "chunked_attention layers",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_paged_attention_is_refused_by_name(kind: str) -> None:
    make, reason = REFUSED[kind]
    module = AutoModelForCausalLM.from_config(make())
    with pytest.raises(UnsupportedModel, match=rf"^{type(module).__name__} cannot be served: .*{reason}"):
        HFModel(module)


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=160, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        HFModel(AutoModelForSeq2SeqLM.from_config(config))


def refuse_changed(config: Any, change: Callable[[Any], object], reason: str) -> None:
    module = make_module(config)
    change(module)
    with pytest.raises(UnsupportedModel, match=reason):
        HFModel(module)


def test_a_model_that_mixes_tokens_outside_attention_is_refused() -> None:
    def mix(module: Any) -> None:
        module.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out + out.roll(1, dims=1))

    refuse_changed(make_config("LlamaConfig"), mix, "mixes tokens outside its attention")


def test_a_window_the_attention_call_does_not_mention_is_refused() -> None:
    def forget(module: Any) -> None:
        module.model.layers[0].self_attn.sliding_window = None

    # Wider than any probe: found by asking the mask about far positions.
    config = make_config("Gemma3TextConfig", sliding_window=300)
    refuse_changed(config, forget, "mask of layer 0 is not causal")


def test_a_mask_that_sees_the_future_is_refused() -> None:
    config = make_config("Gemma3TextConfig", use_bidirectional_attention=True)
    refuse_changed(config, lambda _: None, "not causal|depends on more")


def test_layers_that_do_not_attend_are_refused_by_number() -> None:
    def skip(module: Any) -> None:
        module.model.layers[1].forward = lambda hidden_states, **_: hidden_states

    refuse_changed(make_config("LlamaConfig"), skip, r"layers \[1\] do not attend")


def test_attention_without_a_layer_index_or_called_twice_is_refused() -> None:
    def lose(module: Any) -> None:
        module.model.layers[1].self_attn.layer_idx = None

    def repeat(module: Any) -> None:
        module.model.layers[2].self_attn.layer_idx = 1

    refuse_changed(make_config("LlamaConfig"), lose, "has no layer_idx")
    refuse_changed(make_config("LlamaConfig"), repeat, "layer 1 attends twice")


def test_unknown_keywords_are_errors_and_inert_ones_are_not() -> None:
    query = torch.zeros(1, 4, 3, 16)
    known = read_options(query, {"dropout": 0.0, "position_ids": torch.zeros(1), "novelty": None, "is_causal": True})
    assert (known.scale, known.sliding_window, known.softcap, known.sinks) == (0.25, None, None, None)
    for name, value in {"novelty": 0.0, "position_bias": torch.zeros(1), "indices": [0]}.items():
        with pytest.raises(ValueError, match=name):
            read_options(query, {name: value})
    with pytest.raises(ValueError, match="not causal"):
        read_options(query, {"is_causal": False})


def test_an_attention_that_passes_an_unknown_keyword_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(module: Any) -> None:
        attention = module.model.layers[0].self_attn
        original = attention.forward
        monkeypatch.setattr(attention, "forward", lambda *a, **k: original(*a, **k, novelty=1.0))

    refuse_changed(make_config("LlamaConfig"), change, "'novelty'")
