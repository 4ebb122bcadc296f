"""What steps and drafts would cost on accelerators that are not here: rooflines of named devices and model shapes.

Every number is public or an assumption named as such; nothing is measured. Must not know: requests, budgets, drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Machine(Protocol):
    """What a step and a draft take, in milliseconds. A `CostModel` is one too: the machine that was profiled.

    draft_keys: what the drafts among a step's tokens see beside `context`, each the keys of its row once more.
    silent: tokens after which nothing is drawn.
    """

    def step_ms(
        self, tokens: int, rows: int, context: int, greedy: bool = False, draft_keys: float = 0.0, silent: int = 0
    ) -> float: ...

    def draft_ms(self, rows: int, context: int, greedy: bool = False) -> float: ...


@dataclass(frozen=True)
class Device:
    """One accelerator. Peaks as their makers state them; the shares of them that kernels reach are assumptions."""

    name: str
    bandwidth_gb_s: float
    tflops: float  # bf16, dense
    memory_gb: float
    link_gb_s: float = 0.0  # to the others of a node, one direction; 0: there are none
    reached_bandwidth: float = 0.8
    reached_flops: float = 0.6
    pass_us: float = 60.0  # of a captured pass of a model, and of the host's part in it
    layer_us: float = 8.0  # gaps between a layer's kernels
    link_us: float = 8.0  # of one small all-reduce


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 3350.0, 990.0, 80.0, link_gb_s=450.0),  # SXM
        Device("h200", 4800.0, 990.0, 141.0, link_gb_s=450.0),
        # 273 GB/s on paper, of which about 225 are reached; bf16 without sparsity, as far as is known.
        Device("dgx-spark", 273.0, 125.0, 128.0, reached_bandwidth=225 / 273),
    )
}


@dataclass(frozen=True)
class Network:
    """A stack of layers as a roofline sees it: what a pass reads, and what a token computes."""

    layers: int
    hidden: int
    dense_params: float  # read in every pass; LM head included, input embedding not
    dense_bytes: float  # per parameter
    kv_bytes: float  # per token of context, all layers
    attention_flops: float  # per pair of token and key, all layers
    experts: int = 0  # per layer
    experts_used: int = 0  # per token
    expert_params: float = 0.0  # of one expert
    expert_bytes: float = 0.0  # per parameter
    stored_params: float = 0.0  # dense ones that a pass hardly reads: the input embedding
    speed: float = 1.0  # of its arithmetic, in times of bf16

    @property
    def weight_bytes(self) -> float:
        """All of them, as they lie in memory."""
        experts = self.layers * self.experts * self.expert_params * self.expert_bytes
        return (self.dense_params + self.stored_params) * self.dense_bytes + experts

    def bytes_read(self, tokens: int) -> float:
        """Weights that a pass over `tokens` reads: of the experts those that some token chose.

        With even and independent choices an expert is left out by n tokens with probability (1 - used / experts)^n.
        """
        read = self.dense_params * self.dense_bytes
        if self.experts:
            touched = self.experts * (1 - (1 - self.experts_used / self.experts) ** tokens)
            read += self.layers * touched * self.expert_params * self.expert_bytes
        return read

    @property
    def flops(self) -> float:
        """Per token, without attention."""
        return 2 * (self.dense_params + self.layers * self.experts_used * self.expert_params)


@dataclass(frozen=True)
class Draft:
    """A drafter that takes a pass of `network` over `width` slots per row, and then that many small steps in order."""

    name: str
    network: Network
    width: int
    markov_params: float = 0.0  # read once per slot; 0: the slots are independent

    def weight_bytes(self) -> float:
        return self.network.weight_bytes + self.markov_params * self.network.dense_bytes


@dataclass(frozen=True)
class Roofline:
    """A model, and perhaps a drafter, on one or several devices of a kind that share every layer.

    A pass takes the longer of reading weights and computing with them, then likewise for attention, then what does not
    shrink: gaps between kernels and exchanges between devices. Raises ValueError where the weights do not fit.
    """

    device: Device
    target: Network
    draft: Draft | None = None
    devices: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1 or (self.devices > 1 and not self.device.link_gb_s):
            raise ValueError(f"{self.devices} devices of kind {self.device.name} cannot share a model")
        if self.free_gb <= 0:
            raise ValueError(
                f"the weights take {self._weights_gb:.0f} GB and {self.devices} x {self.device.name} has "
                f"{self.devices * self.device.memory_gb:.0f}; use more devices"
            )

    @property
    def _weights_gb(self) -> float:
        return (self.target.weight_bytes + (self.draft.weight_bytes() if self.draft is not None else 0.0)) / 1e9

    @property
    def free_gb(self) -> float:
        """For K/V: nine tenths of the memory less the weights."""
        return 0.9 * self.devices * self.device.memory_gb - self._weights_gb

    @property
    def kv_tokens(self) -> int:
        """Tokens whose K/V fit, the drafter's included."""
        drafted = self.draft.network.kv_bytes if self.draft is not None else 0.0
        return int(self.free_gb * 1e9 / (self.target.kv_bytes + drafted))

    def step_ms(
        self, tokens: int, rows: int, context: int, greedy: bool = False, draft_keys: float = 0.0, silent: int = 0
    ) -> float:
        """A step over `tokens` in `rows`, to which `context` keys are visible in all: read once, whoever sees them.
        Tokens count alike, whether the LM head sees them or not."""
        return self._pass_ms(self.target, tokens, context, tokens / rows)

    def draft_ms(self, rows: int, context: int, greedy: bool = False) -> float:
        """A draft of a whole block for `rows`; 0 without a drafter."""
        if self.draft is None or not rows:
            return 0.0
        width, network = self.draft.width, self.draft.network
        took_ms = self._pass_ms(network, rows * width, context, width)
        if self.draft.markov_params:
            read = self.draft.markov_params * network.dense_bytes
            slot_ms = self._longer_ms(read, 2 * self.draft.markov_params * rows, network.speed)
            took_ms += width * (slot_ms + self.device.layer_us / 1e3)
        return took_ms

    def _pass_ms(self, network: Network, tokens: int, context: int, per_row: float) -> float:
        weights_ms = self._longer_ms(network.bytes_read(tokens), network.flops * tokens, network.speed)
        # Tokens of one row look at the same keys, which are read once.
        keys_ms = self._longer_ms(context * network.kv_bytes, context * per_row * network.attention_flops, 1.0)
        gaps_ms = (self.device.pass_us + network.layers * self.device.layer_us) / 1e3
        return weights_ms + keys_ms + gaps_ms + self._exchange_ms(network, tokens)

    def _longer_ms(self, read_bytes: float, flops: float, speed: float) -> float:
        bandwidth = self.devices * self.device.bandwidth_gb_s * self.device.reached_bandwidth
        peak = self.devices * self.device.tflops * self.device.reached_flops * speed
        return max(read_bytes / bandwidth / 1e6, flops / peak / 1e9)

    def _exchange_ms(self, network: Network, tokens: int) -> float:
        """Two all-reduces per layer, of bf16 activations."""
        if self.devices == 1:
            return 0.0
        moved = 2 * (self.devices - 1) / self.devices * tokens * network.hidden * 2
        return 2 * network.layers * (self.device.link_us / 1e3 + moved / self.device.link_gb_s / 1e6)


