"""Building blocks of decoders: linears with what surrounds them, and rotary embeddings. Few operations; row-invariant.

Row-invariant: in float32 on CPU a row's bits do not depend on how many rows come with it or where it stands.
Must not know: which model they are part of, attention, the cache.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_kernels import native, triton
from dspark_kernels.attention import AttentionKernels
from dspark_kernels.blocks import BlockWeight
from dspark_kernels.packed import PackedWeight

logger = logging.getLogger(__name__)

PACK_ROWS = (
    8  # oneDNN 3.12 chose the same layout (AB16b64a) for 2 to 64 rows, with AVX2 and with AVX-512; 1 packs nothing
)
_MIN_PACKED_ROWS = 2  # a single row takes another kernel for some widths, with other bits
_MIN_PLAIN_ROWS = 4  # likewise for F.linear in float32 on CPU
_GRAIN = 32768  # elements below which torch runs an elementwise operation on one thread (at::internal::GRAIN_SIZE)
_VECTOR_STEP = 32  # elements torch handles per vector step at most; what remains goes through scalar code
_ROPE_BLOCK = 1024  # positions computed at once
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


class Linear(Protocol):
    """y = x W^T + b for x [rows, in_features]; returns [rows, out_features] in x's dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Finish(Protocol):
    """What follows attention in a decoder layer: attended [rows, width], hidden [rows, hidden] -> [rows, hidden]."""

    def __call__(self, attended: Tensor, hidden: Tensor) -> Tensor: ...


Weight = Tensor | BlockWeight
Affine = tuple[Weight, Tensor | None]  # weight [out_features, in_features] and bias


class Operations(Protocol):
    """Makes the layers of a decoder from their weights: the seam between plain torch and fused kernels."""

    @property
    def name(self) -> str:
        """For people: "native avx512 float32"."""
        ...

    @property
    def choice(self) -> str:
        """For `operations`, to get the like of these again."""
        ...

    @property
    def attention(self) -> AttentionKernels | None:
        """What attention may use; None: torch."""
        ...

    @property
    def library(self) -> native.Kernels | None:
        """The C++ kernels, which hold weights packed, as they were stored; None: weights are tensors of the dtype."""
        ...

    def linear(self, weight: Weight, bias: Tensor | None = None, norm: RMSNorm | None = None) -> Linear:
        """x -> norm(x) W^T + b for weight [out_features, in_features], which the caller should drop."""
        ...

    def finish(self, out: Affine, norm: RMSNorm, gate_up: Affine, down: Affine) -> Finish:
        """h = hidden + out(attended); h + down(silu(gates) * ups of gate_up(norm(h))); gates come before ups."""
        ...


def operations(dtype: torch.dtype, device: torch.device, kernels: str = "auto") -> Operations:
    """kernels "auto": the fastest there are for this dtype and device; "torch": none; "triton": those, or ValueError.

    On a CPU, in float32, all of them are row-invariant.
    """
    if kernels == "triton" or (kernels == "auto" and device.type == "cuda"):
        obstacle = triton.obstacle(device)
        if obstacle is None:
            from dspark_serve.models.triton_layers import TritonOperations  # imports Triton, which need not be there

            return TritonOperations(dtype)
        if kernels == "triton":
            raise ValueError(f"kernels triton were asked for, but {obstacle}")
        logger.warning("the Triton kernels cannot be used, torch serves instead, slower: %s", obstacle)
    if dtype == torch.float32 and device.type == "cpu" and kernels == "auto":
        library = native.load()
        if library is not None:
            return NativeOperations(library)
    return TorchOperations(dtype, device)


class NativeOperations:
    """float32 on CPU with the C++ kernels: norm, product, and what follows it are one call."""

    choice = "auto"

    def __init__(self, kernels: native.Kernels) -> None:
        self.attention = self.library = kernels
        self.name = f"native {kernels.isa} float32"

    def linear(self, weight: Weight, bias: Tensor | None = None, norm: RMSNorm | None = None) -> NativeLinear:
        return NativeLinear(self.library, PackedWeight(self.library, weight, bias, False), norm)

    def finish(self, out: Affine, norm: RMSNorm, gate_up: Affine, down: Affine) -> NativeFinish:
        kernels = self.library
        first, last = (PackedWeight(kernels, *affine, gated=False) for affine in (out, down))
        return NativeFinish(kernels, first, norm, PackedWeight(kernels, *gate_up, gated=True), last)


