"""Every set of C++ kernels that this machine can run, and torch's number of threads put back."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dspark_kernels.native import Kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from helpers import INSTRUCTION_SETS, load_kernels


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_kernels(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
