"""Tiny random GGUF files for tests, written with the gguf package the way llama.cpp's converter lays tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np


@dataclass(frozen=True)
class Shape:
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    inner: int = 96
    layers: int = 2


LLAMA_SHAPE = Shape()
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """A byte-level vocabulary: four special tokens, 256 bytes, one merge ("12")."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<unk>", "<s>", "</s>", "<turn>", *bytes_to_unicode().values(), "12"]
    return tokens, [3] * 4 + [1] * 257, ["1 2"]


def original_weights(arch: str, shape: Shape = LLAMA_SHAPE) -> dict[str, np.ndarray]:
    """Random weights under Transformers' names."""
    random = np.random.default_rng(0)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (q, shape.hidden),
        "self_attn.k_proj.weight": (kv, shape.hidden),
        "self_attn.v_proj.weight": (kv, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, q),
        "mlp.gate_proj.weight": (shape.inner, shape.hidden),
        "mlp.up_proj.weight": (shape.inner, shape.hidden),
        "mlp.down_proj.weight": (shape.hidden, shape.inner),
        "input_layernorm.weight": (shape.hidden,),
        "post_attention_layernorm.weight": (shape.hidden,),
    }
    if arch == "qwen2":
        sizes |= {f"self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
    vocab = len(vocabulary()[0])
    every: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, shape.hidden),
        "model.norm.weight": (shape.hidden,),
        "lm_head.weight": (vocab, shape.hidden),
    }
    every |= {f"model.layers.{n}.{name}": size for n in range(shape.layers) for name, size in sizes.items()}
    return {name: random.standard_normal(size).astype(np.float32) for name, size in every.items()}


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """Any bytes at all but for the float16 numbers, which are finite: [rows, bytes per row]."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(sum(shape))
    blocks = random.integers(0, 256, (shape[0] * shape[1] // weights, size), dtype=np.uint8)
    for at in {"Q4_0": (0,), "Q8_0": (0,), "Q6_K": (208,)}.get(kind.name, (0, 2)):
        numbers = random.standard_normal(len(blocks)) * 0.01
        blocks[:, at : at + 2] = numbers.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def write_gguf(
    path: Path,
    arch: str,
    weights: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType,
    pre: str = "gpt-2",
    eot: int | None = None,
    shape: Shape = LLAMA_SHAPE,
    exceptions: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> None:
    """Write `weights` (Transformers' names and layout), matrices as `kind` or what `exceptions` says of their part of
    a layer ("attn_v"), vectors as fp32."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(256)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens, types, merges = vocabulary()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if eot is not None:
        writer.add_eot_token_id(eot)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for name, weight in weights.items():
        theirs = _gguf_name(name)
        stored = (exceptions or {}).get(theirs.split(".")[-2], kind)
        if weight.ndim != 2:
            stored = gguf.GGMLQuantizationType.F32
        if stored.name.endswith("_K"):  # gguf has no code that makes these
            blocks = random_blocks(stored, weight.shape)
        else:
            blocks = gguf.quantize(_llama_cpp_rows(arch, name, weight, shape), stored)
        writer.add_tensor(theirs, blocks, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, suffix = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{suffix}"


def _llama_cpp_rows(arch: str, name: str, weight: np.ndarray, shape: Shape) -> np.ndarray:
    """Llama files interleave the two RoPE halves of each q and k head."""
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
    if arch != "llama" or heads is None:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape).copy()
