"""What a draft head is made of: config.json of a head in DeepSpec format, read, checked against a target, written.

`architectures[0]` decides the kind; `model_type` is the target's and says nothing. Must not know: tensors, requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dspark_serve.models.catalog import LoadError

Kind = Literal["dspark", "eagle3"]
Family = Literal["qwen3", "gemma4"]
MarkovType = Literal["vanilla", "gated", "rnn"]

ARCHITECTURES: Mapping[str, tuple[Kind, Family]] = {
    "Qwen3DSparkModel": ("dspark", "qwen3"),
    "Gemma4DSparkModel": ("dspark", "gemma4"),
    "Qwen3Eagle3Model": ("eagle3", "qwen3"),
    "Eagle3DraftModel": ("eagle3", "qwen3"),  # an older name of the same
    "Gemma4Eagle3Model": ("eagle3", "gemma4"),
}
MARKOV_TYPES = ("vanilla", "gated", "rnn")
_TOKENIZER_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HeadError(LoadError):
    """A head that cannot be used, or not with this target; the message is one sentence with the facts that disagree."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Widths in elements. A DFlash head is a DSpark head with markov_rank 0 and no confidence head.

    `draft_vocab_size` n, an extension of the format: the head drafts n chosen target tokens only. model.safetensors
    then holds their ids as `draft_vocab` [n], ascending, and `markov_head.markov_w2.weight` has n rows.
    """

    architecture: str
    vocab_size: int  # of the target
    hidden_size: int
    intermediate_size: int
    num_layers: int  # of the head itself
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    rope: Mapping[str, Any]  # as in a config's rope_parameters, for full attention
    num_target_layers: int
    taps: tuple[int, ...]  # target_layer_ids: outputs of these target layers, -1 is the embedding output
    block_size: int  # input slots and drafts per round; EAGLE-3: the length of the chain (ttt_length)
    mask_token_id: int | None = None  # fills slots 1.. of a block; EAGLE-3 has none
    markov_rank: int = 0  # 0: no Markov head
    markov_type: MarkovType = "vanilla"  # meaningless at rank 0
    confidence: bool = False
    confidence_with_markov: bool = False
    draft_vocab_size: int | None = None  # None: the whole vocabulary
    attention_bias: bool = False
    k_eq_v: bool = False  # Gemma 4: values are the keys' projection, normed without a weight
    logit_softcap: float | None = None  # Gemma 4: cap * tanh(logits / cap), before the Markov bias
    tokenizer_ids: Mapping[str, Any] = field(default_factory=dict)  # bos, eos, pad: carried along, never used

    @property
    def kind(self) -> Kind:
        return ARCHITECTURES[self.architecture][0]

    @property
    def family(self) -> Family:
        return ARCHITECTURES[self.architecture][1]

    @property
    def drafted_tokens(self) -> int:
        """Tokens the head can draft: rows of its LM head and of markov_w2."""
        return self.draft_vocab_size or self.vocab_size

    @staticmethod
    def parse(config: Mapping[str, Any]) -> HeadConfig:
        """From config.json's contents. Raises HeadError naming what is missing, contradictory or not supported."""
        architecture = next(iter(config.get("architectures") or []), None)
        if architecture not in ARCHITECTURES:
            raise HeadError(f"architecture {architecture} is no draft head; known are {', '.join(ARCHITECTURES)}")
        try:
            return _parse(str(architecture), config)
        except KeyError as error:
            raise HeadError(f"the head's config.json lacks {error.args[0]}") from None
        except (TypeError, ValueError) as error:
            raise HeadError(f"the head's config.json holds a value that cannot be read: {error}") from None

    def __post_init__(self) -> None:
        _require(self.heads % self.kv_heads == 0, f"{self.heads} heads cannot share {self.kv_heads} key/value heads")
        _require(bool(self.taps), "target_layer_ids is empty")
        ascending = all(a < b for a, b in zip(self.taps, self.taps[1:], strict=False))
        _require(ascending, f"target_layer_ids {list(self.taps)} must increase")
        _require(self.block_size >= 1, f"block_size {self.block_size} must be positive")
        _require(self.markov_type in MARKOV_TYPES, f"markov_head_type {self.markov_type!r} is not in {MARKOV_TYPES}")
        if self.kind == "eagle3":
            _require(self.num_layers == 1, f"EAGLE-3 heads have 1 layer, this one says {self.num_layers}")
            _require(self.taps[0] >= 0, "EAGLE-3 heads cannot tap the embedding (-1)")
            _require(not self.markov_rank and not self.confidence, "EAGLE-3 heads have no Markov or confidence head")
        else:
            mask = self.mask_token_id
            _require(mask is not None, "the head's config.json lacks mask_token_id")
            _require(
                mask is None or 0 <= mask < self.vocab_size,
                f"mask_token_id {mask} is outside the vocabulary of {self.vocab_size}",
            )
        _require(
            self.markov_rank > 0 or not (self.confidence and self.confidence_with_markov),
            "confidence_head_with_markov needs a Markov head, and markov_rank is 0",
        )
        size = self.draft_vocab_size
        _require(
            size is None or 0 < size <= self.vocab_size,
            f"draft_vocab_size {size} must lie within the vocabulary of {self.vocab_size}",
        )

    def check_target(self, vocab_size: int, hidden_size: int, num_layers: int) -> None:
        """Raise HeadError with the two numbers that disagree unless the head was made for a target of this shape."""
        pairs = (
            ("hidden_size", self.hidden_size, hidden_size),
            ("vocab_size", self.vocab_size, vocab_size),
            ("num_target_layers", self.num_target_layers, num_layers),
        )
        for name, ours, theirs in pairs:
            _require(ours == theirs, f"the head does not fit: it was made for {name} {ours}, the target has {theirs}")
        # The last layer's output goes through the final norm in some frameworks and not in others, so no head may
        # depend on it.
        _require(
            self.taps[0] >= -1 and self.taps[-1] < num_layers - 1,
            f"the head does not fit: it taps layers {list(self.taps)}, and the target's last usable layer is "
            f"{num_layers - 2} (-1 is the embedding)",
        )

    def to_dict(self) -> dict[str, Any]:
        """config.json's contents in DeepSpec format; `parse` of it gives an equal config."""
        eagle, gemma = self.kind == "eagle3", self.family == "gemma4"
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": "gemma4_text" if gemma else "qwen3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "layer_types": ["full_attention"] * self.num_layers,
            "num_attention_heads": self.heads,
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_positions,
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "num_target_layers": self.num_target_layers,
            "target_layer_ids": list(self.taps),
            **self.tokenizer_ids,
        }
        config |= self._gemma() if gemma else self._qwen()
        if eagle:
            return config | {"ttt_length": self.block_size, "draft_num_hidden_layers": 1}
        config |= {"block_size": self.block_size, "mask_token_id": self.mask_token_id}
        config |= {"markov_rank": self.markov_rank, "enable_confidence_head": self.confidence}
        if self.markov_rank:
            config["markov_head_type"] = self.markov_type
        if self.confidence:
            config["confidence_head_with_markov"] = self.confidence_with_markov
        if self.draft_vocab_size is not None:
            config["draft_vocab_size"] = self.draft_vocab_size
        return config

    def _qwen(self) -> dict[str, Any]:
        return {
            "hidden_act": "silu",
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rope_parameters": dict(self.rope),
            "use_sliding_window": False,
        }

    def _gemma(self) -> dict[str, Any]:
        heads, width = ("num_global_key_value_heads", "global_head_dim") if self.k_eq_v else (None, "global_head_dim")
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_k_eq_v": self.k_eq_v,
            "num_key_value_heads": self.kv_heads,
            **({heads: self.kv_heads} if heads else {}),
            width: self.head_dim,
            "final_logit_softcapping": self.logit_softcap,
            "rope_parameters": {"full_attention": dict(self.rope)},
        }


