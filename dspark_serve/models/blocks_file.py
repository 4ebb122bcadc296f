"""Quantised matrices in a safetensors file of their own, which a model directory may have beside its float weights.

Must not know: where they come from, which model they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from dspark_kernels.blocks import BlockWeight

BLOCKS_FILE = "blocks.safetensors"
_PARTS = ("codes", "scales", "minima")


def write_blocks(weights: Mapping[str, BlockWeight], path: Path) -> None:
    """Nothing to write leaves no file."""
    if weights:
        save_file({f"{name}.{part}": getattr(w, part) for name, w in weights.items() for part in _PARTS}, path)


def read_blocks(path: Path) -> dict[str, BlockWeight]:
    """By name, memory-mapped; none without a file. Raises SafetensorError or ValueError when it is damaged."""
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt", device="cpu") as handle:
        names = sorted({key.rpartition(".")[0] for key in handle.keys()})  # noqa: SIM118 - not a mapping
        return {name: BlockWeight(*(handle.get_tensor(f"{name}.{part}") for part in _PARTS)) for name in names}
