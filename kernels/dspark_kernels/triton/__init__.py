"""Triton kernels for NVIDIA GPUs, a file per family. This file imports without Triton; the others need it.

Every result is row-invariant: tile shapes and the order of sums follow from the model and the architecture, never from
the batch. What can be proved without a GPU is proved by tests/kernels/triton: interpreted on CPU tensors, and compiled.
"""

from __future__ import annotations

import importlib.util


def available() -> bool:
    """Whether Triton is installed; not whether there is a GPU to run on."""
    return importlib.util.find_spec("triton") is not None
