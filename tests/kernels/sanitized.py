"""A pytest plugin: the tests of this process use the kernels in the directory $SANITIZED_KERNELS and no others."""

import os
from pathlib import Path

import dspark_serve  # noqa: F401 - before torch
from dspark_kernels import native

native.__file__ = str(Path(os.environ["SANITIZED_KERNELS"]) / "native.py")
