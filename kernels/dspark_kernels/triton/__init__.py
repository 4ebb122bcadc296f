"""Triton kernels for NVIDIA GPUs, a file per family. This file imports without Triton; the others need it.

Every result is row-invariant: tile shapes and the order of sums follow from the model and the architecture, never from
the batch. What can be proved without a GPU is proved by tests/kernels/triton: interpreted on CPU tensors, and compiled.
"""

from __future__ import annotations

import importlib.util

import torch

OLDEST = (9, 0)  # compute capability that tiles.py has shapes for


def available() -> bool:
    """Whether Triton is installed; not whether there is a GPU to run on."""
    return importlib.util.find_spec("triton") is not None


def obstacle(device: torch.device) -> str | None:
    """What keeps the kernels from running on tensors of `device`, and what to do about it; None: nothing does."""
    if not available():
        return "Triton is not installed: install the [gpu] extra"
    if device.type == "cpu":
        import triton

        interpreted = bool(triton.knobs.runtime.interpret)
        return None if interpreted else "a GPU is needed, or TRITON_INTERPRET=1 to interpret them on a CPU, very slowly"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"they are made for NVIDIA GPUs, not for {device}"
    if device.index:  # Triton launches on a thread's current device, and every thread begins with the first
        return f"they run on the first GPU torch sees: choose yours by CUDA_VISIBLE_DEVICES, not as {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        have, need = (".".join(map(str, pair)) for pair in (capability, OLDEST))
        return f"they need compute capability {need}, and {torch.cuda.get_device_name(device)} has {have}"
    return None
