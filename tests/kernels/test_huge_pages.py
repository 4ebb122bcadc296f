"""Memory for weights, keys and values: what the system is asked for, and that nobody is given what another has."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from dspark_kernels import huge_pages, native
from dspark_kernels.packed import PackedWeight
from dspark_serve.cache.store import KVStore, LayerGeometry

SMAPS = Path("/proc/self/smaps")


def mapping(tensor):
    """Permissions and VmFlags of the mapping that a tensor lies in."""
    found = None
    for line in SMAPS.read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            first, last = (int(word, 16) for word in words[0].split("-"))
            found = words[1] if first <= tensor.data_ptr() < last else None
        elif words[0] == "VmFlags:" and found is not None:
            return found, words[1:]
    raise AssertionError("it lies in no mapping")


@pytest.mark.skipif(
    not SMAPS.exists() or "VmFlags" not in SMAPS.read_text() or not hasattr(mmap, "MADV_HUGEPAGE"),
    reason=f"needs a Linux that tells what mappings are like, not {sys.platform}",
)
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs a kernel with transparent huge pages"
)
def test_memory_is_private_and_huge_pages_are_asked_for():
    store = KVStore([LayerGeometry(2, 8)], 4, 16)
    for tensor in (huge_pages.empty(100), huge_pages.zeros((3, 5), torch.float16), store.keys[0], store.values[0]):
        permissions, flags = mapping(tensor)
        assert permissions == "rw-p"  # of shared memory the system makes no huge pages unless told by another setting
        assert "hg" in flags


def test_pieces_are_aligned_and_do_not_overlap():
    pieces = [huge_pages.empty(size) for size in (1, 64, 100, 33 << 20, 7, 40 << 20)]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % 64 == 0
        piece.fill_(number)
    assert [set(piece[:: max(len(piece) // 50, 1)].tolist()) for piece in pieces] == [{n} for n in range(6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_zeros_are_zero_and_of_the_shape(dtype):
    huge_pages.empty(1000).fill_(255)
    found = huge_pages.zeros((3, 0, 5), dtype), huge_pages.zeros((7, 11, 13), dtype)
    for tensor, shape in zip(found, ((3, 0, 5), (7, 11, 13)), strict=True):
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert not tensor.any()


def test_a_large_results_memory_is_used_again_once_no_tensor_lies_in_it():
    memory = huge_pages.Reused()
    first = memory.floats(32, 49152)
    at, part = first.data_ptr(), first[3:5]
    del first
    beside = memory.floats(32, 49152)  # `part` is still in use
    beside.fill_(1)
    part.fill_(2)
    assert beside.eq(1).all()
    assert beside.data_ptr() != at
    del part
    assert memory.floats(20, 49152).data_ptr() == at
    larger = memory.floats(64, 49152)
    larger.fill_(3)
    assert larger.shape == (64, 49152)
    assert larger.data_ptr() % (2 << 20) == 0
    at = larger.data_ptr()
    del larger
    assert memory.floats(32, 49152).data_ptr() == at  # what was large enough once is kept


@pytest.mark.parametrize("rows", [1, (huge_pages.Reused.largest >> 12) + 1])
def test_small_results_and_the_largest_have_memory_of_their_own(rows):
    memory = huge_pages.Reused()
    kept = memory.floats(1024, 1024)
    at = kept.data_ptr()
    del kept
    other = memory.floats(rows, 1024)
    assert other.shape == (rows, 1024)
    assert other.data_ptr() != at
    assert memory.floats(1024, 1024).data_ptr() == at


def test_products_of_large_results_do_not_overwrite_each_other():
    kernels = native.load()
    if kernels is None:
        pytest.skip("needs the C++ kernels: make kernels")
    x, weight = torch.randn(32, 16), torch.randn(16384, 16)
    packed = PackedWeight(kernels, weight, None, False)
    first = kernels.product(x, packed)
    expected = first.clone()
    second = kernels.product(-x, packed)
    assert torch.equal(first, expected)
    assert torch.equal(second, -expected)
    at = first.data_ptr()
    del first
    assert kernels.product(x, packed).data_ptr() == at
