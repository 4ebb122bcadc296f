"""A GGUF file's quantised matrices as codes with scales and minima, without rounding anything.

Layouts of the blocks: ggml's ggml-common.h. A matrix is kept this way only if it then dequantises to exactly the tensor
that Transformers read. Must not know: config, tokenizer, where the result goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark_kernels.blocks import BlockWeight

Bytes = NDArray[np.uint8]  # [blocks, bytes per block]
Floats = NDArray[np.float32]
Parts = tuple[NDArray[np.int8], Floats, Floats | None]  # codes [blocks, weights], scales and minima [blocks, groups]


def quantised_matrices(
    source: Path, architecture: str, heads: Mapping[str, int], like: Mapping[str, Tensor]
) -> dict[str, BlockWeight]:
    """By Hugging Face's names, the matrices of `like` (dequantised) that the file holds in blocks.

    heads: how many heads share the rows of "q_proj" and "k_proj", which llama.cpp reorders for some architectures.
    """
    import gguf
    from transformers.integrations.gguf.reader import GgufHeader  # gguf's own reader takes seconds over the vocabulary

    known = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    if not known:
        return {}
    header, data = GgufHeader.from_file(str(source)), np.memmap(source, mode="r", dtype=np.uint8)
    layers = 1 + max((int(part) for name in like for part in name.split(".") if part.isdigit()), default=0)
    names = gguf.get_tensor_name_map(known[0], layers)
    stored = {tensor.name: tensor for tensor in header.tensors}
    found = {}
    for name, want in like.items():
        tensor = stored.get(names.get_name(name, (".weight",)) or "")
        if tensor is None or want.dim() != 2:
            continue
        kind = gguf.GGMLQuantizationType(tensor.ggml_type).name
        if kind not in _LAYOUTS:
            continue
        start = header.data_start + tensor.offset
        weight = _read(kind, data[start : start + tensor.nbytes], want.shape)
        for candidate in _orders(weight, heads.get(name.split(".")[-2], 0)):
            if torch.equal(candidate.dequantize(), want):
                found[name] = candidate
                break
    return found


def _orders(weight: BlockWeight, heads: int) -> list[BlockWeight]:
    """The weight as it is, and with llama.cpp's interleaved halves of every head apart again."""
    rows = weight.shape[0]
    if not heads or rows % (2 * heads):
        return [weight]
    apart = torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()
    return [weight, weight.rows(apart)]


def _read(kind: str, data: Bytes, shape: torch.Size) -> BlockWeight:
    block_bytes, decode = _LAYOUTS[kind]
    codes, scales, minima = decode(np.ascontiguousarray(data).reshape(-1, block_bytes))
    if minima is None:
        minima = np.full_like(scales, -0.0)
    packed = torch.from_numpy(codes.reshape(shape[0], -1))
    if kind in _FOUR_BITS:
        pairs = packed.view(torch.uint8).view(shape[0], -1, 2)
        packed = pairs[..., 0] | pairs[..., 1] << 4
    return BlockWeight(packed, *(torch.from_numpy(part.reshape(shape[0], -1)) for part in (scales, minima)))


def _float16(blocks: Bytes, at: int, count: int = 1) -> Floats:
    """[blocks, count] numbers that start at byte `at`."""
    return blocks[:, at : at + 2 * count].copy().view(np.float16).astype(np.float32)


def _halves(packed: Bytes) -> NDArray[np.int8]:
    """[..., n] bytes -> [..., 2 n]: all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).view(np.int8)


def _q4_0(b: Bytes) -> Parts:
    scale = _float16(b, 0)
    return _halves(b[:, 2:]), scale, scale * -8


def _q4_1(b: Bytes) -> Parts:
    return _halves(b[:, 4:]), _float16(b, 0), _float16(b, 2)


def _q8_0(b: Bytes) -> Parts:
    return b[:, 2:].view(np.int8), _float16(b, 0), None


def _k_scales(b: Bytes) -> tuple[Floats, Floats]:
    """Q4_K and Q5_K: eight 6-bit scales and minima in twelve bytes, times one number each for the block."""
    low, middle, high = (b[:, 4 + 4 * i : 8 + 4 * i] for i in range(3))
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    return _float16(b, 0) * scales, -(_float16(b, 2) * minima)


def _k_halves(packed: Bytes) -> NDArray[np.int8]:
    """[blocks, 128]: 32 bytes hold two groups of 32."""
    return _halves(packed.reshape(len(packed), 4, 32)).reshape(len(packed), 256)


def _q4_k(b: Bytes) -> Parts:
    return _k_halves(b[:, 16:]), *_k_scales(b)


def _q5_k(b: Bytes) -> Parts:
    bits = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(b), 256)
    return _k_halves(b[:, 48:]) | bits.view(np.int8) << 4, *_k_scales(b)


def _q6_k(b: Bytes) -> Parts:
    low = _halves(b[:, :128].reshape(len(b), 2, 64)).reshape(len(b), 2, 4, 32)
    high = b[:, 128:192].reshape(len(b), 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low | high.view(np.int8) << 4) - np.int8(32)
    scales = _float16(b, 208) * b[:, 192:208].view(np.int8)
    return codes.reshape(len(b), 256), scales, None


_FOUR_BITS = frozenset({"Q4_0", "Q4_1", "Q4_K"})
_LAYOUTS: Mapping[str, tuple[int, Callable[[Bytes], Parts]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
}
