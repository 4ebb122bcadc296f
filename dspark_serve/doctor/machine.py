"""The machine as the doctor sees it: `look` gathers facts, the checks judge them. No model is needed.

Must not know: models, heads, requests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from dspark_kernels import native, triton
from dspark_serve.doctor.findings import Finding
from dspark_serve.engine.remembered import device_name
from dspark_serve.models.catalog import cache_dir

_GIB = 1 << 30
_LOOK_S = 0.5  # how long other processes are watched
_CGROUP = Path("/sys/fs/cgroup")
_COMPILERS = ("g++", "clang++", "c++")
_REINSTALL = "pip install --force-reinstall --no-deps ."
_LITTLE_DISK_GIB, _LITTLE_MEMORY_GIB = 2.0, 1.0
_BUSY_SHARE, _STOLEN_SHARE = 0.2, 0.05  # of the cores: from here on measured times are off


@dataclass(frozen=True)
class Machine:
    """Facts. Memory and disk in GiB; a share is of all cores."""

    processor: str  # with the instruction set torch chose
    architecture: str  # x86_64, aarch64, ...
    capability: str  # torch's word for the instruction set: AVX512, AVX2, DEFAULT, ...
    compiler: str | None
    isa: str | None  # of the C++ kernels that were loaded; None: there are none
    cores: int  # that this process may use
    physical_cores: int
    threads: int  # torch's
    others_busy: float  # cores' worth of work that other processes did while we looked
    busiest: str | None  # which of them did most
    stolen_share: float  # of the time, taken by the hypervisor for other guests
    memory_gib: float
    available_gib: float
    container_gib: float | None  # what a container may use at most
    cache: str
    cache_writable: bool
    disk_gib: float  # free where the cache is
    torch: str
    torch_cuda: str | None  # the CUDA this torch was built for
    gpu: str | None  # that torch sees
    gpu_gib: float
    driver: str | None  # of NVIDIA, asked of nvidia-smi
    triton: str | None
    triton_obstacle: str | None  # what keeps its kernels from that GPU


def look() -> Machine:
    """About half a second, in which the other processes are watched."""
    others_busy, busiest, stolen_share = _watch(_LOOK_S)
    memory, cache = psutil.virtual_memory(), cache_dir()
    kernels, gpu = native.load(), torch.cuda.is_available()
    place = torch.device("cuda" if gpu else "cpu")
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return Machine(
        processor=device_name(torch.device("cpu")),
        architecture=os.uname().machine,
        capability=torch.backends.cpu.get_cpu_capability(),
        compiler=next(filter(None, map(shutil.which, _COMPILERS)), None),
        isa=None if kernels is None else kernels.isa,
        cores=usable_cores(),
        physical_cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        threads=torch.get_num_threads(),
        others_busy=others_busy,
        busiest=busiest,
        stolen_share=stolen_share,
        memory_gib=memory.total / _GIB,
        available_gib=memory.available / _GIB,
        container_gib=_container_gib(),
        cache=str(cache),
        cache_writable=os.access(existing, os.W_OK | os.X_OK) and existing.is_dir(),
        disk_gib=shutil.disk_usage(existing).free / _GIB,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        gpu=device_name(place) if gpu else None,
        gpu_gib=torch.cuda.mem_get_info()[1] / _GIB if gpu else 0.0,
        driver=_driver(),
        triton=_version("triton"),
        triton_obstacle=triton.obstacle(place) if gpu else None,
    )


def judge(machine: Machine, device: str = "auto") -> Iterator[Finding]:
    """One finding per check. `device`: what the configuration asks for."""
    yield _processor(machine)
    yield _kernels(machine)
    yield _threads(machine)
    yield _load(machine)
    yield _memory(machine)
    yield _disk(machine)
    yield _gpu(machine, device)


def _processor(machine: Machine) -> Finding:
    if machine.architecture in ("x86_64", "AMD64") and not machine.capability.startswith(("AVX2", "AVX512")):
        found = f"{machine.processor}: without AVX2 every product is several times slower"
        limited = os.environ.get("ATEN_CPU_CAPABILITY")
        advice = "in a virtual machine, pass the host's processor through; else use a newer one"
        return Finding("processor", "warn", found, f"unset ATEN_CPU_CAPABILITY={limited}" if limited else advice)
    return Finding("processor", "ok", machine.processor)


def _kernels(machine: Machine) -> Finding:
    if machine.isa is None:
        found = "the C++ kernels are not there: torch serves instead, slower, and weights are widened to float32"
        install = "" if machine.compiler else "install a C++ compiler (g++ or clang), then "
        return Finding("kernels", "warn", found, f"{install}build them: {_REINSTALL} in the checkout")
    built = f"the C++ kernels are loaded, for {machine.isa}"
    if machine.isa == "portable":
        found = f"{built}: nothing of this processor's vector units is used"
        return Finding("kernels", "warn", found, f"where the processor has AVX2 or AVX-512, rebuild: {_REINSTALL}")
    best = machine.capability.lower().partition("_")[0]
    if machine.isa != best and best in ("avx2", "avx512"):
        return Finding("kernels", "warn", f"{built}, and this processor has {best}", f"rebuild: {_REINSTALL}")
    compiler = machine.compiler or "no compiler here, and none is needed"
    return Finding("kernels", "ok", f"{built} ({compiler})")


def _threads(machine: Machine) -> Finding:
    best = min(machine.physical_cores, machine.cores)
    advice = f"unset OMP_NUM_THREADS, or serve with --threads {best}"
    if machine.threads > machine.cores:
        found = f"torch's {machine.threads} threads have {machine.cores} cores: they wait for each other"
        return Finding("threads", "warn", found, advice)
    found = f"torch computes on {machine.threads} of {machine.cores} usable cores"
    if machine.threads < best:
        return Finding("threads", "warn", f"{found}: the others stay idle", advice)
    return Finding("threads", "ok", found)


def _load(machine: Machine) -> Finding:
    if machine.stolen_share > _STOLEN_SHARE:
        found = f"the hypervisor gives {machine.stolen_share:.0%} of the time to other guests"
        return Finding("load", "warn", f"{found}: speed will vary", "use a machine with cores of its own")
    if machine.others_busy > _BUSY_SHARE * machine.cores:
        who = f", {machine.busiest} most of all" if machine.busiest else ""
        found = f"other processes use {machine.others_busy:.1f} cores{who}: steps are slower, and measured as such"
        return Finding("load", "warn", found, "end them, or serve with fewer --threads")
    return Finding("load", "ok", "no other process takes much of the processor")


def _memory(machine: Machine) -> Finding:
    found = f"{machine.available_gib:.1f} of {machine.memory_gib:.1f} GiB available"
    limit = machine.container_gib
    if limit is not None and limit < machine.memory_gib:
        found += f"; this container may use {limit:.1f} GiB, which the K/V pool's size does not go by"
        return Finding("memory", "warn", found, "set the pool's size with --kv-cache-gib")
    if machine.available_gib < _LITTLE_MEMORY_GIB:
        return Finding("memory", "warn", f"{found}: enough for the smallest models only", "end other processes")
    return Finding("memory", "ok", found)


def _disk(machine: Machine) -> Finding:
    found = f"{machine.disk_gib:.1f} GiB free for the cache {machine.cache}"
    if not machine.cache_writable:
        found = f"the cache {machine.cache} cannot be written: no model can be fetched or converted, nothing remembered"
        return Finding("disk", "fail", found, "set DSPARK_CACHE to a directory that can")
    if machine.disk_gib < _LITTLE_DISK_GIB:
        found += ": little for models (the default one takes 0.75, one of 7 billion weights 15)"
        return Finding("disk", "warn", found, "make room, or set DSPARK_CACHE to a larger disk")
    return Finding("disk", "ok", found)


def _gpu(machine: Machine, device: str) -> Finding:
    software = f"torch {machine.torch}, CUDA {machine.torch_cuda or 'none'}, Triton {machine.triton or 'none'}"
    if machine.gpu is not None:
        found = f"{machine.gpu}, {machine.gpu_gib:.0f} GiB, driver {machine.driver}; {software}"
        if machine.triton_obstacle is not None:
            found += ": without the Triton kernels torch serves instead, slower"
            return Finding("gpu", "warn", found, machine.triton_obstacle)
        return Finding("gpu", "ok", found)
    advice = "pip install -e '.[gpu]', without constraints.txt, brings the CUDA build of torch"
    if machine.torch_cuda is not None:
        advice = "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
    if device.startswith("cuda"):
        found = f"the configuration asks for {device}, and torch sees no GPU ({software})"
        return Finding("gpu", "fail", found, f"{advice}; or serve with --device cpu")
    if machine.driver is not None:
        found = f"there is a GPU (driver {machine.driver}), and torch does not see it ({software})"
        return Finding("gpu", "warn", found, advice)
    return Finding("gpu", "ok", f"none: models are served from the processor ({software})")


# ---- gathering


def usable_cores() -> int:
    """Cores that this process may use: by affinity, and by a container's quota rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    return min(allowed, -(-int(quota) // int(period))) if quota.isdecimal() and period.strip().isdecimal() else allowed