@dataclass(frozen=True)
class Served:
    """A model with the drafters to compare, on so many devices of a node."""

    target: Network
    dspark: Draft
    mtp: Draft  # the baseline: one token ahead
    devices: int
    about: str


_QWEN_LAYER = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12288
_QWEN_HEAD = 151_936 * 4096
_FLASH_EXPERT = 3 * 4096 * 2048
_FLASH_HEAD = 129_280 * 4096
_FLASH_LAYER = 139e6  # attention, router and the expert that all tokens share: what is left of 13 G active parameters


def _qwen(layers: int, head: bool, extra: float = 0.0) -> Network:
    params = layers * _QWEN_LAYER + head * _QWEN_HEAD + extra
    return Network(layers, 4096, params, 2.0, layers * 2 * 8 * 128 * 2, layers * 4 * 32 * 128)


def _flash(layers: int, own_embedding: bool) -> Network:
    """Experts at four bits with their scales, the rest at eight; K/V of one head, most of it compressed."""
    return Network(
        layers,
        4096,
        layers * _FLASH_LAYER + _FLASH_HEAD,
        1.0,
        layers * 96.0,
        layers * 4 * 64 * 512 / 8,
        256,
        6,
        _FLASH_EXPERT,
        0.53,
        stored_params=_FLASH_HEAD * own_embedding,
        speed=2.0,
    )


# A drafter reads the target's LM head once more, and shares it in memory; what that counts twice here is small.
MODELS = {
    "qwen3-8b": Served(
        Network(**{**_qwen(36, head=True).__dict__, "stored_params": _QWEN_HEAD}),
        Draft("dspark", _qwen(5, head=True, extra=5 * 4096 * 4096), 7, markov_params=151_936 * 256),
        Draft("mtp", _qwen(1, head=True, extra=2 * 4096 * 4096), 1),
        devices=1,
        about="Qwen3-8B in bf16, 5-layer DSpark head of block 7; one device of a node whose others do the same",
    ),
    "flash-moe": Served(
        _flash(43, own_embedding=True),
        Draft("dspark", _flash(3, own_embedding=False), 5, markov_params=129_280 * 256),
        Draft("mtp", _flash(1, own_embedding=False), 1),
        devices=8,
        about="a Flash-class MoE: 43 layers, 6 of 256 experts and one shared, 284 G parameters of which 13 G are "
        "active, experts in four bits; 3-layer DSpark head of block 5; every layer shared by a node of 8",
    ),
}
