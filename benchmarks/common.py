"""What every benchmark prints beside its numbers: machine, versions, revision; medians with their spread."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dspark_serve.bench.figures import Spread as Spread  # for the scripts
from dspark_serve.bench.workload import SHIPPED

HERE = Path(__file__).resolve().parent
MODEL = "smollm2-135m-instruct"  # unless a script is told another


def facts() -> dict[str, Any]:
    """Machine, software and revision of this run."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in _read("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("dspark-serve", "torch", "transformers")},
        "revision": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _git(*args: str) -> str | None:
    done = subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def figures(table: dict[str, Any]) -> dict[str, Any]:
    """The table as it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(table, default=asdict))
    return plain


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2, default=asdict) + "\n")


def prompts() -> list[str]:
    """First turns of the sample that comes with the package."""
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["turns"][0] for line in lines]
