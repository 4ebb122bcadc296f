"""What start-up checks leave behind: only a pass, only for the same key, and never a start that fails for it."""

import json
import logging
import os
from pathlib import Path

import pytest

from dspark_serve.config import load_config
from dspark_serve.engine import build
from dspark_serve.engine.build import build_engine
from dspark_serve.engine.remembered import file_states, keep_newest, passed, remember
from tests.drafters.golden import GOLDENS

KEY = {"files": [["a", 1, 2]], "threads": 2}
OPTIONS = {"model": str(GOLDENS / "target"), "kv_cache_gib": 0.01}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checks"


def test_a_pass_holds_for_its_check_and_key():
    assert not passed("rows", KEY)
    remember("rows", KEY)
    assert passed("rows", KEY)
    assert not passed("head", KEY)
    assert not passed("rows", {**KEY, "threads": 1})


def test_a_damaged_note_counts_for_nothing(cache):
    remember("rows", KEY)
    (file,) = cache.iterdir()
    for text in ("", "{", "[]", json.dumps({"passed": True, "key": {}})):
        file.write_text(text)
        assert not passed("rows", KEY)


def test_a_cache_that_cannot_be_written_is_no_error(cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file where the directory should be")
    with caplog.at_level(logging.INFO):
        remember("rows", KEY)
    assert "cannot be kept" in caplog.text
    assert not passed("rows", KEY)


def test_old_notes_go(cache):
    for number in range(70):
        remember("rows", {"number": number})
    assert len(list(cache.iterdir())) == 64


def test_old_notes_may_be_gone_already(cache, monkeypatch):
    """Two servers that start at once delete the same files."""
    for number in range(3):
        remember("rows", {"number": number})
    found = [*cache.glob("*.json"), cache / "deleted-by-another.json"]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: found)
    keep_newest(cache, 2)
    assert len(list(cache.iterdir())) == 2


def test_a_changed_file_is_another_state(tmp_path):
    (tmp_path / "weights").write_text("12345")
    before = file_states(tmp_path)
    assert before == file_states(tmp_path)
    os.utime(tmp_path / "weights", ns=(1, 1))
    assert file_states(tmp_path) != before


@pytest.fixture
def runs(monkeypatch):
    """Names of the checks that ran, in order."""
    seen = []
    for name in ("run_self_test", "row_variance"):
        real = getattr(build, name)
        monkeypatch.setattr(build, name, lambda *a, real=real, name=name: (seen.append(name), real(*a))[1])
    return seen


def test_a_second_start_checks_only_what_changed(runs, tmp_path):
    head = tmp_path / "head"
    head.mkdir()
    for file in (GOLDENS / "dspark_vanilla").iterdir():
        (head / file.name).write_bytes(file.read_bytes())
    options = {**OPTIONS, "head": str(head), "budget": "full"}

    def start():
        runs.clear()
        info = build_engine(load_config(options)).info
        return info.drafter, info.warnings, info.row_invariant, list(runs)

    first = start()
    assert first[3] == ["run_self_test", "row_variance"]
    assert start() == (*first[:3], [])
    os.utime(head / "model.safetensors", ns=(1, 1))
    assert start() == (*first[:3], ["run_self_test"])


def test_what_failed_is_tried_again(runs, monkeypatch):
    monkeypatch.setattr(build, "row_variance", lambda *a: (runs.append("failed"), "differs")[1])
    for _ in range(2):
        assert not build_engine(load_config(OPTIONS)).info.row_invariant
    assert runs == ["failed", "failed"]
