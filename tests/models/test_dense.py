"""DenseModel against Transformers on tiny random models, its bits across batchings, and what it refuses to load."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Trace, chunked, run_one, run_steps
from torch import Tensor

from dspark_kernels import native
from dspark_serve.cache.store import KVStore
from dspark_serve.models.dense import DenseModel
from dspark_serve.models.dense_config import SUPPORTED_ARCHITECTURES, DenseConfig, UnsupportedConfig
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.models.layers import PackedLinear, PlainLinear, operations, swiglu
from dspark_serve.models.loader import load_model, resolve

transformers = pytest.importorskip("transformers")

VOCAB = 131
LAYERS = 3
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "beta_fast": 20,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.3,
    },
}
# name -> (family, changes to BASE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama-gqa4": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "llama-gqa8": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    **{f"llama-{name}": ("Llama", {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-bias-yarn": ("Qwen3", {"head_dim": 16, "attention_bias": True, "rope_parameters": ROPES["yarn"]}),
    "qwen3-window": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def reference(family: str, changes: dict[str, Any]) -> Any:
    """A tiny Transformers model whose every weight matters: norms away from one, biases away from zero."""
    config = getattr(transformers, f"{family}Config")(**{**BASE, **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 / parameter.shape[1] ** 0.5)
    return model


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(model: Any, tokens: list[int]) -> Any:
    with torch.inference_mode():
        return model(torch.tensor([tokens]), output_hidden_states=True)


@pytest.fixture(params=[(case, kernels) for case in CASES for kernels in ("auto", "torch")], ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Any, DenseModel]:
    case, kernels = request.param
    model = reference(*CASES[case])
    return model, DenseModel.from_weights(model.config, model.state_dict(), kernels=kernels)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, DenseModel]:
    model = reference("Llama", {})
    return model, DenseModel.from_weights(model.config, model.state_dict())


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def assert_same_bits(a: Trace, b: Trace) -> None:
    assert torch.equal(a.logits, b.logits)
    assert (a.taps is None and b.taps is None) or torch.equal(a.taps, b.taps)  # type: ignore[arg-type]


def test_logits_and_taps_match_transformers(pair: tuple[Any, DenseModel]) -> None:
    theirs, ours = pair
    tokens = prompt(70)
    want = expected(theirs, tokens)
    taps = (1, -1, 0)  # the last layer's tap has a test of its own: Transformers norms its last hidden state
    whole = run_one(ours, tokens, taps=taps)
    assert_close(whole.logits, want.logits[0])
    assert_close(whole.taps, torch.cat([want.hidden_states[tap + 1][0] for tap in taps], dim=1))
    for size in (1, 7):
        assert_same_bits(whole, run_one(ours, tokens, chunked(70, size), taps=taps, seed=size))


def test_ragged_batches_match_transformers(pair: tuple[Any, DenseModel]) -> None:
    theirs, ours = pair
    prompts = [prompt(n, seed=n) for n in (40, 5, 33)]
    steps = [{0: 30, 2: 1}, {1: 4, 0: 1, 2: 6}, {2: 25, 0: 9}, {2: 1, 1: 1}]
    together = run_steps(ours, prompts, steps, taps=(0, 1), fill=50.0)
    for tokens, got in zip(prompts, together, strict=True):
        assert_close(got.logits, expected(theirs, tokens).logits[0])
        assert_same_bits(got, run_one(ours, tokens, taps=(0, 1)))


def test_last_layer_tap_is_taken_before_the_final_norm(llama: tuple[Any, DenseModel]) -> None:
    theirs, ours = llama
    tokens = prompt(12)
    caught = []
    hook = theirs.model.norm.register_forward_hook(lambda _module, args, _out: caught.append(args[0]))
    expected(theirs, tokens)
    hook.remove()
    assert_close(run_one(ours, tokens, taps=(LAYERS - 1,)).taps, caught[0][0])


def test_taps_come_in_the_order_asked_for(llama: tuple[Any, DenseModel]) -> None:
    ours = llama[1]
    tokens = prompt(9)
    singly = {tap: run_one(ours, tokens, taps=(tap,)).taps for tap in (-1, 0, 2)}
    assert torch.equal(run_one(ours, tokens, taps=(2, -1, 0)).taps, torch.cat([singly[t] for t in (2, -1, 0)], dim=1))
    assert run_one(ours, tokens).taps is None
    with pytest.raises(ValueError, match="tap 3 is not a layer"):
        run_one(ours, tokens, taps=(3,))


@pytest.mark.parametrize("length", [255, 257, 530])
def test_long_context(llama: tuple[Any, DenseModel], length: int) -> None:
    theirs, ours = llama
    tokens = prompt(length)
    whole = run_one(ours, tokens, taps=(2,))
    assert_close(whole.logits, expected(theirs, tokens).logits[0])
    assert_same_bits(whole, run_one(ours, tokens, [length - 9, 1, 1, 4, 3], taps=(2,)))
    assert_same_bits(whole, run_one(ours, tokens, chunked(length, 100), taps=(2,), page_size=8))


def test_only_samples_and_scores_get_logits(llama: tuple[Any, DenseModel]) -> None:
    ours = llama[1]
    tokens = prompt(20)
    whole = run_one(ours, tokens)
    batch = probe_batch([Chunk(tuple(tokens), 0, (2, 1))], 16)
    some = dataclasses.replace(batch, sample_index=torch.tensor([19]), score_index=torch.tensor([3, 0]))
    none = dataclasses.replace(batch, sample_index=torch.tensor([], dtype=torch.int64))
    store = KVStore(ours.info.kv_layers, 3, 16)
    assert torch.equal(ours.forward(some, store).logits, whole.logits[[19, 3, 0]])
    assert ours.forward(none, store).logits.shape == (0, VOCAB)


def test_info(llama: tuple[Any, DenseModel]) -> None:
    info = llama[1].info
    assert (info.architecture, info.vocab_size, info.hidden_size, info.num_layers) == ("LlamaForCausalLM", VOCAB, 96, 3)
    assert info.max_model_len == 2048
    assert [(g.kv_heads, g.head_dim) for g in info.kv_layers] == [(2, 16)] * 3
    assert info.backend == f"{operations(torch.float32, torch.device('cpu')).name}, weights in float32"


def test_bfloat16_is_close() -> None:
    theirs = reference("Qwen3", {"head_dim": 32}).to(torch.bfloat16)
    ours = DenseModel.from_weights(theirs.config, theirs.state_dict(), torch.bfloat16)
    tokens = prompt(30)
    want = expected(theirs, tokens).logits[0].float()
    got = run_one(ours, tokens, chunked(30, 7)).logits
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_of_half_the_bits_keep_them(dtype: torch.dtype, tmp_path: Path) -> None:
    """By default on CPU, and with the bits of the widened model; plain torch widens them when loading."""
    theirs = reference("Qwen3", {"head_dim": 32}).to(dtype)
    theirs.save_pretrained(tmp_path)
    resolved, tokens = resolve(str(tmp_path)), prompt(30)
    served, widened = load_model(resolved, device="cpu"), load_model(resolved, "float32", "cpu")
    assert torch.equal(run_one(served, tokens).logits, run_one(widened, tokens).logits)
    kept = str(dtype).removeprefix("torch.") if native.load() is not None else "float32"
    assert served.info.backend.endswith(f"weights in {kept}")
    assert widened.info.backend.endswith("weights in float32")
    torched = load_model(resolved, device="cpu", kernels="torch")
    assert torched.info.backend.endswith("weights in float32")
    assert_close(run_one(torched, tokens).logits, run_one(served, tokens).logits)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [112, 1216, 4864])
def test_swiglu_has_the_same_bits_for_any_rows_and_threads(width: int, threads: int) -> None:
    gate_up = torch.randn(300, 2 * width, generator=torch.Generator().manual_seed(0)) * 3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole = swiglu(gate_up)
        for rows in (1, 2, 14, 31, 101, 299):
            assert torch.equal(swiglu(gate_up[:rows].contiguous()), whole[:rows])
        assert torch.equal(swiglu(gate_up[77:78]), whole[77:78])
    finally:
        torch.set_num_threads(before)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_close(whole, (gate * torch.sigmoid(gate) * up).float())


@pytest.mark.parametrize("shape", [(576, 1536), (896, 4864), (3072, 576)])
@pytest.mark.parametrize("make", [PackedLinear, PlainLinear])
def test_linears_have_the_same_bits_for_any_rows(make: Any, shape: tuple[int, int]) -> None:
    """At widths of real models: narrow ones do not reach the kernels that differ for a single row."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=generator), torch.randn(80, shape[1], generator=generator)
    linear = make(weight)
    whole = linear(x)
    assert_close(whole / shape[1] ** 0.5, torch.nn.functional.linear(x, weight) / shape[1] ** 0.5)
    if make is PlainLinear:
        return  # its bits are up to the machine's BLAS: row_variance reports them
    for rows in (1, 2, 3, 4, 7, 8, 16, 17, 33, 64):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
        assert torch.equal(linear(x[9 : 9 + rows]), whole[9 : 9 + rows]), rows


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_raw_config_files_read_the_same(name: str, tmp_path: Any) -> None:
    config = reference(*CASES[name]).config
    old = config.to_dict()
    rope = old.pop("rope_parameters")
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if rope["rope_type"] != "default" else None}
    assert dataclasses.replace(DenseConfig.parse(old), rope={}) == dataclasses.replace(
        DenseConfig.parse(config), rope={}
    )
    want, got = DenseConfig.parse(config).rope, DenseConfig.parse(old).rope
    assert {**got, "rope_type": want["rope_type"]} == want


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_silent_configs_mean_what_transformers_assumes(family: str) -> None:
    needed = {k: BASE[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    raw = {**needed, "num_attention_heads": 32, "hidden_size": 4096, "architectures": [f"{family}ForCausalLM"]}
    theirs, ours = DenseConfig.parse(getattr(transformers, f"{family}Config")(**raw)), DenseConfig.parse(raw)
    assert dataclasses.replace(theirs, rope={}) == dataclasses.replace(ours, rope={})
    assert theirs.rope["rope_theta"] == ours.rope["rope_theta"]


def test_qwen_windows_start_at_max_window_layers() -> None:
    raw = {**BASE, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    assert DenseConfig.parse(raw).windows == (None, 7, 7) == DenseConfig.parse(transformers.Qwen2Config(**raw)).windows


def test_yarn_says_how_many_positions() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    raw = {**BASE, "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768, "rope_scaling": rope}
    assert DenseConfig.parse(raw).usable_positions == 131072


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not one of"),
        ({"num_key_value_heads": 4}, "6 heads cannot share 4"),
    ],
)
def test_unsupported_configs_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        DenseModel.from_weights({**BASE, "architectures": ["LlamaForCausalLM"], **changes}, {})


def test_unknown_layer_type_is_refused() -> None:
    raw = {
        **BASE,
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "layer_types": ["chunked"] * LAYERS,
    }
    with pytest.raises(UnsupportedConfig, match="layer type 'chunked'"):
        DenseConfig.parse(raw)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(llama: tuple[Any, DenseModel], name: str) -> None:
    weights = checkpoint(llama[0])
    del weights[name]
    with pytest.raises(ValueError, match=f"lacks {name}"):
        DenseModel.from_weights(llama[0].config, weights)


def test_an_unexpected_tensor_is_named(llama: tuple[Any, DenseModel]) -> None:
    weights = {**checkpoint(llama[0]), "model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}
    with pytest.raises(ValueError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        DenseModel.from_weights(llama[0].config, weights)


def test_a_misshapen_tensor_is_named(llama: tuple[Any, DenseModel]) -> None:
    weights = {**checkpoint(llama[0]), "model.layers.0.mlp.up_proj.weight": torch.zeros(112, 95)}
    with pytest.raises(ValueError, match=r"up_proj\.weight has shape \[112, 95\], not \[112, 96\]"):
        DenseModel.from_weights(llama[0].config, weights)


def test_a_tensor_with_nan_is_named(llama: tuple[Any, DenseModel]) -> None:
    weights = checkpoint(llama[0])
    weights["model.layers.2.mlp.gate_proj.weight"][5, 5] = float("nan")
    with pytest.raises(ValueError, match=r"not finite in model\.layers\.2\.mlp\.gate_proj\.weight"):
        DenseModel.from_weights(llama[0].config, weights)


def test_rotary_buffers_and_a_tied_copy_are_ignored() -> None:
    model = reference("Llama", {"tie_word_embeddings": True})

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from checkpoint(model).items()
        yield "model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8)
        yield "lm_head.weight", torch.zeros(VOCAB, 96)

    tokens = prompt(5)
    got = run_one(DenseModel.from_weights(model.config, stream()), tokens)
    assert_close(got.logits, expected(model, tokens).logits[0])


def test_the_architectures_are_the_promised_ones() -> None:
    families = ("Llama", "Mistral", "Qwen2", "Qwen3")
    assert tuple(f"{family}ForCausalLM" for family in families) == SUPPORTED_ARCHITECTURES
