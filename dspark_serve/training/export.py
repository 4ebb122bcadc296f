"""A trained head on disk: DeepSpec's config.json and model.safetensors, and dspark.json with our facts beside them.

Holds no copy of the target's embedding or LM head. Must not know: training, losses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark_serve.drafters.head_config import HeadConfig, HeadError
from dspark_serve.models.loader import iterate_weights, read_config
from dspark_serve.training.head import FoldedTables, FrozenTarget, MarkovTables, TrainableHead


@torch.no_grad()
def exported_tensors(head: TrainableHead, target: FrozenTarget, full_head: Tensor) -> dict[str, Tensor]:
    """DeepSpec's names and shapes in bfloat16; Markov tables folded. full_head: the target's LM head [vocab, hidden].

    A head without `draft_vocab_size` gets tables for the whole vocabulary: tokens it was not trained to draft have
    the shared part alone.
    """
    tensors: dict[str, Tensor] = {
        name: p for name, p in head.named_parameters() if not name.startswith(("markov.", "confidence."))
    }
    config = head.config
    if isinstance(head.markov, MarkovTables):
        incoming = target.embedding @ head.markov.in_map
        incoming[head.draft_vocab] += head.markov.in_free
        outgoing = head.markov.outgoing(target)
        if config.draft_vocab_size is None:
            whole = full_head @ head.markov.out_map
            whole[head.draft_vocab] = outgoing
            outgoing = whole
        tensors["markov_head.markov_w1.weight"] = incoming
        tensors["markov_head.markov_w2.weight"] = outgoing
    if head.confidence is not None:
        tensors["confidence_head.proj.weight"] = head.confidence.weight
        tensors["confidence_head.proj.bias"] = head.confidence.bias
    exported = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in tensors.items()}
    if config.draft_vocab_size is not None:
        exported["draft_vocab"] = head.draft_vocab.to(torch.int32)
    return exported


def export_head(
    directory: Path, head: TrainableHead, target: FrozenTarget, full_head: Tensor, facts: Mapping[str, Any]
) -> None:
    """Write or replace the head in `directory`; each file appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**head.config.to_dict(), "dtype": "bfloat16"}
    partial = directory / ".model.safetensors.partial"
    save_file(exported_tensors(head, target, full_head), partial, metadata={"format": "pt"})
    os.replace(partial, directory / "model.safetensors")
    write_json(directory / "config.json", config)
    write_json(directory / "dspark.json", facts)


def load_exported(directory: Path, embedding: Tensor, full_head: Tensor) -> tuple[TrainableHead, FrozenTarget]:
    """The head as it is served, in float32, to be evaluated where embedding and full_head, the target's, are.

    Raises LoadError or its HeadError when the directory holds no head of the trained kind.
    """
    config = HeadConfig.parse(read_config(directory))
    tensors = dict(iterate_weights(directory, progress=False))
    stored = tensors.pop("draft_vocab", None)
    vocab = torch.arange(config.vocab_size) if stored is None else stored.long()
    head = TrainableHead(config, vocab)
    if config.markov_rank:
        tables = [tensors.pop(f"markov_head.markov_w{n}.weight").float() for n in (1, 2)]
        head.markov = FoldedTables(*tables)
    if head.confidence is not None:
        tensors["confidence.weight"] = tensors.pop("confidence_head.proj.weight")
        tensors["confidence.bias"] = tensors.pop("confidence_head.proj.bias")
    for name in ("embed_tokens.weight", "lm_head.weight"):  # copies of the target's, in heads made elsewhere
        tensors.pop(name, None)
    unknown = head.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    missing = [name for name in unknown.missing_keys if not name.startswith("markov.")]
    if missing or unknown.unexpected_keys:
        raise HeadError(f"{directory} lacks {missing} or has no place for {unknown.unexpected_keys}")
    head.to(embedding.device)
    return head, FrozenTarget(embedding, full_head[head.draft_vocab].contiguous())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
