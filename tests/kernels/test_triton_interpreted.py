"""Runs the tests in interpreted/, each file in a process of its own: Triton interprets for good, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_kernels import triton

HERE = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in HERE.glob("test_*.py"))
SLOW = {"test_interpreted_engine.py"}


def run(file: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-q", "-p", "no:cacheprovider", "-n0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # The tests' own conftest would set up the server, which these know nothing of.
    command += [f"--confcutdir={HERE}", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[2])


@pytest.mark.timeout(600)  # for the whole file
@pytest.mark.parametrize("file", [pytest.param(f, marks=pytest.mark.slow if f in SLOW else ()) for f in FILES])
def test_interpreted(file: str) -> None:
    done = run(file)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "skipped" not in done.stdout, done.stdout


def test_every_kernel_file_has_interpreted_tests() -> None:
    kernels = {path.stem for path in Path(triton.__file__).parent.glob("[a-z]*.py")} - {"tiles"}
    tested = "".join((HERE / file).read_text(encoding="utf-8") for file in FILES)
    assert kernels == {name for name in kernels if f"{name}." in tested}


def test_a_failure_inside_is_a_failure_here() -> None:
    """That a crash by a forbidden page, or no test at all, does not pass."""
    assert run(FILES[0], "-k", "no such test").returncode != 0
