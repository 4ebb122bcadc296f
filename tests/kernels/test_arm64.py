"""The kernels for arm64: compiled across, warnings being errors, and run on an emulated machine through driver.cpp.

What the emulated NEON kernels say must be what portable C++ says with vectors as wide and fused multiply-adds, bit for
bit. One output of a product is one chain of them in the order of the inputs, so there AVX2 and AVX-512 agree as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compiling import ROOT, Recipe, compiled

sys.path.insert(0, str(ROOT / "tests" / "models"))
from helpers import INSTRUCTION_SETS, load_kernels

ACROSS, EMULATOR, COMPILER = (shutil.which(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64", "g++"))
DRIVER = Path(__file__).with_name("driver.cpp")
STRICT = ["-Wall", "-Wextra", "-Werror"]

pytestmark = [
    pytest.mark.timeout(900),  # half a minute of compiling and emulating, where nobody else wants the cores
    pytest.mark.skipif(ACROSS is None, reason="needs a compiler for arm64 (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs an x86-64 machine to compare arm64 with"),
]

Results = dict[str, tuple[str, float]]  # by case: bits, largest error


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What setup.py builds on arm64, and the driver."""
    recipe, to = Recipe.of("aarch64"), tmp_path_factory.mktemp("arm64") / "driver"
    assert list(recipe.sets) == ["base"]
    assert ACROSS is not None
    return compiled(ACROSS, [*recipe.sources, DRIVER], [*recipe.sets["base"], *STRICT], to, ["-static"])


def test_it_compiles_without_a_warning(program: Path) -> None:
    assert program.read_bytes()[18:20] == b"\xb7\x00"  # an ELF file for AArch64


@pytest.fixture(scope="module")
def neon(program: Path) -> Results:
    if EMULATOR is None:
        pytest.skip("needs an emulator of arm64 (Debian: qemu-user)")
    return results(EMULATOR, str(program), isa="neon")


def results(*command: str, isa: str) -> Results:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == f"isa {isa}"
    return {name: (bits, float(error)) for name, bits, error in map(str.split, lines)}


def test_neon_computes_what_portable_code_does(neon: Results, tmp_path: Path) -> None:
    assert len(neon) == 38
    assert all(error < 1e-4 for _, error in neon.values()), neon
    recipe = Recipe.of("x86_64")
    # Fused as on arm64, but by the C library; -O1 because the compiler may not change a bit at any level.
    flags = [*recipe.sets["base"], *STRICT, "-O1", "-D__FP_FAST_FMAF=1"]
    if COMPILER is None:
        pytest.skip("needs g++")
    portable = compiled(COMPILER, [*recipe.sources, DRIVER], flags, tmp_path / "driver", [])
    assert results(str(portable), isa="portable") == neon


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_products_and_draws_have_the_same_bits_on_both_machines(neon: Results, name: str, tmp_path: Path) -> None:
    """With the installed libraries. Portable code here does not fuse: only its draws agree."""
    kernels = load_kernels(name)
    if COMPILER is None:
        pytest.skip("needs g++")
    flags = [*Recipe.of("x86_64").sets["base"], *STRICT, "-O1"]
    here = compiled(COMPILER, [DRIVER], flags, tmp_path / "driver", [str(kernels.library._name)])
    got = results(str(here), isa=kernels.isa)
    assert all(error < 1e-4 for _, error in got.values()), got
    same = ("draw", "filter") if name == "base" else ("draw", "filter", "product")
    assert {case: value for case, value in got.items() if case.startswith(same)} == {
        case: value for case, value in neon.items() if case.startswith(same)
    }
