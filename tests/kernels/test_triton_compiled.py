"""Every kernel compiles for GPUs that are not there: registers, stack, shared memory and instructions of each.

A kernel is one of a wrapper's launches on the shapes of real models; `compiled.py` reads the machine code. What this
cannot see: races, speed, whether approximate hardware arithmetic is close enough.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from compiled import TENSOR_CORE, WIDE_LOAD, Machine, compile_launch, launches
from torch import Tensor

from dspark_kernels.triton import accept, attention, markov, noise, norms, rejection, rope, tiles

BF16, F16, F32, INT = torch.bfloat16, torch.float16, torch.float32, torch.int64
VOCAB, ROWS, DRAFTS = 151_936, 4, 7
MAX_REGISTERS = 255  # what an instruction can name; more would be spilled
# The rest differ from these little, and are left to CI.
QUICK = (90, 121)


def empty(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def attend(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = BF16, block: bool = False, **options: float
) -> Callable[[], object]:
    q, kv = empty(64, heads, head_dim, dtype=dtype), empty(64, kv_heads, head_dim, dtype=dtype)
    pages = empty(8, 16, kv_heads, head_dim, dtype=dtype)
    table, rows = empty(ROWS, 8, dtype=INT), empty(3, ROWS, dtype=INT)
    own = (kv, kv) if block else None
    return lambda: attention.attend(q, pages, pages, table, rows, scale=0.1, block=own, **options)  # type: ignore[arg-type]


def rotate(keep: bool) -> Callable[[], object]:
    q, kv, index = empty(4, 32, 128, dtype=BF16), empty(4, 8, 128, dtype=BF16), empty(4, dtype=INT)
    pages, weight = empty(8, 16, 8, 128, dtype=BF16), empty(128, dtype=BF16)
    store = (index, pages, pages) if keep else None
    table = empty(64, 2, 128, dtype=BF16)
    return lambda: rope.rotate_and_keep(q, kv, kv, (index, table), store, (weight, weight, 1e-6))


def samples(dtype: torch.dtype = F32) -> list[Tensor]:
    count = ROWS * (DRAFTS + 1)
    return [empty(count, VOCAB, dtype=dtype), empty(count), empty(count, dtype=INT), empty(count, dtype=INT)]


def accepts(mode: str, threshold: bool = False) -> Callable[[], object]:
    logits, temperature, seed, position = samples()
    rows = empty(ROWS, DRAFTS, dtype=INT), empty(ROWS, dtype=INT), empty(ROWS, dtype=INT)
    cut = temperature if threshold else None
    if mode == "coupled":
        return lambda: accept.accept_coupled(logits, *rows, temperature, seed, position, cut)
    draft = rejection.DraftLogits(empty(ROWS, DRAFTS, VOCAB), empty(ROWS, DRAFTS))
    return lambda: rejection.accept_rejection(logits, *rows, temperature, seed, position, draft, cut)


def drafts(keep: bool, some: bool = False) -> Callable[[], object]:
    w, index = empty(VOCAB, 256, dtype=BF16), empty(ROWS, dtype=INT)
    base, ids = empty(ROWS, DRAFTS, VOCAB), empty(VOCAB, dtype=INT) if some else None
    return lambda: markov.draft_block(base, w, w, index, empty(ROWS), index, index, keep=keep, ids=ids, programs=8)


@dataclass(frozen=True)
class Proof:
    """A wrapper's call and what its launches must look like."""

    call: Callable[[], object]
    kernels: tuple[str, ...]
    multiplies: bool = False  # its products must run on tensor cores
    exact: tuple[str, ...] = ()  # kernels whose every float operation must round on its own
    small: tuple[str, ...] = ()  # kernels that read a few numbers per program, for which wide loads mean nothing


