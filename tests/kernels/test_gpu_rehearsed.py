"""The tests that need a GPU, without one: they pass in the interpreter, and outside it say what they need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
FILES = sorted(path.name for path in (TESTS / "gpu").glob("test_*.py"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # for a whole file


def run(*options: str, interpret: bool) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-n0", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("file", FILES)
def test_they_can_pass(file: str) -> None:
    """Smaller, on CPU tensors; with TRITON_INTERPRET=1 set by hand they run so too."""
    output = run(str(TESTS / "gpu" / file), interpret=True)
    assert "skipped" not in output
    assert re.search(r"\d+ passed", output)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, so nothing is skipped")
def test_they_say_what_they_need() -> None:
    output = run("-m", "gpu", str(TESTS / "gpu"), interpret=False)
    counted = re.search(r"^(\d+) skipped(, \d+ warnings?)? in ", output, re.MULTILINE)
    assert counted, output  # and nothing passed or was deselected
    assert int(counted[1]) > 50
    assert all("needs a CUDA GPU" in line for line in output.splitlines() if line.startswith("SKIPPED"))
