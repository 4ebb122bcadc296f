"""What a Transformers decoder does with attention, found by running it, and the models that must be refused.

K/V geometry, K/V sharing, windows and masks are observed in one forward, never read from a family's config fields,
so a new architecture needs no code here. Must not know: pages, steps, requests.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from dspark_serve.cache.store import LayerGeometry

PROBE = "dspark_probe"  # the name under which the recording functions are registered
STEP_KEYWORD = "dspark_step"  # the keyword that carries a step, or a Recorder, down to the attention function
ATTENTION_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Keywords that models hand to every attention function and that cannot change what it computes.
INERT_KEYWORDS = frozenset({"position_ids", "position_embeddings", "cache_position", "use_cache", "dropout"})


class UnsupportedModel(ValueError):
    """A model that cannot be served: which one, and why."""

    def __init__(self, architecture: str, reason: str) -> None:
        super().__init__(f"{architecture} cannot be served: {reason}")
        self.architecture = architecture
        self.reason = reason


@dataclass(frozen=True)
class AttentionOptions:
    """The keywords of an attention call that change its result."""

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [heads]


def read_options(query: Tensor, options: Mapping[str, Any]) -> AttentionOptions:
    """Keywords given to an attention function, understood one by one; ValueError for any that is not."""
    known = {"scaling", "sliding_window", "softcap", "s_aux", "is_causal"}
    for name, value in options.items():
        if name not in known and name not in INERT_KEYWORDS and value is not None and value is not False:
            raise ValueError(f"its attention takes {name!r}, which paged attention does not have")
    if options.get("is_causal") is False:
        raise ValueError("its attention is not causal")
    if options.get("dropout"):
        raise ValueError("its attention drops out at inference")
    scale = options.get("scaling")
    return AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        sliding_window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )


@dataclass(frozen=True)
class _Mask:
    """Travels where a mask tensor would: the index function the model asked for, so it can be evaluated anywhere."""

    function: Any  # (batch, head, query, key) -> bool, broadcasting over index tensors


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    key: Tensor  # [1, kv_heads, tokens, head_dim]
    value: Tensor  # [1, kv_heads, tokens, value_dim]
    mask: Any
    options: AttentionOptions


@dataclass
class Recorder:
    """Collects the attention calls of one forward, by layer."""

    num_tokens: int
    calls: dict[int, _Call] = field(default_factory=dict)


@dataclass(frozen=True)
class Anatomy:
    """What serving must know of a model: its decoder layers and what each writes to the cache."""

    layers: tuple[nn.Module, ...]
    kv_layers: tuple[LayerGeometry, ...]  # kv_heads 0: the layer writes nothing and reads another's K/V
    kv_source: tuple[int, ...]  # layer -> the layer whose pages hold its K/V


def _record_mask(*_: object, mask_function: Any, **__: object) -> _Mask:
    return _Mask(mask_function)


def _record_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    recorder = options.pop(STEP_KEYWORD, None)
    if not isinstance(recorder, Recorder):
        raise ValueError("its layers do not pass extra keywords on to attention")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ValueError(f"its attention module {type(module).__name__} has no layer_idx")
    if layer in recorder.calls:
        raise ValueError(f"layer {layer} attends twice, so K/V of one layer would overwrite the other's")
    if any(x.shape[0] != 1 or x.shape[2] != recorder.num_tokens for x in (query, key, value)):
        raise ValueError(f"layer {layer} attends over something other than the tokens of the step")
    recorder.calls[layer] = _Call(module, key, value, attention_mask, read_options(query, options))
    return query.new_zeros(1, recorder.num_tokens, query.shape[1], value.shape[-1]), None


def register_probe() -> None:
    """Make the recording functions known to Transformers; idempotent."""
    AttentionInterface.register(PROBE, _record_attention)
    AttentionMaskInterface.register(PROBE, _record_mask)


def architecture_of(config: Any) -> str:
    return str((config.architectures or [config.model_type])[0])


def refuse_by_kind(module: Any) -> None:
    """Refuse what is visible without running the model; works on a module without weights (meta device)."""
    config, name = module.config, type(module).__name__
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise UnsupportedModel(name, "it is an encoder-decoder, and only decoders are served")
    other = sorted(set(getattr(text, "layer_types", None) or ()) - ATTENTION_LAYER_TYPES)
    if other:
        raise UnsupportedModel(name, f"it has {', '.join(other)} layers; only full and sliding attention are served")
    if getattr(module, "_is_stateful", False):
        raise UnsupportedModel(name, "it keeps a recurrent state, which cannot be paged or rolled back")
    if module.get_output_embeddings() is None:
        raise UnsupportedModel(name, "it has no language-model head")
    if not module._can_set_attn_implementation():
        raise UnsupportedModel(name, "its attention does not go through Transformers' attention interface")


def longest_context(config: Any) -> int:
    """Positions the model was made for. With longrope the short factors' range: past it, Transformers changes every
    token's rotation with the longest row of the step, so a text would depend on its batch neighbours."""
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise UnsupportedModel(architecture_of(config), "its config does not say how many positions it was made for")
    rope = getattr(text, "rope_parameters", None) or {}
    per_type = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    short = [r["original_max_position_embeddings"] for r in per_type if r.get("rope_type") == "longrope"]
    return min(longest, *short) if short else longest


def keeps_logits(module: Any) -> bool:
    """Whether the forward computes logits only at the positions asked for."""
    return "logits_to_keep" in inspect.signature(module.forward).parameters


