"""Start-up checks that passed once need not run again: same files, same machine, same versions, same outcome.

Only a pass is kept; what failed is tried again at the next start. Must not know: what is checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dspark_kernels import native, triton
from dspark_serve.models.catalog import cache_dir

_KEPT_FILES = 64
logger = logging.getLogger(__name__)


def passed(check: str, key: Mapping[str, object]) -> bool:
    """Whether `check` passed under the same key before. A file that is damaged or another's counts for nothing."""
    path = _path(check, key)
    try:
        if json.loads(path.read_text(encoding="utf-8")) != _stored(key):
            return False
        path.touch()  # those used last are kept
        return True
    except (OSError, ValueError):
        return False


def remember(check: str, key: Mapping[str, object]) -> None:
    """Note that `check` passed. A cache that cannot be written costs time at the next start, nothing else."""
    path = _path(check, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(_stored(key)), encoding="utf-8")
        partial.replace(path)
        keep_newest(path.parent, _KEPT_FILES)
    except OSError as error:
        logger.info("the outcome of the start-up check %s cannot be kept: %s", check, error)


def file_states(directory: Path, pattern: str = "*") -> list[list[object]]:
    """Name, size and time of change of the files in `directory`: equal while nobody writes there."""
    states = [(path, path.stat()) for path in sorted(directory.glob(pattern)) if path.is_file()]
    return [[path.name, facts.st_size, facts.st_mtime_ns] for path, facts in states]


def machine(device: torch.device) -> dict[str, object]:
    """What decides how fast and in which order a computation runs: device, threads, versions, builds."""
    try:
        ours = version("dspark-serve")
    except PackageNotFoundError:  # run from a checkout that is not installed
        ours = "unknown"
    libraries = file_states(Path(native.__file__).parent, "*.so")
    sources = file_states(Path(triton.__file__).parent, "*.py") if device.type == "cuda" else []
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "version": f"{ours}, torch {torch.__version__}",
        "kernels": [*libraries, *sources],
    }


def keep_newest(directory: Path, count: int) -> None:
    """Delete all but the `count` JSON files that were used last; another process may do the same meanwhile."""

    def last_used(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    for path in sorted(directory.glob("*.json"), key=last_used)[:-count]:
        path.unlink(missing_ok=True)


def digest(key: Mapping[str, object]) -> str:
    """A short name for a key."""
    return hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()[:16]


def _path(check: str, key: Mapping[str, object]) -> Path:
    return cache_dir() / "checks" / f"{check}-{digest(key)}.json"


def _stored(key: Mapping[str, object]) -> dict[str, object]:
    return {"passed": True, "key": dict(key)}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the instruction set that torch chose."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
