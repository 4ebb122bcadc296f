"""Tile sizes of the kernels, per architecture: the one table to change after a measurement.

Chosen by what the compiler reports (no spills, no stack, shared memory within limits) until a GPU has timed them. A
tile may depend on the architecture, the dtype and the width of a head, never on the batch: a row's bits depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ARCHITECTURES = (90, 100, 120, 121)  # compute capabilities the table was checked for
SHARED_BYTES = {90: 227 << 10, 100: 227 << 10, 120: 99 << 10, 121: 99 << 10}  # the most a block may have
_WITHOUT_GPU = 121  # whose tiles the interpreter proves


@dataclass(frozen=True)
class Tile:
    """How one program of a kernel is shaped. `rows` counts queries times query heads of one K/V head."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# (architecture from which it holds, bytes per element) -> widest head: tile. The first that is wide enough is taken,
# one for every length of a row: prefill, decode and verification have the same bits. Float32 has no tensor cores.
_ATTENTION = {
    (90, 2): {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 32, 8, 2), 512: Tile(32, 32, 8, 2)},
    (120, 2): {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 4, 2), 256: Tile(32, 32, 4, 2), 512: Tile(32, 16, 8, 1)},
    (90, 4): {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 4, 1), 512: Tile(16, 16, 8, 1)},
    (120, 4): {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 4, 1), 512: Tile(16, 16, 8, 1)},
}
# Markov sampler: (architecture from which it holds, whether columns have ids of their own) -> batch rows by tokens.
_MARKOV = {
    (90, False): Tile(16, 64, 8, 3),
    (120, False): Tile(16, 64, 8, 2),
    (90, True): Tile(16, 32, 4, 2),  # noise takes four times the registers
    (120, True): Tile(16, 32, 4, 2),
}


def architecture(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; on a CPU that of the tiles the tests prove."""
    if device.type != "cuda":
        return _WITHOUT_GPU
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def attention_tile(arch: int, width: int, element_bytes: int) -> Tile:
    """For heads of which the wider of key and value has `width` elements. ValueError: no tile is known to fit."""
    table = _ATTENTION.get((_family(arch), element_bytes), {})
    fitting = [widest for widest in table if widest >= width]
    if not fitting:
        raise ValueError(f"no attention tile holds heads of {width} elements of {element_bytes} bytes")
    return table[min(fitting)]


def markov_tile(arch: int, has_ids: bool) -> Tile:
    """`has_ids`: the logits are those of some tokens only."""
    return _MARKOV[_family(arch), has_ids]


def _family(arch: int) -> int:
    if arch < 90:
        raise ValueError(f"the kernels are made for compute capability 9.0 and later, not {arch / 10}")
    return 120 if arch >= 120 else 90