def _parse(architecture: str, config: Mapping[str, Any]) -> HeadConfig:
    kind, family = ARCHITECTURES[architecture]
    gemma = family == "gemma4"
    expected = "gelu_pytorch_tanh" if gemma else "silu"
    activation = config.get("hidden_activation" if gemma else "hidden_act") or expected
    _require(activation == expected, f"activation {activation!r} is not supported (only {expected})")
    for name in ("enable_moe_block", "hidden_size_per_layer_input", "num_kv_shared_layers", "use_double_wide_mlp"):
        _require(not config.get(name), f"{name} {config.get(name)} is not supported in a head")
    layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types") or ["full_attention"] * layers
    _require(
        set(kinds) == {"full_attention"} and len(kinds) == layers,
        f"layer_types {kinds} must be full_attention for each of {layers} layers",
    )
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    k_eq_v = gemma and bool(config.get("attention_k_eq_v"))
    if gemma:
        head_dim = int(config["global_head_dim"])
        kv_heads = int(config["num_global_key_value_heads"] if k_eq_v else config["num_key_value_heads"])
    else:
        head_dim = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
    rank = int(config.get("markov_rank") or 0)
    confidence = bool(config.get("enable_confidence_head"))
    return HeadConfig(
        architecture=architecture,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_positions=int(config["max_position_embeddings"]),
        rope=_rope(config, gemma),
        num_target_layers=int(config["num_target_layers"]),
        taps=tuple(int(layer) for layer in config["target_layer_ids"]),
        block_size=int(config["ttt_length"] if kind == "eagle3" else config["block_size"]),
        mask_token_id=None if kind == "eagle3" else int(config["mask_token_id"]),
        markov_rank=rank,
        markov_type=config["markov_head_type"] if rank else "vanilla",
        confidence=confidence,
        confidence_with_markov=confidence and bool(config["confidence_head_with_markov"]),
        draft_vocab_size=None if config.get("draft_vocab_size") is None else int(config["draft_vocab_size"]),
        attention_bias=bool(config.get("attention_bias", False)),
        k_eq_v=k_eq_v,
        logit_softcap=(config.get("final_logit_softcapping") or None) if gemma else None,
        tokenizer_ids={name: config[name] for name in _TOKENIZER_IDS if name in config},
    )


def _rope(config: Mapping[str, Any], gemma: bool) -> dict[str, Any]:
    """The nested rope_parameters; a missing base is an error, because the usual default of 10000 is wrong here."""
    rope = dict(config.get("rope_parameters") or {})
    if gemma:
        rope = dict(rope["full_attention"])
    if rope.get("rope_theta") is None and config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    if rope.get("rope_theta") is None:
        raise KeyError("rope_parameters.rope_theta")
    return rope


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise HeadError(message)
