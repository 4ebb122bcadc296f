"""The kernels' tests once more under AddressSanitizer and UndefinedBehaviorSanitizer, torch's memory included.

A build of its own, which ends the process at the first fault: a subprocess runs the tests, and must come to their end.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compiling import ROOT, Recipe, compiled

sys.path.insert(0, str(ROOT / "tests" / "models"))
from helpers import INSTRUCTION_SETS

FLAGS = "-O1 -g1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer"
pytestmark = pytest.mark.timeout(1200)  # compiling and sanitized tests: many times as long on a busy machine
TESTS = [
    *("tests/kernels/test_native.py", "tests/kernels/test_blocks.py", "tests/kernels/test_kernel_edges.py"),
    *("tests/models/test_attention.py", "tests/drafters/test_native_head.py", "tests/kernels/test_filter.py"),
]
LEFT_OUT = "not torch and not 49152 and not 1030"  # without kernels, or long and of no other code
COMPILER = shutil.which("g++")

FAULTS = """
import ctypes, os, sys
import torch
from dspark_kernels import native
library = native.load(sys.argv[1]).library
x = torch.ones(100)
at, f = x.data_ptr(), ctypes.c_float
faults = {
    "read": lambda: library.planted_read(ctypes.c_void_p(at), ctypes.c_int64(100)),
    "write": lambda: library.planted_write(ctypes.c_void_p(at), ctypes.c_int64(-1)),
    "overflow": lambda: library.planted_overflow(2**31 - 1),
    "cast": lambda: library.planted_cast(f(float("nan"))),
    "shift": lambda: library.planted_shift(40),
    "argmax": lambda: library.dspark_argmax(at, torch.zeros(1, dtype=torch.int64).data_ptr(), 1, 101, 1),
    "none": lambda: library.planted_overflow(1) + library.planted_shift(3) + library.planted_cast(f(2.5)),
}
for name, fault in faults.items():
    sys.stderr.flush()
    child = os.fork()
    if not child:
        fault()
        os._exit(0)
    print(f"== {name}: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", file=sys.stderr, flush=True)
"""


@functools.cache
def runtime(name: str) -> str:
    """Where the compiler keeps a library; skips where it has none."""
    assert COMPILER is not None
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    if not os.path.isabs(found.stdout.strip()):
        pytest.skip(f"needs {name}, which comes with g++ (Debian: libgcc-dev)")
    return found.stdout.strip()


def run(arguments: list[str], kernels: Path) -> subprocess.CompletedProcess[str]:
    """Python with the sanitizers' runtime, whose memory torch then uses."""
    environment = {
        **os.environ,
        # libstdc++ too: the sanitizer looks for what throws exceptions, and Python itself has no such thing.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they have until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SANITIZED_KERNELS": str(kernels),
        "OMP_NUM_THREADS": "1",  # the tests of threads set their own number
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # this run has its own workers and options
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def machine() -> str:
    if COMPILER is None or os.uname().sysname != "Linux":
        pytest.skip("needs g++ on Linux: the sanitizers come with it and are preloaded")
    runtime("libasan.so")
    return os.uname().machine


def build(machine: str, names: list[str], where: Path) -> Path:
    assert COMPILER is not None
    recipe = Recipe.of(machine)
    sources = [*recipe.sources, Path(__file__).with_name("planted.cpp")]
    for name in names:
        flags = [*recipe.sets[name], *FLAGS.split()]
        compiled(COMPILER, sources, flags, where / f"_cpu_{name}.so", ["-shared"])
    return where


def check(kernels: Path, names: list[str]) -> None:
    """The tests pass, for these instruction sets and no others."""
    options = ["-p", "tests.kernels.sanitized", "-q", "-s", "-n", "0", "-rs", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    done = run(["-m", "pytest", *options, *TESTS], kernels)
    said = done.stdout[-3000:] + done.stderr[-8000:]
    assert done.returncode == 0, said
    assert "AddressSanitizer" not in said
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) > 100 * len(names), said
    skipped = set(re.findall(r"the (\w+) kernels are not built", said))
    assert skipped == set(INSTRUCTION_SETS) - set(names)


@pytest.mark.slow
def test_kernels_keep_to_their_memory_and_to_the_language(machine: str, tmp_path: Path) -> None:
    """Portable and widest; and the sanitizers see faults that are planted, in the same build, on torch's memory."""
    names = list(dict.fromkeys([INSTRUCTION_SETS[0], INSTRUCTION_SETS[-1]]))
    kernels = build(machine, names, tmp_path)
    faults = run(["-c", "import tests.kernels.sanitized\n" + FAULTS, names[-1]], kernels)
    reports = dict(re.findall(r"== (\w+): (-?\d+)", faults.stderr))
    assert {name: code != "0" for name, code in reports.items()} == {
        **dict.fromkeys(["read", "write", "overflow", "cast", "shift", "argmax"], True),
        "none": False,
    }, faults.stderr[-4000:]
    assert faults.stderr.count("heap-buffer-overflow on address") == 3
    for what in ("signed integer overflow", "outside the range of representable values", "shift exponent 40"):
        assert what in faults.stderr
    check(kernels, names)


@pytest.mark.slow
@pytest.mark.skipif(len(INSTRUCTION_SETS) < 3, reason="needs a CPU with AVX-512, on which AVX2 is neither end")
def test_so_does_avx2(machine: str, tmp_path: Path) -> None:
    check(build(machine, ["avx2"], tmp_path), ["avx2"])
