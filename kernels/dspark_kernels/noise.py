"""Addressed noise: (seed, position, token, stream) -> bits, uniforms, Gumbel values; equal bits in numpy and torch.

The numpy functions are the specification, the torch functions the fast path. Must not know: requests, logits,
sampling parameters. Never compile or fuse the torch path: every float operation here has to round on its own.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Streams: independent noise for one (seed, position).
GUMBEL: Final = 0  # draws of the target; in coupled mode the drafter's too
ACCEPT: Final = 1  # uniforms of the rejection rule
RESIDUAL: Final = 2  # residual and bonus draws in rejection mode
DRAFT: Final = 3  # a drafter's own draws in rejection mode

# The exact largest and smallest value gumbel() can take: those of the ends of its 23-bit grid.
GUMBEL_MAX: Final = 16.63553237915039
GUMBEL_MIN: Final = -2.8115408420562744

LANES: Final = 4  # tokens served by one Philox call

_MULTIPLIER_0: Final = 0xD2511F53
_MULTIPLIER_1: Final = 0xCD9E8D57
_WEYL_0: Final = 0x9E3779B9
_WEYL_1: Final = 0xBB67AE85
_MASK: Final = 0xFFFFFFFF
_ROUNDS: Final = 10

# Cephes logf: polynomial on [sqrt(1/2) - 1, sqrt(2) - 1], and ln 2 split in a short and a small part.
_LOG_COEFFICIENTS: Final = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LN2_HIGH: Final = 0.693359375
_LN2_LOW: Final = -2.12194440e-4
_SQRT_HALF_BITS: Final = 0x3F3504F3
_MANTISSA: Final = 0x007FFFFF

_NUMPY_CALLS: Final = 1 << 12  # so few addresses on the CPU are faster in numpy, whose operations start sooner
_CHUNK: Final = 1 << 16  # Philox calls per pass of the torch path: temporaries stay within a CPU's caches
_LARGE_CHUNK: Final = 1 << 22  # elsewhere, where starting operations is what costs

Integers: TypeAlias = int | npt.NDArray[Any]
Words: TypeAlias = npt.NDArray[np.uint32]
Floats: TypeAlias = npt.NDArray[np.float32]


# The specification, in numpy.


def philox_np(counter: tuple[Integers, ...], key: tuple[Integers, ...]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 (Salmon et al. 2011). `counter`: four, `key`: two broadcastable words, each taken mod 2^32."""
    u64 = np.uint64
    c0, c1, c2, c3 = (_words_np(word) for word in counter)
    k0, k1 = (_words_np(word) for word in key)
    for _ in range(_ROUNDS):
        product_0, product_1 = c0 * u64(_MULTIPLIER_0), c2 * u64(_MULTIPLIER_1)  # 32 x 32 -> 64 bits: exact
        c0, c2 = (product_1 >> u64(32)) ^ c1 ^ k0, (product_0 >> u64(32)) ^ c3 ^ k1
        c1, c3 = product_1 & u64(_MASK), product_0 & u64(_MASK)
        k0, k1 = (k0 + u64(_WEYL_0)) & u64(_MASK), (k1 + u64(_WEYL_1)) & u64(_MASK)
    a, b, c, d = (np.asarray(word).astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))
    return a, b, c, d


def bits_np(seed: Integers, position: Integers, token: Integers, stream: int = GUMBEL) -> Words:
    """The 32 random bits at an address. Arguments broadcast; seeds mod 2^64, positions and token // 4 mod 2^32."""
    seed, position, token = (_int64_np(x) for x in (seed, position, token))
    outputs = philox_np((token >> 2, position, stream, 0), (seed, seed >> 32))
    lane = np.broadcast_to(token & 3, outputs[0].shape)
    return np.asarray(np.choose(lane, outputs), dtype=np.uint32)


def uniform_np(seed: Integers, position: Integers, stream: int) -> Floats:
    """Uniforms of the open interval (0, 1): the 2^23 odd multiples of 2^-24, each equally likely."""
    return _grid_uniform_np(bits_np(seed, position, 0, stream) >> np.uint32(9))


