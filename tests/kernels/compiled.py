"""Compiles the very launches a wrapper makes, for GPUs that are not there, and reads the machine code.

A wrapper is called with CPU tensors while Triton's launch is replaced by a recorder; each recorded launch is then
specialised as Triton would and compiled with the ptxas in its wheel. Must not know: what a kernel computes.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from dspark_kernels.triton import tiles

TENSOR_CORE = re.compile(r"(HMMA|HGMMA|UTCHMMA|QMMA|OMMA)\b")
WIDE_LOAD = re.compile(r"(LDG\.E|LDGSTS\.E)(\.\w+)*\.128|UTMALDG")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)")


@dataclass(frozen=True)
class Launch:
    """One kernel as a wrapper started it."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What became of a launch on one architecture."""

    registers: int
    stack_bytes: int
    local_bytes: int
    spills: int  # instructions that access local memory
    shared_bytes: int
    instructions: Counter[str]
    ptx: str

    def count(self, pattern: re.Pattern[str]) -> int:
        return sum(count for name, count in self.instructions.items() if pattern.match(name))


def launches(call: Callable[[], object], arch: int) -> list[Launch]:
    """What `call` would launch on a GPU of that architecture."""
    recorded: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert len(grid) <= 3, grid
        assert all(size > 0 for size in grid), grid
        recorded.append(Launch(self, args, options))

    with _replaced(JITFunction, "run", record), _replaced(tiles, "architecture", lambda device: arch):
        call()
    return recorded


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def compile_launch(launch: Launch, arch: int) -> Machine:
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, debug=False, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    usage = _tool(knobs.nvidia.cuobjdump.path, compiled.asm["cubin"], "-res-usage")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    listing = _tool(knobs.nvidia.nvdisasm.path, compiled.asm["cubin"], "-c")
    names = Counter(match[1] for line in listing.splitlines() if (match := _INSTRUCTION.match(line)))
    return Machine(
        registers=found["REG"],
        stack_bytes=found["STACK"],
        local_bytes=found["LOCAL"],
        spills=sum(count for name, count in names.items() if name.startswith(("STL", "LDL"))),
        shared_bytes=compiled.metadata.shared,
        instructions=names,
        ptx=compiled.asm["ptx"],
    )


def _tool(path: str, cubin: bytes, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, *flags, file.name], capture_output=True, text=True, check=True)
    return done.stdout
