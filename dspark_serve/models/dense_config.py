"""What a checkpoint's config.json says about a decoder of the dense family, or why the family does not cover it.

Must not know: tensors, files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Values Transformers assumes where a config.json is silent, as far as the families differ from each other.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "sliding_window": 4096, "num_key_value_heads": 32},
    "Qwen3ForCausalLM": {
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}


class UnsupportedConfig(ValueError):
    """The config asks for something this implementation does not have; the message names it."""


@dataclass(frozen=True)
class DenseConfig:
    """What the decoder is made of. Widths in elements; `windows` in tokens, None where a layer sees everything."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: Mapping[str, Any]
    windows: tuple[int | None, ...]  # [num_layers]
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @staticmethod
    def parse(config: Mapping[str, Any] | Any) -> DenseConfig:
        """From a config.json's contents or a Transformers config. Raises UnsupportedConfig naming the obstacle."""
        given: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        architecture = _architecture(given)
        values = {**_DEFAULTS[architecture], **given}
        if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise UnsupportedConfig(f"{architecture}: activation {activation!r} is not supported (only silu)")
        if values.get("quantization_config"):
            method = values["quantization_config"].get("quant_method", "unknown")
            raise UnsupportedConfig(f"{architecture}: weights quantized by {method!r} are not supported")
        llama, qwen2, qwen3 = (architecture.startswith(name) for name in ("Llama", "Qwen2", "Qwen3"))
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        attention_bias = bool(values.get("attention_bias", False))
        parsed = DenseConfig(
            architecture=architecture,
            vocab_size=int(values["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(values["intermediate_size"]),
            num_layers=int(values["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or hidden // heads),
            max_positions=int(values["max_position_embeddings"]),
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope=_rope(values),
            windows=_windows(architecture, values),
            tied=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=qwen2 or ((llama or qwen3) and attention_bias),
            out_bias=(llama or qwen3) and attention_bias,
            mlp_bias=llama and bool(values.get("mlp_bias", False)),
            qk_norm=qwen3,
        )
        if parsed.heads % parsed.kv_heads:
            raise UnsupportedConfig(f"{architecture}: {heads} heads cannot share {parsed.kv_heads} key/value heads")
        return parsed

    @property
    def usable_positions(self) -> int:
        """Positions the model was made for; yarn's factor says so where max_position_embeddings may not."""
        if self.rope.get("rope_type", self.rope.get("type")) != "yarn" or not self.rope.get("factor"):
            return self.max_positions
        original = self.rope.get("original_max_position_embeddings") or self.max_positions
        return max(self.max_positions, int(original * self.rope["factor"]))


def _architecture(config: Mapping[str, Any]) -> str:
    named = list(config.get("architectures") or [])
    if not named:
        named = [name for name in SUPPORTED_ARCHITECTURES if name.lower() == f"{config.get('model_type')}forcausallm"]
    if not named or named[0] not in SUPPORTED_ARCHITECTURES:
        asked = named[0] if named else config.get("model_type")
        raise UnsupportedConfig(f"architecture {asked} is not one of {', '.join(SUPPORTED_ARCHITECTURES)}")
    return str(named[0])


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Newer configs say `rope_parameters`, older ones `rope_scaling` beside a `rope_theta` of their own."""
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is None and values.get(name) is not None:
            rope[name] = values[name]
    rope.setdefault("rope_theta", 10000.0)
    if values.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    return rope


def _windows(architecture: str, values: Mapping[str, Any]) -> tuple[int | None, ...]:
    count, window = int(values["num_hidden_layers"]), values.get("sliding_window")
    if architecture == "MistralForCausalLM":
        return (window,) * count
    if architecture == "LlamaForCausalLM" or not values.get("use_sliding_window", False):
        return (None,) * count
    types = values.get("layer_types")
    if types is None:
        first = int(values.get("max_window_layers", 28))
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(count)]
    known = {"sliding_attention": window, "full_attention": None}
    for kind in types:
        if kind not in known:
            raise UnsupportedConfig(f"{architecture}: layer type {kind!r} is not supported")
    return tuple(known[kind] for kind in types)