def examine(module: Any, token_ids: Tensor, max_model_len: int) -> Anatomy:
    """Run token_ids [tokens] once with the recording attention, and read the model's anatomy from the calls."""
    recorder = Recorder(len(token_ids))
    # Asking for all logits by index, not by default, is how serving asks: some models shorten the step otherwise.
    keep = {"logits_to_keep": torch.arange(len(token_ids), device=token_ids.device)} if keeps_logits(module) else {}
    try:
        module.set_attn_implementation(PROBE)
        module(input_ids=token_ids.unsqueeze(0), use_cache=False, **keep, **{STEP_KEYWORD: recorder})
        layers = _decoder_layers(module, recorder.calls)
        for layer in range(len(layers)):
            call = recorder.calls[layer]
            _check_mask(layer, call.mask, call.options.sliding_window, max_model_len)
    except Exception as error:  # whatever a foreign forward trips over is a reason to refuse it, not to crash
        reason = str(error) if type(error) is ValueError else f"its probe failed: {type(error).__name__}: {error}"
        raise UnsupportedModel(type(module).__name__, reason) from error
    calls = [recorder.calls[layer] for layer in range(len(layers))]
    # A layer that was handed an earlier layer's very tensors shares its K/V.
    source = [next(i for i, c in enumerate(calls) if c.key is call.key and c.value is call.value) for call in calls]
    geometry = []
    for layer, call in enumerate(calls):
        heads, dim, value_dim = call.key.shape[1], call.key.shape[3], call.value.shape[3]
        owned = heads if source[layer] == layer else 0
        geometry.append(LayerGeometry(owned, dim, None if value_dim == dim else value_dim))
    return Anatomy(layers, tuple(geometry), tuple(source))


def _decoder_layers(module: nn.Module, calls: Mapping[int, _Call]) -> tuple[nn.Module, ...]:
    """The one list of layers that holds every attention module that was called, at its own index."""
    if not calls:
        raise ValueError("its attention does not go through Transformers' attention interface")
    names = {id(m): name for name, m in module.named_modules()}
    owners = set()
    for layer, call in calls.items():
        path = names[id(call.module)].split(".")
        at = next((i for i, part in enumerate(path) if part == str(layer)), None)
        owner = module.get_submodule(".".join(path[:at])) if at else None
        if not isinstance(owner, nn.ModuleList):
            raise ValueError(f"attention of layer {layer} does not sit in a list of layers at that index")
        owners.add(owner)
    if len(owners) != 1:
        raise ValueError("its attention modules belong to more than one list of layers")
    layers = tuple(owners.pop())
    silent = sorted(set(range(len(layers))) - set(calls))
    if silent:
        raise ValueError(f"layers {silent} do not attend through Transformers' attention interface")
    return layers


def _check_mask(layer: int, mask: Any, window: int | None, max_model_len: int) -> None:
    """The mask the model asked for must be what paged attention does: causal, within the window it passes.

    Evaluated at positions far beyond the probe's tokens, so a window or chunk never reached there is seen too.
    """
    if not isinstance(mask, _Mask):
        raise ValueError(f"the mask of layer {layer} is not made by Transformers' mask functions")
    marks = {0, max_model_len} | {1 << i for i in range(max_model_len.bit_length())}
    if window:
        marks |= {window, 2 * window, max_model_len - window}
    near = sorted({m + d for m in marks for d in (-1, 0, 1) if 0 <= m + d < max_model_len})
    points = torch.tensor(near)
    query, key = (x.flatten() for x in torch.meshgrid(points, points, indexing="ij"))
    zero = torch.zeros_like(query)
    expected = key <= query
    if window:
        expected = expected & (query - key < window)
    try:
        visible = mask.function(zero, zero, query, key)
    except Exception as error:
        raise ValueError(f"the mask of layer {layer} depends on more than positions") from error
    if not torch.equal(visible.expand_as(expected), expected):
        kind = "causal" if window is None else f"causal within {window} positions"
        raise ValueError(f"the mask of layer {layer} is not {kind}, which is all its attention call says")


def relative_error(got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """How far [tokens, n] rows are from what they should be, as a share of their own spread.

    The worst row in float32. In half precision the median one: rounding may flip an expert's choice for a token or
    two, while a model that is served wrongly is wrong nearly everywhere.
    """
    want = want.float()
    spread = (want - want.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(1e-6)
    error = (got.float() - want).norm(dim=-1) / spread
    return float((error.max() if dtype == torch.float32 else error.median()).nan_to_num(torch.inf))


def probe_tokens(vocab_size: int, length: int, device: torch.device) -> Tensor:
    """Some distinct tokens from the middle of the vocabulary, away from special ones at its ends: [length] int64."""
    return vocab_size // 3 + torch.arange(length, device=device) * 7 % max(vocab_size // 3, 1)


Answer = tuple[
    Tensor, tuple[Tensor, ...]
]  # logits [tokens, vocab], hidden states [tokens, hidden] if the model has them


def eager_reference(module: Any, prompts: Sequence[Tensor]) -> list[Answer]:
    """The model's own answer to each prompt, by its own eager attention."""
    module.set_attn_implementation("eager")
    answers = []
    for prompt in prompts:
        out = module(input_ids=prompt.unsqueeze(0), use_cache=False, output_hidden_states=True)
        states = getattr(out, "hidden_states", None) or ()
        answers.append((out.logits[0], tuple(h[0] for h in states)))
    return answers
