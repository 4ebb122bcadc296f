"""What steps free stays with the process. In processes of their own: malloc is set up once for all of one."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from dspark_serve.engine.heap import keep_freed_memory

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs a process whose memory glibc hands out"
)

FAULTS = """
import resource, sys
import torch
from dspark_serve.engine.heap import keep_freed_memory
kept = keep_freed_memory(torch.device(sys.argv[1]))
def step():
    return torch.ones(1 << 20), torch.ones(4 << 20)  # 4 MiB, then 16
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
before = faults()
for _ in range(20):
    step()
print(int(kept), faults() - before)
"""


def kept_and_faults(device="cpu", **environment):
    """Whether it says that memory is kept, and page faults of twenty steps that take and free 20 MiB."""
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    run = [sys.executable, "-c", FAULTS, device]
    done = subprocess.run(run, env=clean | environment, capture_output=True, text=True, check=True, timeout=120)
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


def test_a_step_finds_the_memory_of_the_last():
    kept, faults = kept_and_faults()
    assert kept
    _, otherwise = kept_and_faults(MALLOC_MMAP_THRESHOLD_="65536")
    assert 4 * faults < otherwise


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_MMAP_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}],
    ids=["variable", "tunable"],
)
def test_the_environment_has_the_last_word(environment):
    kept, faults = kept_and_faults(**environment)
    assert not kept
    assert faults > 200  # two blocks, twenty times: taken anew, of huge pages even


def test_a_gpu_leaves_the_heap_alone():
    assert keep_freed_memory(torch.device("cuda")) is False
