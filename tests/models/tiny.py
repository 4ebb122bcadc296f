"""Tiny random models of many families, built from Transformers configs.

Must not know: what serves them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

WINDOW = 8  # sliding windows; far shorter than the sequences of the tests

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA4: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": 160,
    "final_logit_softcapping": 5.0,
}
MLA: dict[str, Any] = {
    **MOE,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "head_dim": 8,
}
# family -> (config class, what it has beside SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "num_hidden_layers": 7}),
    "gemma4": (
        "Gemma4TextConfig",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    ),
    "gemma4-shared": ("Gemma4TextConfig", {**GEMMA4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "num_experts": 4}),
    "glm4-moe": (
        "Glm4MoeConfig",
        {**MOE, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "deepseek-v3": ("DeepseekV3Config", MLA),
    "gpt2": ("GPT2Config", {}),
}


def make_config(name: str, **changes: Any) -> Any:
    return getattr(transformers, name)(**{**SIZES, **changes})


def make_module(config: Any, seed: int = 0) -> Any:
    """A random model whose layers matter: with the library's own initial weights attention hardly shows in logits."""
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
    return module
