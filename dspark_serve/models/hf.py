"""Any Transformers decoder on the paged cache: the model's own code, paged attention through the library's interface.

A ragged step runs as one sequence of [1, tokens]; the step itself travels to attention as a keyword, so nothing is
global but two registered names. Must not know: requests, drafters, or how any particular family is built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from dspark_kernels.blocks import BlockWeight
from dspark_serve.cache.store import KVStore
from dspark_serve.models import hf_probe
from dspark_serve.models.attention import AttnMeta, attend
from dspark_serve.models.base import ModelInfo
from dspark_serve.models.hf_probe import STEP_KEYWORD, Answer, UnsupportedModel, architecture_of, relative_error
from dspark_serve.models.invariance import Chunk, probe_batch
from dspark_serve.models.layers import Operations, operations
from dspark_serve.tensors import StepBatch, TargetOutput

SERVING = "dspark_paged"  # the name under which paged attention is registered
_PROBE_PAGE = 16
_PROBE_CHUNKS = ((3, 2), (2, 3), (3, 2), (4, 5))  # tokens of two rows per step: every chunk border is near
_TOLERANCE = {torch.float32: 1e-3}  # of the spread of a token's logits
_TOLERANCE_HALF = 0.1


@dataclass(frozen=True)
class _Step:
    """What a forward hands to every attention call of the model."""

    meta: AttnMeta
    store: KVStore
    kv_source: tuple[int, ...]  # layer -> layer of the store that holds its K/V


def _paged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Transformers' attention function: query [1, heads, tokens, head_dim] -> [1, tokens, heads, value_dim]."""
    step: _Step = options.pop(STEP_KEYWORD)
    known = hf_probe.read_options(query, options)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, dim]
    out = attend(
        q,
        k,
        v,
        step.kv_source[int(module.layer_idx)],  # type: ignore[arg-type]
        step.meta,
        step.store,
        scale=known.scale,
        sliding_window=known.sliding_window,
        softcap=known.softcap,
        sinks=known.sinks,
    )
    return out.unsqueeze(0), None


