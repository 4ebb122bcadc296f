"""Kernels on a real GPU: the cases and references of the interpreted tests, with tensors on the device.

Those tests put their tensors behind forbidden pages with `fenced`; here the same name puts them on the GPU.
"""

import importlib
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "kernels" / "interpreted"), str(Path(__file__).parent)]
sys.path += [str(TESTS.parent / "benchmarks"), str(TESTS / "training")]

from gpu_device import DEVICE, REHEARSAL, check_margins, there  # noqa: E402 - found on the path just made

if REHEARSAL:
    import repairs

    repairs.apply()

SHARED = ("test_interpreted_accept", "test_interpreted_attention", "test_interpreted_markov")


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch):
    """What the shared tests fence goes to the device, and what their attention returns comes back."""
    for name in SHARED:
        monkeypatch.setattr(importlib.import_module(name), "fenced", there)
    attention = importlib.import_module("test_interpreted_attention")
    run = attention.Case.run

    def run_there(self, **options):
        return run(self, **there(options)).to("cpu")

    monkeypatch.setattr(attention.Case, "run", run_there)
    if DEVICE.type == "cuda":  # ex2.approx is off by two units in the last place, where the CPU's exp2 is exact
        monkeypatch.setitem(attention.TOLERANCE, importlib.import_module("torch").float32, 1e-5)
    yield
    check_margins()
