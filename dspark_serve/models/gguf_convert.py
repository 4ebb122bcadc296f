"""A GGUF file becomes an ordinary model directory: config, fp32 safetensors, tokenizer, generation defaults. Beside
them lie its quantised matrices as they are.

Transformers reads the metadata and undoes llama.cpp's row permutation; here is what it leaves out (digit splitting,
RoPE scaling, stop ids, completeness). Runs once per file. Must not know: the cache, the server.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark_serve.models.blocks_file import BLOCKS_FILE, write_blocks
from dspark_serve.models.catalog import LoadError
from dspark_serve.models.dense_config import SUPPORTED_ARCHITECTURES
from dspark_serve.models.gguf_blocks import quantised_matrices

logger = logging.getLogger(__name__)

# llama.cpp's names for vocabularies that were trained with every digit on its own, then GPT-2's split.
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_GPT2_SPLIT = frozenset({"gpt-2", "gpt2", "default", "phi-2", "mpt", "olmo", "gigachat", "roberta-bpe", None})


def convert(source: Path, target: Path) -> None:
    """Write the model in `source` as a Hugging Face style directory `target` (which exists).

    Raises LoadError, one sentence, when the file is damaged, of an unknown architecture, or incomplete.
    """
    try:
        metadata = _read_metadata(source)
        config, tensors = _read_model(source, metadata)
    except LoadError:
        raise
    except Exception as error:  # the reader and Transformers raise whatever they tripped over
        raise LoadError(f"The GGUF file {source.name} cannot be read: {_first_line(error)}") from error
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if config["architectures"][0] in SUPPORTED_ARCHITECTURES:
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        architecture = metadata["general.architecture"]
        write_blocks(quantised_matrices(source, architecture, heads, tensors), target / BLOCKS_FILE)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (target / "generation_config.json").write_text(json.dumps(_generation(metadata), indent=2) + "\n")
    if "tokenizer.ggml.tokens" in metadata:
        _write_tokenizer(source, metadata, target, config["max_position_embeddings"])


def _read_metadata(source: Path) -> dict[str, Any]:
    """The file's fields by their GGUF names (string arrays as their lengths), and `rope_factors`."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, names = read_gguf_metadata(str(source))
    if any(name.startswith("rope_factors") for name in names):
        raise LoadError(f"{source.name} stores per-dimension long-context RoPE factors, which cannot be converted.")
    return {**metadata, "rope_factors": _rope_factors(source) if "rope_freqs.weight" in names else None}


def _rope_factors(source: Path) -> Tensor:
    from gguf import GGUFReader

    tensor = next(tensor for tensor in GGUFReader(source).tensors if tensor.name == "rope_freqs.weight")
    return torch.tensor(tensor.data, dtype=torch.float32)


def _read_model(source: Path, metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(**load_gguf_checkpoint(str(source))["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    loaded = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    missing = sorted(set(model.state_dict()) - set(loaded) - tied)
    if missing:
        raise LoadError(f"The GGUF file {source.name} lacks {len(missing)} tensors, {missing[0]} among them.")
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    values["architectures"] = [type(model).__name__]
    values["dtype"] = "float32"
    values.pop("_model_name_or_path", None)
    values["rope_parameters"] = _rope_parameters(metadata, values)
    return values, {name: tensor.contiguous() for name, tensor in loaded.items() if name not in tied}


def _rope_parameters(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings of the file: linear and yarn are in its metadata, Llama 3's only shows in stored factors."""
    rope: dict[str, Any] = dict(config.get("rope_parameters") or {})
    arch = metadata["general.architecture"]
    kind = metadata.get(f"{arch}.rope.scaling.type")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(metadata[f"{arch}.rope.scaling.factor"])}
        original = metadata.get(f"{arch}.rope.scaling.original_context_length")
        if kind == "yarn" and original:
            rope["original_max_position_embeddings"] = int(original)
    elif kind not in (None, "none") and arch != "gpt-oss":  # Transformers reads gpt-oss's own
        raise LoadError(f"The GGUF file asks for RoPE scaling {kind!r}, which cannot be converted.")
    factors = metadata["rope_factors"]
    if factors is not None:
        rope |= _llama3_scaling(factors, float(rope["rope_theta"]))
    return rope


def _llama3_scaling(factors: Tensor, theta: float) -> dict[str, Any]:
    """The published Llama 3.x setting that yields these stored factors (low 1, high 4, trained on 8192 positions)."""
    half = factors.numel()
    wavelength = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    for factor in (8.0, 32.0):
        smooth = ((8192 / wavelength - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)  # 0: scaled fully, 1: left alone
        expected = 1.0 / ((1.0 - smooth) / factor + smooth)
        if torch.allclose(expected.float(), factors, rtol=1e-4):
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return scaling | {"original_max_position_embeddings": 8192}
    raise LoadError("The GGUF file stores RoPE factors that match no published Llama 3 setting.")


def _generation(metadata: dict[str, Any]) -> dict[str, Any]:
    """Special ids; the end of a turn ends the answer just as the end of the text does."""

    def token(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if value is None else int(value)

    ends = [token(name) for name in ("eos", "eot", "eom")]
    values = {"bos_token_id": token("bos"), "eos_token_id": list(dict.fromkeys(e for e in ends if e is not None))}
    return {k: v for k, v in (values | {"pad_token_id": token("padding")}).items() if v not in (None, [])}


def _write_tokenizer(source: Path, metadata: dict[str, Any], target: Path, max_length: int) -> None:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source.parent, gguf_file=source.name)
    except Exception as error:
        raise LoadError(f"The tokenizer in {source.name} cannot be converted: {_first_line(error)}") from error
    split = metadata.get("tokenizer.ggml.pre")
    if split in _SINGLE_DIGITS:
        from tokenizers import pre_tokenizers

        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    elif metadata.get("tokenizer.ggml.model") == "gpt2" and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *_GPT2_SPLIT}:
        logger.warning("Unknown text splitting %r in %s; GPT-2's is used, tokens may differ.", split, source.name)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(target)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