PROOFS = {
    "attention": Proof(attend(32, 8, 128), ("attention_kernel",), multiplies=True),
    "attention of a block": Proof(attend(32, 8, 128, block=True), ("attention_kernel",), multiplies=True),
    "attention, narrow heads": Proof(attend(9, 3, 64, F16), ("attention_kernel",), multiplies=True),
    "attention, windowed and capped": Proof(
        attend(16, 8, 256, window=1024, softcap=50.0), ("attention_kernel",), multiplies=True
    ),
    "attention, widest heads": Proof(attend(16, 1, 512, block=True), ("attention_kernel",), multiplies=True),
    "attention, float32": Proof(attend(9, 3, 128, F32), ("attention_kernel",)),
    "norm": Proof(
        lambda: norms.rms_norm(empty(4, 5120, dtype=BF16), empty(5120, dtype=BF16), 1e-6, empty(4, 5120, dtype=BF16)),
        ("rms_norm_kernel",),
    ),
    "widest norm": Proof(
        lambda: norms.rms_norm(empty(4, norms.MAX_WIDTH), empty(norms.MAX_WIDTH), 1e-6), ("rms_norm_kernel",)
    ),
    "SwiGLU": Proof(lambda: norms.swiglu(empty(4, 2 * 12288, dtype=BF16)), ("swiglu_kernel",)),
    "rotation": Proof(rotate(True), ("rope_kernel",)),
    "rotation of a block": Proof(rotate(False), ("rope_kernel",)),
    "draw": Proof(
        lambda: noise.draw(*samples(BF16)),
        ("scan_kernel", "pick_kernel"),
        exact=("scan_kernel",),
        small=("pick_kernel",),
    ),
    "coupled acceptance": Proof(
        accepts("coupled", threshold=True),
        ("scan_kernel", "coupled_kernel"),
        exact=("scan_kernel",),
        small=("coupled_kernel",),
    ),
    "rejection": Proof(
        accepts("rejection"),
        ("mass_kernel", "rejection_kernel", "residual_kernel", "append_kernel"),
        small=("rejection_kernel", "append_kernel"),
    ),
    "Markov drafts": Proof(drafts(True), ("markov_kernel",), multiplies=True),
    "Markov drafts of some tokens": Proof(drafts(False, some=True), ("markov_kernel",), multiplies=True),
}
ARCHITECTURES = [
    pytest.param(arch, marks=() if arch in QUICK else pytest.mark.slow, id=f"sm_{arch}") for arch in tiles.ARCHITECTURES
]


@functools.cache
def machines(name: str, arch: int) -> dict[str, Machine]:
    """By kernel. Compiling takes seconds, so each launch is compiled once per session."""
    return {launch.kernel.__name__: compile_launch(launch, arch) for launch in launches(PROOFS[name].call, arch)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", PROOFS)
def test_a_kernel_fits_the_machine(name: str, arch: int) -> None:
    proof, found = PROOFS[name], machines(name, arch)
    assert tuple(found) == proof.kernels
    for kernel, machine in found.items():
        assert machine.spills == machine.local_bytes == machine.stack_bytes == 0, (kernel, machine.registers)
        assert machine.registers <= MAX_REGISTERS
        assert machine.shared_bytes <= tiles.SHARED_BYTES[arch]
        assert kernel in proof.small or machine.count(WIDE_LOAD) > 0, (kernel, machine.instructions)
        if proof.multiplies:
            assert machine.count(TENSOR_CORE) > 0, (kernel, machine.instructions)
        if kernel in proof.exact:
            assert not re.search(r"\.approx|\.ftz|\bfma\.|\bmad\.rn\.f", machine.ptx), kernel
            assert "div.rn.f32" in machine.ptx


def test_hopper_multiplies_in_warp_groups() -> None:
    """Tiles of 64 rows are there for that."""
    machine = machines("attention", 90)["attention_kernel"]
    assert any(name.startswith("HGMMA") for name in machine.instructions), machine.instructions


def test_a_launch_too_large_is_seen() -> None:
    """The limits can fail: a tile that does not fit gives more shared memory than there is, or spills."""
    (launch,) = launches(PROOFS["attention"].call, 121)
    options = {**launch.options, "M": 128, "N": 128, "num_stages": 3}
    machine = compile_launch(type(launch)(launch.kernel, launch.args, options), 121)
    assert machine.shared_bytes > tiles.SHARED_BYTES[121] or machine.spills > 0
