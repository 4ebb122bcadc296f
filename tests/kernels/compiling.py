"""The C++ kernels compiled apart from the installed ones, from setup.py's own list of sources and flags.

For builds that nobody installs: with sanitizers, for another machine. Must not know: what is done with the result.
"""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "kernels" / "dspark_kernels" / "cpu"


@dataclass(frozen=True)
class Recipe:
    """What setup.py would build on a machine."""

    sources: tuple[Path, ...]
    sets: dict[str, tuple[str, ...]]  # compiler flags by name of instruction set

    @staticmethod
    def of(machine: str) -> Recipe:
        """machine: as `platform.machine()` names it there."""
        with mock.patch("setuptools.setup") as setup, mock.patch.object(platform, "machine", return_value=machine):
            runpy.run_path(str(ROOT / "setup.py"))
        extensions = setup.call_args.kwargs["ext_modules"]
        return Recipe(
            tuple(ROOT / source for source in extensions[0].sources),
            {e.name.removeprefix("dspark_kernels._cpu_"): tuple(e.extra_compile_args) for e in extensions},
        )


def compiled(compiler: str, sources: Sequence[Path], flags: Sequence[str], to: Path, link: Sequence[str]) -> Path:
    """Compile and link into the file `to`. Raises AssertionError with what the compiler said where it complains."""
    objects = to.with_suffix(".objects")
    objects.mkdir()

    def one(source: Path) -> Path:
        target = objects / f"{source.stem}.o"
        _run(compiler, *flags, f"-I{HEADERS}", "-fPIC", "-c", str(source), "-o", str(target))
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = list(pool.map(one, sources))
    _run(compiler, *flags, *map(str, made), *link, "-o", str(to))
    return to


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
