"""The dense decoder family: Llama (SmolLM2 too), Mistral, Qwen2, Qwen3, as one configurable model with fused weights.

Must not know: files, what a config.json says, requests, sampling, drafters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_kernels import native
from dspark_kernels.blocks import BlockWeight
from dspark_kernels.decoder import DecoderStack, LayerWeights
from dspark_kernels.packed import STORED
from dspark_serve.cache.store import KVStore, LayerGeometry
from dspark_serve.models.attention import AttnMeta, attend, attend_native, runs_native
from dspark_serve.models.base import ModelInfo
from dspark_serve.models.dense_config import DenseConfig, UnsupportedConfig
from dspark_serve.models.layers import (
    Affine,
    Finish,
    Linear,
    NativeFinish,
    NativeLinear,
    Operations,
    RMSNorm,
    Rotary,
    Weight,
    normed,
    operations,
)
from dspark_serve.tensors import StepBatch, TargetOutput


class _Loading:
    """The checkpoint's tensors, checked, then handed out once each: parts joined, in the precision of the model.

    With `as_stored` matrices stay in bfloat16, float16 or blocks where all their parts are so.
    """

    def __init__(self, config: DenseConfig, dtype: torch.dtype, device: torch.device, as_stored: bool) -> None:
        self._dtype, self._device, self._as_stored = dtype, device, as_stored
        self._parts: dict[str, tuple[str, ...]] = {}  # the model's own name -> the checkpoint's names, joined by rows
        self._shapes: dict[str, tuple[int, ...]] = {}  # by the checkpoint's name
        self._given: dict[str, Weight] = {}  # likewise
        self._tied = config.tied
        self.kept: set[str] = set()  # how matrices are stored, for people
        c, width = config, config.heads * config.head_dim
        kv_width = c.kv_heads * c.head_dim
        qkv = {"q_proj": width, "k_proj": kv_width, "v_proj": kv_width}
        gate_up = {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
        self._add("embed", {"model.embed_tokens.weight": c.vocab_size}, c.hidden_size)
        for layer in range(c.num_layers):
            prefix = f"model.layers.{layer}."
            self._linear(f"{layer}.qkv", prefix + "self_attn.", qkv, c.hidden_size, c.qkv_bias)
            self._linear(f"{layer}.out", prefix + "self_attn.", {"o_proj": c.hidden_size}, width, c.out_bias)
            self._linear(f"{layer}.gate_up", prefix + "mlp.", gate_up, c.hidden_size, c.mlp_bias)
            self._linear(
                f"{layer}.down", prefix + "mlp.", {"down_proj": c.hidden_size}, c.intermediate_size, c.mlp_bias
            )
            self._add(f"{layer}.attention_norm", {prefix + "input_layernorm.weight": c.hidden_size})
            self._add(f"{layer}.mlp_norm", {prefix + "post_attention_layernorm.weight": c.hidden_size})
            if c.qk_norm:
                self._add(f"{layer}.q_norm", {prefix + "self_attn.q_norm.weight": c.head_dim})
                self._add(f"{layer}.k_norm", {prefix + "self_attn.k_norm.weight": c.head_dim})
        self._add("norm", {"model.norm.weight": c.hidden_size})
        if not c.tied:
            self._add("head", {"lm_head.weight": c.vocab_size}, c.hidden_size)

    def _add(self, name: str, parts: Mapping[str, int], columns: int | None = None) -> None:
        self._parts[name] = tuple(parts)
        for part, rows in parts.items():
            self._shapes[part] = (rows,) if columns is None else (rows, columns)

    def _linear(self, name: str, prefix: str, parts: Mapping[str, int], columns: int, bias: bool) -> None:
        self._add(f"{name}.weight", {f"{prefix}{part}.weight": rows for part, rows in parts.items()}, columns)
        if bias:
            self._add(f"{name}.bias", {f"{prefix}{part}.bias": rows for part, rows in parts.items()})

    def load(self, weights: Iterable[tuple[str, Weight]]) -> None:
        """Raises ValueError naming tensors that are unexpected, misshapen, missing or not numbers."""
        unexpected = []
        for name, tensor in weights:
            shape = self._shapes.get(name)
            if shape is None:
                if not name.endswith("rotary_emb.inv_freq") and not (self._tied and name == "lm_head.weight"):
                    unexpected.append(name)
                continue
            if shape != tuple(tensor.shape):
                raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
            self._given[name] = tensor
        if unexpected:
            raise ValueError(f"the checkpoint has tensors the model has no place for: {_listed(unexpected)}")
        missing = [name for name in self._shapes if name not in self._given]
        if missing:
            raise ValueError(f"the checkpoint lacks {_listed(missing)}")
        broken = [name for name, tensor in self._given.items() if not _finite(tensor)]
        if broken:
            raise ValueError(f"the checkpoint holds values that are not finite in {_listed(broken)}")

    def take(self, name: str) -> Weight:
        """Hand a tensor over, so that its memory goes once it is packed."""
        parts = [self._given.pop(part) for part in self._parts.pop(name)]
        blocks = [part for part in parts if isinstance(part, BlockWeight)]
        if self._as_stored and len(blocks) == len(parts):
            joined = BlockWeight.cat(blocks)
            self.kept.add(f"{joined.bits}-bit blocks")
            return joined
        tensors = [part.dequantize() if isinstance(part, BlockWeight) else part for part in parts]
        matrix, dtype = tensors[0].dim() == 2, self._dtype
        found = {part.dtype for part in tensors}
        if self._as_stored and matrix and len(found) == 1 and found <= set(STORED):
            (dtype,) = found
        if matrix:
            self.kept.add(str(dtype).removeprefix("torch."))
        tensors = [part.to(self._device, dtype) for part in tensors]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def tensor(self, name: str) -> Tensor:
        """A tensor in the precision of the model."""
        return self.widened(self.take(name))

    def widened(self, weight: Weight) -> Tensor:
        if isinstance(weight, BlockWeight):
            return weight.dequantize().to(self._device, self._dtype)
        return weight.to(self._dtype, copy=True)  # the checkpoint's memory may be mapped

    def linear(self, name: str) -> Affine:
        """Weight and bias."""
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self._parts else None
        return self.take(f"{name}.weight"), bias


def _finite(weight: Weight) -> bool:
    values = (weight.scales, weight.minima) if isinstance(weight, BlockWeight) else (weight,)
    return all(bool(value.sum(dtype=torch.float32).isfinite()) for value in values)


def _listed(names: Sequence[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


@dataclass(frozen=True)
class _Layer:
    qkv: Linear  # norm, then hidden -> (heads + 2 * kv_heads) * head_dim
    qk_norm: RMSNorm | None  # over head_dim, with a weight for each head: queries, then keys
    finish: Finish  # out-projection and MLP: (heads * head_dim, hidden) -> hidden
    window: int | None


class DenseModel:
    """A TargetModel (models/base.py). Make one with `from_weights`."""

    def __init__(
        self,
        config: DenseConfig,
        layers: Sequence[_Layer],
        embed: Tensor,  # [vocab, hidden]
        norm: RMSNorm,
        head: Linear,  # hidden -> vocab
        ops: Operations,  # that all these were made by
        stored: str,  # how matrices are, for people
    ) -> None:
        self.config = config
        self._layers = tuple(layers)
        self._embed, self._head, self._kernels = embed, head, ops.attention
        self._normed_head = normed(head, norm)
        self._stack = None if ops.library is None else _stack(ops.library, config, self._layers)
        self._rotary = Rotary(config.rope, config.head_dim, config.max_positions, embed.dtype, embed.device)
        self._info = ModelInfo(
            architecture=config.architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            max_model_len=config.usable_positions,
            kv_layers=(LayerGeometry(config.kv_heads, config.head_dim),) * config.num_layers,
            dtype=embed.dtype,
            kernels=ops.choice,
            backend=f"{ops.name}, weights in {stored}",
        )

    @staticmethod
    def from_weights(
        config: Mapping[str, Any] | Any,
        weights: Mapping[str, Weight] | Iterable[tuple[str, Weight]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernels: str = "auto",
        as_stored: bool = False,
    ) -> DenseModel:
        """From a config (config.json's contents or a Transformers config) and a checkpoint's named tensors.

        as_stored: where kernels can, keep matrices in bfloat16, float16 or blocks, and compute in `dtype` with the very
        values they stand for. Results have the bits of the widened weights.

        Raises UnsupportedConfig for what the family does not cover here, ValueError for tensors that are missing,
        unexpected, misshapen or not finite, naming them. Rotary buffers and a tied head's copy are ignored.
        """
        parsed = DenseConfig.parse(config)
        try:
            Rotary(parsed.rope, parsed.head_dim, parsed.max_positions)
        except ValueError as error:
            raise UnsupportedConfig(f"{parsed.architecture}: {error}") from error
        with torch.no_grad():
            ops = operations(dtype, torch.device(device), kernels)
            loading = _Loading(parsed, dtype, torch.device(device), as_stored and ops.library is not None)
            loading.load(weights.items() if isinstance(weights, Mapping) else weights)
            layers = [_make_layer(parsed, loading, ops, layer) for layer in range(parsed.num_layers)]
            stored = loading.take("embed")
            embed = loading.widened(stored)
            norm = RMSNorm(loading.tensor("norm"), parsed.norm_eps)
            head = ops.linear(stored if parsed.tied else loading.take("head"))
            return DenseModel(parsed, layers, embed, norm, head, ops, " and ".join(sorted(loading.kept)))

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def device(self) -> torch.device:
        return self._embed.device

    @torch.inference_mode()
    def forward(self, batch: StepBatch, store: KVStore, taps: Sequence[int] = ()) -> TargetOutput:
        """See TargetModel. Taps [tokens, len(taps) * hidden] come in the model's dtype."""
        hidden, tapped = self.trunk(batch, store, taps)
        return TargetOutput(self.logits(hidden, batch), tapped)

    def recordable(self, store: KVStore) -> bool:
        """See StagedModel: attention by kernels reads the batch's tensors, the one in plain torch its host integers."""
        head_dim, keys = self.config.head_dim, store.keys[: len(self._layers)]
        return all(runs_native(self._kernels, self._embed.new_empty(0, head_dim), each, head_dim) for each in keys)

    @torch.inference_mode()
    def trunk(self, batch: StepBatch, store: KVStore, taps: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        """See StagedModel."""
        for tap in taps:
            if not -1 <= tap < self.config.num_layers:
                raise ValueError(
                    f"tap {tap} is not a layer: -1 is the embedding, {self.config.num_layers - 1} the last"
                )
        meta = AttnMeta.build(batch, store.page_size, self._kernels)
        hidden = self._embed.index_select(0, batch.token_ids)  # [tokens, hidden]
        plain = len(set(taps)) == len(taps) and -1 not in taps and store.keys[0].dtype == torch.float32
        if self._stack is not None and plain:
            tapped = self._run_stack(self._stack, hidden, batch, meta, store, taps)
        else:
            hidden, tapped = self._run_layers(hidden, batch, meta, store, taps)
        return hidden, tapped

    def logits(self, hidden: Tensor, batch: StepBatch) -> Tensor:
        """See StagedModel."""
        wanted = batch.sample_index
        if batch.score_index is not None:
            wanted = torch.cat([wanted, batch.score_index])
        if not wanted.shape[0]:
            return torch.empty((0, self.config.vocab_size), device=hidden.device)
        return self._normed_head(hidden.index_select(0, wanted)).float()

    def _run_stack(
        self, stack: DecoderStack, hidden: Tensor, batch: StepBatch, meta: AttnMeta, store: KVStore, taps: Sequence[int]
    ) -> Tensor | None:
        """All layers in one call; overwrites `hidden` with the last one's output. Returns taps that are not in the
        store."""
        count, rotary = len(self._layers), (batch.positions, self._rotary.table(max(batch.context_lens)))
        keys, values = store.keys[:count], store.values[:count]
        at = keys, values, batch.slots, batch.page_table, meta.rows, rotary
        return stack(hidden, *at, taps=taps, into=store.taps if taps else None).run()

    def _run_layers(
        self, hidden: Tensor, batch: StepBatch, meta: AttnMeta, store: KVStore, taps: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        tapped = {-1: hidden}
        attention = _Attention(self.config, self._rotary, batch, meta, store)
        for index, layer in enumerate(self._layers):
            hidden = layer.finish(attention(layer, index, layer.qkv(hidden)), hidden)
            if index in taps:
                tapped[index] = hidden
        return hidden, torch.cat([tapped[tap] for tap in taps], dim=1) if taps else None

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._embed.index_select(0, token_ids)

    def lm_head(self, hidden: Tensor) -> Tensor:
        return self._head(hidden).float()

    def lm_head_blocks(self, ids: Tensor) -> BlockWeight | None:
        return self._head.packed.rows(ids) if isinstance(self._head, NativeLinear) else None


class _Attention:
    """Norms, rotates and attends, layer after layer of one step."""

    def __init__(self, config: DenseConfig, rotary: Rotary, batch: StepBatch, meta: AttnMeta, store: KVStore) -> None:
        self._config, self._rotary, self._meta, self._store = config, rotary, meta, store
        self._positions, self._stop = batch.positions, max(batch.context_lens)
        self._angles: tuple[Tensor, Tensor] | None = None

    def __call__(self, layer: _Layer, index: int, qkv: Tensor) -> Tensor:
        """qkv [tokens, (heads + 2 * kv_heads) * head_dim] -> [tokens, heads * head_dim]"""
        c, store = self._config, self._store
        both = c.heads + c.kv_heads
        heads = qkv.view(-1, both + c.kv_heads, c.head_dim)
        qk, v = heads[:, :both], heads[:, both:]
        scale, norm = c.head_dim**-0.5, layer.qk_norm
        if runs_native(self._meta.kernels, qk, store.keys[index], c.head_dim):
            context = attend_native(
                qk[:, : c.heads],
                qk[:, c.heads :],
                v,
                index,
                self._meta,
                store,
                scale=scale,
                sliding_window=layer.window,
                rotary=(self._positions, self._rotary.table(self._stop)),
                norms=None if norm is None else (norm.weight[0], norm.weight[-1], norm.eps),
            )
        else:
            if self._angles is None:
                self._angles = self._rotary.at(self._positions, self._stop)
            # Queries and keys are normed and turned in one go.
            qk = self._rotary.apply(qk if norm is None else norm(qk), *self._angles)
            q, k = qk[:, : c.heads], qk[:, c.heads :]
            context = attend(q, k, v, index, self._meta, store, scale=scale, sliding_window=layer.window)
        return context.view(-1, c.heads * c.head_dim)


def _stack(kernels: native.Kernels, config: DenseConfig, layers: Sequence[_Layer]) -> DecoderStack | None:
    """The layers as one call, where heads and norms fill vectors."""
    weights = []
    for layer in layers:
        qkv, finish, norm = layer.qkv, layer.finish, layer.qk_norm
        assert isinstance(qkv, NativeLinear)
        assert isinstance(finish, NativeFinish)
        assert qkv.norm is not None
        weights.append(
            LayerWeights(
                attention_norm=qkv.norm.weight,
                qkv=qkv.packed,
                q_norm=None if norm is None else norm.weight[0],
                k_norm=None if norm is None else norm.weight[-1],
                out=finish.out,
                mlp_norm=finish.norm.weight,
                gate_up=finish.gate_up,
                down=finish.down,
                window=layer.window,
            )
        )
    if not DecoderStack.fits(kernels, weights, config.head_dim):
        return None
    return DecoderStack(kernels, weights, config.heads, config.kv_heads, config.head_dim, config.norm_eps)


def _make_layer(config: DenseConfig, loading: _Loading, ops: Operations, layer: int) -> _Layer:
    def norm(name: str) -> RMSNorm:
        return RMSNorm(loading.tensor(f"{layer}.{name}"), config.norm_eps)

    qk_norm = None
    if config.qk_norm:
        q_norm, k_norm = loading.tensor(f"{layer}.q_norm"), loading.tensor(f"{layer}.k_norm")
        weights = torch.cat([q_norm.expand(config.heads, -1), k_norm.expand(config.kv_heads, -1)])
        qk_norm = RMSNorm(weights, config.norm_eps)
    return _Layer(
        qkv=ops.linear(*loading.linear(f"{layer}.qkv"), norm=norm("attention_norm")),
        qk_norm=qk_norm,
        finish=ops.finish(
            loading.linear(f"{layer}.out"),
            norm("mlp_norm"),
            loading.linear(f"{layer}.gate_up"),
            loading.linear(f"{layer}.down"),
        ),
        window=config.windows[layer],
    )