@dataclass(frozen=True)
class NativeLinear:
    """x -> norm(x) W^T + b. The fused norm works in whole vectors; one that does not fill them runs in torch."""

    kernels: native.Kernels
    packed: PackedWeight
    norm: RMSNorm | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return self.kernels.product(x, self.packed)
        if self.packed.inputs % self.kernels.lanes:
            return self.kernels.product(self.norm(x), self.packed)
        return self.kernels.product(x, self.packed, self.norm.weight, self.norm.eps)


def normed(linear: Linear, norm: RMSNorm) -> Linear:
    """x -> linear(norm(x)), with the weights of `linear`, which has no norm of its own."""
    if isinstance(linear, NativeLinear):
        return replace(linear, norm=norm)
    return lambda x: linear(norm(x))


@dataclass(frozen=True)
class NativeFinish:
    """See Operations.finish."""

    kernels: native.Kernels
    out: PackedWeight
    norm: RMSNorm
    gate_up: PackedWeight
    down: PackedWeight

    def __call__(self, attended: Tensor, hidden: Tensor) -> Tensor:
        kernels, norm = self.kernels, self.norm
        if self.gate_up.inputs % kernels.lanes == 0:
            return kernels.finish_layer(attended, hidden, self.out, norm.weight, norm.eps, self.gate_up, self.down)
        hidden = kernels.product(attended, self.out, residual=hidden)
        return kernels.product(kernels.product(norm(hidden), self.gate_up), self.down, residual=hidden)


class TorchOperations:
    """Plain torch: half precision on CPUs, CPUs for which the kernels were not built, GPUs that Triton is not for."""

    choice = "torch"
    attention = library = None

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.name = f"{'onednn-packed' if _packs(dtype, device) else 'torch'} {str(dtype).removeprefix('torch.')}"

    def linear(self, weight: Weight, bias: Tensor | None = None, norm: RMSNorm | None = None) -> Linear:
        linear = _plain_or_packed(weight, bias)
        return linear if norm is None else lambda x: linear(norm(x))

    def finish(self, out: Affine, norm: RMSNorm, gate_up: Affine, down: Affine) -> Finish:
        first, inner, last = (_plain_or_packed(*affine) for affine in (out, gate_up, down))

        def finish(attended: Tensor, hidden: Tensor) -> Tensor:
            hidden = hidden + first(attended)
            return hidden + last(swiglu(inner(norm(hidden))))

        return finish


class PackedLinear:
    """float32 on CPU, weights laid out by oneDNN for few rows; does not keep the weight it was made from.

    Bits are the same for every number of rows from 2 up, so a single row runs twice (the weights are read once).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows < _MIN_PACKED_ROWS:
            x = torch.cat([x] * _MIN_PACKED_ROWS)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out[:rows]


class PlainLinear:
    """F.linear, for GPUs, half precision, and CPUs without oneDNN. Keeps the weight as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self._bias = weight, bias
        exact = weight.device.type == "cpu" and weight.dtype == torch.float32
        self._min_rows = _MIN_PLAIN_ROWS if exact else 1

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows >= self._min_rows:
            return F.linear(x, self.weight, self._bias)
        padded = F.pad(x, (0, 0, 0, self._min_rows - rows))
        return F.linear(padded, self.weight, self._bias)[:rows]


def _packs(dtype: torch.dtype, device: torch.device) -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return device.type == "cpu" and dtype == torch.float32 and available