def gumbel_np(seed: Integers, position: Integers, token: Integers, stream: int = GUMBEL) -> Floats:
    """Standard Gumbel noise -log(-log u) at an address, within [GUMBEL_MIN, GUMBEL_MAX]."""
    return grid_gumbel_np(bits_np(seed, position, token, stream) >> np.uint32(9))


def grid_gumbel_np(index: npt.NDArray[Any]) -> Floats:
    """The Gumbel value of a uniform's grid index in [0, 2^23)."""
    return -log_np(-log_np(_grid_uniform_np(index)))


def log_np(x: Floats) -> Floats:
    """Natural logarithm of normal positive float32 (Cephes logf) from bit operations and single IEEE operations only.

    Unlike a library's log it has the same bits everywhere; relative error about 1e-7.
    """
    f32 = np.float32
    shifted = x.view(np.int32) - np.int32(_SQRT_HALF_BITS)
    exponent = (shifted >> 23).astype(f32)
    f = ((shifted & np.int32(_MANTISSA)) + np.int32(_SQRT_HALF_BITS)).view(f32) - f32(1)  # mantissa - 1
    y = f * f32(_LOG_COEFFICIENTS[0]) + f32(_LOG_COEFFICIENTS[1])
    for coefficient in _LOG_COEFFICIENTS[2:]:
        y = y * f + f32(coefficient)
    square = f * f
    y = f * square * y
    y = y + exponent * f32(_LN2_LOW)
    y = y - f32(0.5) * square
    return np.asarray((f + y) + exponent * f32(_LN2_HIGH), dtype=f32)


def _grid_uniform_np(index: npt.NDArray[Any]) -> Floats:
    return np.asarray((index.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23))


