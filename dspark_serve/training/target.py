"""What training needs of a target beside its hidden states: embedding, final norm, LM head, layers to start from.

Reads the checkpoint's own tensors, for the dense family's names. Must not know: heads, losses, data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_serve.models.dense_config import DenseConfig
from dspark_serve.models.fingerprint import fingerprint
from dspark_serve.models.loader import iterate_weights, read_config

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class TargetWeights:
    """float32 tensors of a target, all on one device; `layers` maps "{layer}.{name}" to weights of its last layers."""

    directory: Path
    raw_config: dict[str, Any]  # the checkpoint's config.json
    config: DenseConfig
    embedding: Tensor  # [vocab, hidden]
    final_norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden], the embedding itself when tied
    layers: dict[str, Tensor]

    @staticmethod
    def load(directory: Path, num_layers: int = 0, device: torch.device | str = "cpu") -> TargetWeights:
        """With the weights of the last `num_layers` layers. Raises LoadError, or ValueError for unknown families."""
        raw_config = read_config(directory)
        config = DenseConfig.parse(raw_config)
        prefixes = tuple(f"model.layers.{config.num_layers - 1 - i}." for i in range(num_layers))
        wanted: dict[str, Tensor] = {}
        for name, tensor in iterate_weights(directory, progress=False):
            if name in (EMBEDDING, NORM, HEAD) or name.startswith(prefixes or ("\0",)):
                wanted[name] = tensor.to(device, torch.float32, copy=True)  # the file's memory is mapped
        embedding = wanted.pop(EMBEDDING)
        head = embedding if config.tied else wanted.pop(HEAD)
        wanted.pop(HEAD, None)
        norm = wanted.pop(NORM)
        layers = {name.removeprefix("model.layers."): tensor for name, tensor in wanted.items()}
        return TargetWeights(directory, raw_config, config, embedding, norm, head, layers)

    @property
    def device(self) -> torch.device:
        """Where whatever is computed with these weights is to be."""
        return self.embedding.device

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.embedding, self.final_norm)

    def last_hidden(self, states: Tensor) -> Tensor:
        """The final norm of the last layer's output [tokens, hidden]: what the LM head reads."""
        return F.rms_norm(states.float(), (self.config.hidden_size,), self.final_norm, self.config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] after the final norm -> [tokens, vocab] float32."""
        return torch.mm(hidden, self.head.T)