def _container_gib() -> float | None:
    limit = _read(_CGROUP / "memory.max").strip()
    return int(limit) / _GIB if limit.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _watch(seconds: float) -> tuple[float, str | None, float]:
    """Cores' worth of other processes' work, which did most, the share of time stolen. This one sleeps meanwhile."""
    before, cpu_before = _process_seconds(), psutil.cpu_times()
    time.sleep(seconds)
    cpu, after = psutil.cpu_times(), _process_seconds()
    spent = {who: after[who] - before.get(who, after[who]) for who in after if who[0] != os.getpid()}
    most = max(spent, key=lambda who: spent[who], default=None)
    worked = sum(getattr(cpu, name) - getattr(cpu_before, name) for name in ("user", "nice", "system"))
    total = sum(cpu) - sum(cpu_before)
    stolen = getattr(cpu, "steal", 0.0) - getattr(cpu_before, "steal", 0.0)
    busiest = f"{most[1]} (process {most[0]})" if most is not None and spent[most] > 0 else None
    return worked / seconds, busiest, stolen / total if total else 0.0


def _process_seconds() -> dict[tuple[int, str], float]:
    found = {}
    for process in psutil.process_iter(["name", "cpu_times"]):
        times = process.info["cpu_times"]
        if times is not None:  # None: not ours to see
            found[process.pid, str(process.info["name"])] = times.user + times.system
    return found


def _driver() -> str | None:
    """NVIDIA's, as its own tool tells it; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