class HFModel:
    """A TargetModel around a Transformers causal language model. Owns the module from then on.

    Construction probes the model and raises UnsupportedModel when it cannot be served exactly as it is.
    """

    def __init__(self, module: Any, architecture: str | None = None, kernels: str = "auto") -> None:
        hf_probe.refuse_by_kind(module)
        hf_probe.register_probe()
        # No mask function goes with it: Transformers then builds no mask at all and never looks for packed sequences.
        AttentionInterface.register(SERVING, _paged_attention)
        self._module = module.eval().requires_grad_(False)
        config = module.config
        name = architecture or type(module).__name__
        max_model_len = hf_probe.longest_context(config)
        text = config.get_text_config(decoder=True)
        lengths = [sum(sizes) for sizes in zip(*_PROBE_CHUNKS, strict=True)]
        ids = hf_probe.probe_tokens(text.vocab_size, sum(lengths), self.device)
        prompts = list(torch.split(ids, lengths))
        with torch.inference_mode():
            anatomy = hf_probe.examine(module, ids, max_model_len)
            reference = hf_probe.eager_reference(module, prompts)
        self._layers = anatomy.layers
        self._kv_source = anatomy.kv_source
        self._keeps_logits = hf_probe.keeps_logits(module)
        dtype = module.get_input_embeddings().weight.dtype
        module.set_attn_implementation(SERVING)
        ops = operations(dtype, self.device, kernels)
        self._kernels = ops.attention
        if dtype == torch.float32 and self.device.type == "cpu":
            _pack_linears(module, ops)
        self._info = ModelInfo(
            architecture=name,
            vocab_size=reference[0][0].shape[-1],
            hidden_size=text.hidden_size,
            num_layers=len(anatomy.layers),
            max_model_len=max_model_len,
            kv_layers=anatomy.kv_layers,
            dtype=dtype,
            kernels=ops.choice,
            backend=f"transformers, {ops.name}",
        )
        self._taps_refused: str | None = None
        self._taps_refused = self._verify(prompts, reference)

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
        kernels: str = "auto",
    ) -> HFModel:
        """Load a local checkpoint, safetensors only. Raises UnsupportedModel with the reason it cannot be served."""
        path = Path(model_dir)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, OSError) as error:
            raise UnsupportedModel(
                _named_architecture(path), f"Transformers cannot read its config: {error}"
            ) from error
        name = architecture_of(config)
        if config.is_encoder_decoder:
            raise UnsupportedModel(name, "it is an encoder-decoder, and only decoders are served")
        auto = _auto_class(config)
        with torch.device("meta"):  # the structure alone, so that a refusal does not first read gigabytes
            hf_probe.refuse_by_kind(auto.from_config(deepcopy(config), trust_remote_code=trust_remote_code))
        if not any(path.glob("*.safetensors")):
            raise UnsupportedModel(
                name, f"{path} holds no .safetensors files, and other formats may run code when read"
            )
        module, report = auto.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        missing = sorted(report["missing_keys"])
        if missing:  # Transformers would fill them with random numbers
            raise UnsupportedModel(name, f"its checkpoint lacks the tensors {', '.join(missing)}")
        return cls(module.to(device), name, kernels)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def device(self) -> torch.device:
        device: torch.device = self._module.get_input_embeddings().weight.device
        return device

    @torch.inference_mode()
    def forward(self, batch: StepBatch, store: KVStore, taps: Sequence[int] = ()) -> TargetOutput:
        """See TargetModel. Raises UnsupportedModel for taps when the model's layers are not a plain residual stream."""
        if any(not -1 <= layer < self._info.num_layers for layer in taps):
            raise ValueError(f"taps {list(taps)} must lie within -1..{self._info.num_layers - 1}")
        if taps and self._taps_refused is not None:
            raise UnsupportedModel(self._info.architecture, self._taps_refused)
        wanted = batch.sample_index if batch.score_index is None else torch.cat([batch.sample_index, batch.score_index])
        rows = wanted if wanted.shape[0] else wanted.new_zeros(1)  # packed linears do not take no rows
        keep = {"logits_to_keep": rows} if self._keeps_logits else {}
        step = _Step(AttnMeta.build(batch, store.page_size, self._kernels), store, self._kv_source)
        with self._tapping(taps, batch.token_ids.shape[0]) as tapped:
            out = self._module(
                input_ids=batch.token_ids.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0),
                use_cache=False,
                **keep,
                **{STEP_KEYWORD: step},
            )
        logits = out.logits[0] if self._keeps_logits else out.logits[0, rows]
        return TargetOutput(logits[: wanted.shape[0]].float(), tapped)

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        out: Tensor = self._module.get_input_embeddings()(token_ids)
        return out

    @torch.inference_mode()
    def lm_head(self, hidden: Tensor) -> Tensor:
        out: Tensor = self._module.get_output_embeddings()(hidden)
        return out.float()

    def lm_head_blocks(self, ids: Tensor) -> BlockWeight | None:
        return None  # Transformers widens what it loads

    @contextmanager
    def _tapping(self, taps: Sequence[int], num_tokens: int) -> Iterator[Tensor | None]:
        """Yields a buffer [num_tokens, len(taps) * hidden] that the forward run meanwhile fills; None without taps."""
        if not taps:
            yield None
            return
        size = self._info.hidden_size
        buffer = torch.empty(num_tokens, len(taps) * size, dtype=self._info.dtype, device=self.device)

        def keep(column: int, state: Any) -> None:
            # Copied at once: a later layer may add to the residual stream in place.
            tensor = state[0] if isinstance(state, tuple) else state
            buffer[:, column * size : (column + 1) * size] = tensor[0]

        def hook(column: int, layer: int) -> Any:
            if layer == -1:
                first = self._layers[0]
                return first.register_forward_pre_hook(
                    lambda _, args, kwargs: keep(column, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
                )
            return self._layers[layer].register_forward_hook(lambda _, __, output: keep(column, output))

        handles = [hook(column, layer) for column, layer in enumerate(taps)]
        try:
            yield buffer
        finally:
            for handle in handles:
                handle.remove()

    def _serve(self, prompts: Sequence[Tensor], taps: Sequence[int]) -> list[tuple[Tensor, Tensor | None]]:
        """Logits [tokens, vocab] and taps of each of the two prompts, run in small chunks of both at once."""
        store = KVStore(self._info.kv_layers, 3, _PROBE_PAGE, self._info.dtype, self.device)
        parts: list[list[TargetOutput]] = [[], []]
        done = [0, 0]
        for sizes in _PROBE_CHUNKS:
            chunks = [
                Chunk(tuple(prompts[row][done[row] : done[row] + size].tolist()), done[row], (2 - row,))
                for row, size in enumerate(sizes)
            ]
            out = self.forward(probe_batch(chunks, _PROBE_PAGE, self.device), store, taps)
            tapped = (None, None) if out.taps is None else torch.split(out.taps, list(sizes))
            for row, logits in enumerate(torch.split(out.logits, list(sizes))):
                parts[row].append(TargetOutput(logits, tapped[row]))
                done[row] += sizes[row]
        return [
            (
                torch.cat([p.logits for p in row]),
                torch.cat([p.taps for p in row if p.taps is not None]) if taps else None,
            )
            for row in parts
        ]

    def _verify(self, prompts: Sequence[Tensor], reference: Sequence[Answer]) -> str | None:
        """Compare paged answers to the probe prompts with the model's own.

        Raises UnsupportedModel when logits differ: the model mixes tokens, or keeps state, outside its attention.
        Returns why taps must be refused, None when they equal the model's hidden states.
        """
        info = self._info
        plain = all(
            len(states) == info.num_layers + 1 and all(s.shape == (len(prompt), info.hidden_size) for s in states)
            for prompt, (_, states) in zip(prompts, reference, strict=True)
        )
        taps = tuple(range(-1, info.num_layers - 1)) if plain else ()  # the last hidden state is normed, the tap is not
        served = self._serve(prompts, taps)
        limit = _TOLERANCE.get(info.dtype, _TOLERANCE_HALF)
        error = max(
            relative_error(got, want, info.dtype) for (got, _), (want, _) in zip(served, reference, strict=True)
        )
        if not error <= limit:
            raise UnsupportedModel(
                info.architecture,
                f"through the paged cache its logits differ by {error:.1e} from its own (allowed: {limit:.0e}), so "
                "it mixes tokens outside its attention or numbers its positions in a way of its own",
            )
        for (_, got), (_, states) in zip(served, reference, strict=True):
            if got is None or not relative_error(got, torch.cat(states[:-1], dim=-1), info.dtype) <= limit:
                return "its layers do not carry a plain residual stream, so hidden states cannot be tapped"
        return None


def _auto_class(config: Any) -> Any:
    """The Transformers class that builds a language model from this config; multimodal ones are used for text only."""
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if custom or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UnsupportedModel(architecture_of(config), "Transformers has no causal language model for its config")


def _named_architecture(path: Path) -> str:
    """What config.json calls the model, for errors raised before it can be read properly."""
    try:
        return str(json.loads((path / "config.json").read_text())["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return path.name


class _PackedLinear(nn.Module):
    """Stands in for an nn.Linear, whose weight it takes away: faster for few rows, and row-invariant."""

    def __init__(self, linear: nn.Linear, ops: Operations) -> None:
        super().__init__()
        self._run = ops.linear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        # Some models look at a weight's dtype; without data, one that computes with it fails instead of being wrong.
        self.weight = torch.empty_like(linear.weight, device="meta", requires_grad=False)
        linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def _pack_linears(module: nn.Module, ops: Operations) -> None:
    """Replace every nn.Linear, one after the other, so that memory is never held twice."""
    done: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                done[child] = done.get(child) or _PackedLinear(child, ops)
                setattr(parent, name, done[child])