def _plain_or_packed(weight: Weight, bias: Tensor | None) -> Linear:
    if isinstance(weight, BlockWeight):
        weight = weight.dequantize()
    return (PackedLinear if _packs(weight.dtype, weight.device) else PlainLinear)(weight, bias)


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fewer operations than F.rms_norm's.

    `weight` [..., width] broadcasts against x: a row per head norms queries and keys at once.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight.contiguous(), eps
        self._width = weight.shape[-1]
        # In float32 the mean is not taken: the norm's sqrt(width) goes into the weight.
        self._scaled = weight * self._width**0.5 if weight.dtype == torch.float32 else weight

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return F.rms_norm(x, (self._width,), eps=self.eps).mul_(self._scaled)
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * norm.square_().add_(self.eps * self._width).rsqrt_()).mul_(self._scaled)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [rows, 2 * width], the gates first. Returns [rows, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate, up = gate_up[:, :width], gate_up[:, width:]
    if gate_up.device.type != "cpu" or _splits_evenly(rows, width):
        return F.silu(gate).mul_(up)
    out = torch.empty_like(up, memory_format=torch.contiguous_format)
    step = max(_GRAIN // width, 1)
    for start in range(0, rows, step):
        torch.ops.aten.silu.out(gate[start : start + step], out=out[start : start + step])
    return out.mul_(up)


def _splits_evenly(rows: int, width: int) -> bool:
    """Whether torch's threads share rows * width elements at vector boundaries. Where they do not, the odd elements at
    each thread's end are computed by scalar code, whose exponential has other bits, and which ones depends on rows."""
    count = rows * width
    threads = min(torch.get_num_threads(), -(-count // _GRAIN))
    return threads <= 1 or (width % _VECTOR_STEP == 0 and -(-count // threads) % _VECTOR_STEP == 0)


class Rotary:
    """Rotary position embedding in the half-split layout of Transformers, for whole heads.

    `parameters` is a config's `rope_parameters` (or `rope_scaling`) with `rope_theta` filled in. Raises ValueError
    naming a rope type that is not one of ROPE_TYPES.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        head_dim: int,
        max_positions: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._frequencies, self._amplitude = rope_frequencies(parameters, head_dim, max_positions)  # [head_dim / 2]
        self._half = head_dim // 2
        self._dtype, self._device = dtype, device
        self._table = torch.empty(0, 2, head_dim, dtype=dtype, device=device)  # [positions, cos and sin, head_dim]

    def table(self, stop: int) -> Tensor:
        """Cosines and signed sines of positions < stop at least: [positions, 2, head_dim]."""
        if stop > self._table.shape[0]:
            # Always whole blocks from the same starts: a position's bits do not depend on when it was first asked for.
            blocks = [self._block(start) for start in range(self._table.shape[0], stop, _ROPE_BLOCK)]
            self._table = torch.cat([self._table, *blocks])
        return self._table

    def at(self, positions: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines for positions [tokens] < stop: two tensors [tokens, 1, head_dim]."""
        cos, sin = self.table(stop).index_select(0, positions).unsqueeze(2).unbind(1)
        return cos, sin

    def _block(self, start: int) -> Tensor:
        position = torch.arange(start, start + _ROPE_BLOCK, dtype=torch.float32).unsqueeze(1)
        angle = position * self._frequencies
        cos, sin = angle.cos() * self._amplitude, angle.sin() * self._amplitude
        # The first half of a head turns against its second half: x1 cos - x2 sin, x2 cos + x1 sin.
        block = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], dim=1)
        return block.to(device=self._device, dtype=self._dtype)

    def apply(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate heads [tokens, heads, head_dim] by `at`'s angles; returns a new tensor of that shape."""
        return (heads * cos).add_(heads.roll(self._half, -1).mul_(sin))


def rope_frequencies(parameters: Mapping[str, Any], head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Angles per position [head_dim / 2] float32 and the factor cosines and sines are multiplied with.

    Types: default; linear (one factor for all); llama3 (long waves slowed, short ones kept, a ramp between); yarn
    (Peng et al. 2023, 3.2: a ramp over dimensions, and attention sharpened by 0.1 ln(factor) + 1).
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported (only {', '.join(ROPE_TYPES)})")
    partial = float(parameters.get("partial_rotary_factor") or 1.0)
    if partial != 1.0 and kind != "proportional":
        raise ValueError(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported")
    base = float(parameters["rope_theta"])
    plain = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind == "default":
        return plain, 1.0
    if kind == "proportional":  # Gemma 4: only the first pairs turn, at the speeds they have in a whole head
        plain[int(partial * head_dim) // 2 :] = 0.0
        return plain, 1.0
    original = parameters.get("original_max_position_embeddings") or max_positions
    factor = parameters.get("factor")
    if kind == "yarn":
        factor = max_positions / original if factor is None else factor
        return _yarn(parameters, plain, base, head_dim, float(factor), original), _yarn_amplitude(parameters, factor)
    if factor is None:
        raise ValueError(f"rope type {kind!r} needs a factor")
    slow = plain / factor
    if kind == "linear":
        return slow, 1.0
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = original * plain / (2 * math.pi)  # full turns within the original context
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return slow * (1 - ramp) + plain * ramp, 1.0


def _yarn(
    parameters: Mapping[str, Any], plain: Tensor, base: float, head_dim: int, factor: float, original: int
) -> Tensor:
    def dimension(turns: float) -> float:
        """The dimension that makes this many full turns within the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp)


def _yarn_amplitude(parameters: Mapping[str, Any], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def sharpening(strength: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0

    every, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return sharpening(every) / sharpening(all_dim) if every and all_dim else sharpening(1.0)
