"""What steps free stays with the process. In processes of their own: malloc is set up once for all of one."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs memory that glibc hands out")

# A step takes 69 MiB, more than glibc keeps on its own and than one heap of a thread holds, and frees the last first:
# nothing lies above that would hold the rest. No tensors: what torch allocates beside them may come to lie there.
FAULTS = """
import ctypes, resource, sys, threading
import torch
from dspark_serve.engine.heap import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
SIZES = [mib << 20 for mib in (16, 1, 16, 16, 4, 16)]
def step():
    blocks = [libc.malloc(size) for size in SIZES]
    for block, size in zip(blocks, SIZES):
        libc.memset(block, 1, size)
    for block in reversed(blocks):
        libc.free(block)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def steps():
    for _ in range(10):
        step()
    before = faults()
    for _ in range(20):
        step()
    print(int(kept), faults() - before)
kept = keep_freed_memory(torch.device(sys.argv[1]))
if sys.argv[2] == "main":
    steps()
else:
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
"""
FEW = 20 * 10  # 20 steps of 69 MiB are 353280 pages, or 700 huge ones


def kept_and_faults(device="cpu", thread="main", **environment):
    """Whether it says that memory is kept, and page faults of twenty steps."""
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    run = [sys.executable, "-c", FAULTS, device, thread]
    done = subprocess.run(run, env=clean | environment, capture_output=True, text=True, check=True, timeout=120)
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


@pytest.mark.parametrize("thread", ["main", "another"])  # whose heaps glibc gives back by rules of their own
def test_a_step_finds_the_memory_of_the_last(thread):
    kept, faults = kept_and_faults(thread=thread)
    assert kept
    assert faults < FEW


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=65536"}],
    ids=["variable", "tunable"],
)
def test_the_environment_has_the_last_word(environment):
    kept, faults = kept_and_faults(**environment)
    assert not kept
    assert faults > FEW


def test_a_gpu_leaves_the_heap_alone():
    kept, faults = kept_and_faults("cuda")
    assert not kept
    assert faults > FEW
