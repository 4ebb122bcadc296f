"""What the engine asks of a target model. Must not know: requests, drafters, sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dspark_kernels.blocks import BlockWeight
from dspark_serve.cache.store import KVStore, LayerGeometry
from dspark_serve.tensors import StepBatch, TargetOutput


@dataclass(frozen=True)
class ModelInfo:
    architecture: str  # architectures[0] of the checkpoint
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int  # positions the model was made for
    kv_layers: tuple[LayerGeometry, ...]  # one per layer, in layer order
    dtype: torch.dtype
    kernels: str  # the option by which they were chosen, for a head that drafts for it: "auto", "torch" or "triton"
    backend: str  # how the linears run, for the start-up line: "onednn-packed fp32", "transformers bfloat16", ...


class TargetModel(Protocol):
    @property
    def info(self) -> ModelInfo: ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, batch: StepBatch, store: KVStore, taps: Sequence[int] = ()) -> TargetOutput:
        """Run every token of the ragged batch once, write its K/V into `store` at batch.slots, and return float32
        logits at batch.sample_index followed by batch.score_index (when given), plus the taps: for each layer id l the
        output of decoder layer l (residual stream, before the final norm), -1 being the embedding output. A model may
        put the taps straight into store.taps, where there is such, at batch.slots, and return none.

        Row r's tokens are the last query_lens[r] of its context_lens[r] keys; token i of the row sees keys 0..i of its
        own context, found through page_table[r]. Runs under inference mode. Row invariance on CPU in float32: a
        token's outputs are bitwise independent of how tokens are split into steps and of the other rows.
        """
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """What the first layer gets for tokens, scaling included: [n] int64 -> [n, hidden] of the model's dtype."""
        ...

    def lm_head(self, hidden: Tensor) -> Tensor:
        """The LM head alone, neither the norm before it nor any cap behind it: [n, hidden] -> [n, vocab] float32."""
        ...

    def lm_head_blocks(self, ids: Tensor) -> BlockWeight | None:
        """The LM head's rows of tokens `ids` [n] as blocks of codes, None where it is not kept so."""
        ...


@runtime_checkable
class StagedModel(TargetModel, Protocol):
    """A target whose forward is `logits` of `trunk`: what the layers do may be recorded once and played again."""

    def recordable(self, store: KVStore) -> bool:
        """Whether what `trunk` launches depends on the batch's shapes and its longest context alone, and reads all
        else from the batch's tensors: then the same launches serve any batch whose tensors lie at the same addresses.
        """
        ...

    def trunk(self, batch: StepBatch, store: KVStore, taps: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        """Every layer, K/V written: the residual stream before the final norm [tokens, hidden], and the taps unless
        they are in the store."""
        ...

    def logits(self, hidden: Tensor, batch: StepBatch) -> Tensor:
        """Of the tokens at batch.sample_index, then batch.score_index, of a trunk's hidden states; float32."""
        ...