def _int64_np(x: Integers) -> npt.NDArray[np.int64]:
    if isinstance(x, int):  # python integers of any size, and unsigned 64-bit seeds, wrap to two's complement
        x = np.asarray(x & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    return np.asarray(x).astype(np.int64)


def _words_np(x: Integers) -> npt.NDArray[np.uint64]:
    return np.asarray(_int64_np(x).astype(np.uint64) & np.uint64(_MASK))


# The fast path, in torch: the same bits on any device.


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """philox_np on int64 tensors holding words in [0, 2^32), results likewise. Overwrites its arguments.

    The four counter words have the shape of the results, into which the two key words broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    spare_0, spare_1 = torch.empty_like(c0), torch.empty_like(c0)  # six buffers in rotation: no allocation per round
    for _ in range(_ROUNDS):
        # int64 products wrap mod 2^64, so all 64 bits are right. A low word keeps its product's high half as
        # garbage until the one mask per word and round, after the exclusive ors.
        product_0 = torch.mul(c0, _MULTIPLIER_0, out=spare_0)
        product_1 = torch.mul(c2, _MULTIPLIER_1, out=spare_1)
        torch.bitwise_right_shift(product_1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(product_0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3, spare_0, spare_1 = product_1, product_0, c3, c1
        k0.add_(_WEYL_0)  # ten steps stay far below 2^63, and the masks above cut the carry
        k1.add_(_WEYL_1)
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def bits(seed: Tensor, position: Tensor, token: Tensor, stream: int = GUMBEL) -> Tensor:
    """bits_np on int64 tensors of any broadcastable shapes -> int64 in [0, 2^32)."""
    token = token.expand_as(seed ^ position ^ token)  # broadcast all three
    outputs = _philox_at(seed, position, token >> 2, stream)
    return torch.stack(outputs, dim=-1).gather(-1, (token & 3).unsqueeze(-1)).squeeze(-1)


def uniform(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """uniform_np on int64 tensors of broadcastable shapes -> float32."""
    group = torch.zeros_like(seed ^ position)  # broadcast both
    return _grid_uniform(_philox_at(seed, position, group, stream)[0].bitwise_right_shift_(9))


def gumbel(seed: Tensor, position: Tensor, token: Tensor, stream: int = GUMBEL) -> Tensor:
    """gumbel_np on int64 tensors of any broadcastable shapes -> float32, the same bits."""
    if seed.device.type == "cpu" and max(seed.numel(), position.numel(), token.numel()) <= _NUMPY_CALLS:
        return torch.from_numpy(gumbel_np(seed.numpy(), position.numpy(), token.numpy(), stream))
    return grid_gumbel(bits(seed, position, token, stream).bitwise_right_shift_(9))


def grid_runs(seed: Tensor, position: Tensor, first: Tensor, width: int, stream: int = GUMBEL) -> Tensor:
    """Uniforms of runs of consecutive tokens as grid indices: run i covers tokens [first[i], first[i] + width).

    `seed`, `position`, `first`: [runs] int64; `first` must hold multiples of LANES, so that four tokens share a call.
    -> [runs, width] int32 in [0, 2^23); grid_gumbel turns an index into noise.
    """
    runs, groups = first.shape[0], -(-width // LANES)
    out = torch.empty((runs, groups, LANES), dtype=torch.int32, device=first.device)
    offsets = torch.arange(groups, device=first.device)  # [groups]
    step = max(1, (_CHUNK if first.device.type == "cpu" else _LARGE_CHUNK) // max(1, groups))
    for start in range(0, runs, step):
        part = slice(start, start + step)
        group = (first[part] >> 2).unsqueeze(1) + offsets  # [part, groups]
        outputs = _philox_at(seed[part].unsqueeze(1), position[part].unsqueeze(1), group, stream)
        for lane, words in enumerate(outputs):
            out[part, :, lane] = words.bitwise_right_shift_(9)
    return out.view(runs, groups * LANES)[:, :width]


def grid_gumbel(index: Tensor) -> Tensor:
    """The Gumbel value of a grid index, float32. It never falls as the index grows (tested on the whole grid)."""
    if index.device.type == "cpu" and index.numel() <= _NUMPY_CALLS:
        return torch.from_numpy(grid_gumbel_np(index.numpy()))
    return log(log(_grid_uniform(index)).neg_()).neg_()


def grid_floor(value: Tensor) -> Tensor:
    """A grid index below which every Gumbel value is less than `value`, float32: close to the least such, never above.

    For pruning before any logarithm is taken: 1e-5 and two steps cover the errors of both logarithms.
    """
    uniform = (value.double() - 1e-5).neg_().exp_().neg_().exp_()
    return uniform.mul_(2.0**23).sub_(2.0).to(torch.int32)


def gumbel_dense(seed: Tensor, position: Tensor, vocab: int, stream: int = GUMBEL) -> Tensor:
    """Noise of a whole vocabulary per sample. `seed`, `position`: [samples] int64 -> [samples, vocab] float32."""
    return grid_gumbel(grid_runs(seed, position, torch.zeros_like(seed), vocab, stream))


def log(x: Tensor) -> Tensor:
    """log_np on a float32 tensor. No addcmul, no `alpha`: those may fuse a product into a sum and round once."""
    shifted = x.contiguous().view(torch.int32) - _SQRT_HALF_BITS
    exponent = (shifted >> 23).float()
    f = shifted.bitwise_and_(_MANTISSA).add_(_SQRT_HALF_BITS).view(torch.float32).sub_(1.0)
    y = (f * _LOG_COEFFICIENTS[0]).add_(_LOG_COEFFICIENTS[1])
    for coefficient in _LOG_COEFFICIENTS[2:]:
        y.mul_(f).add_(coefficient)
    square = f * f
    y.mul_(f * square)
    y.add_(exponent * _LN2_LOW)
    y.sub_(square.mul_(0.5))
    return y.add_(f).add_(exponent.mul_(_LN2_HIGH))


def _philox_at(seed: Tensor, position: Tensor, group: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox outputs at an address; `seed` and `position` broadcast into the shape of `group` (token // LANES)."""
    group = group & _MASK
    position = (position & _MASK).expand_as(group).contiguous()
    counter = (group, position, torch.full_like(group, stream), torch.zeros_like(group))
    return philox(counter, (seed & _MASK, (seed >> 32) & _MASK))


def _grid_uniform(index: Tensor) -> Tensor:
    return index.float().add_(0.5).mul_(2.0**-23)  # odd multiples of 2^-24: exact, never 0 nor 1
