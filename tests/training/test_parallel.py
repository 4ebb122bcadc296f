"""Two processes train one head: the same weights in both, from gradients of both, and files from the first only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_graft import TRAIN, make
from two_processes import check_some, run_in_two, train_some, whole_command

from dspark_serve.training.graft import BEST, CHECKPOINT
from dspark_serve.training.parallel import ALONE


def test_both_end_with_the_same_weights(model, written, tmp_path):
    run_in_two(train_some, model, written, tmp_path, "cpu")
    check_some(model, written, tmp_path)


def test_the_command_in_two_processes(model, written, tmp_path):
    (tmp_path / BEST).mkdir()  # as an earlier run leaves it: the second process must not take it for its own
    run_in_two(whole_command, model, written, tmp_path, "cpu")
    assert (tmp_path / CHECKPOINT).exists()
    assert (tmp_path / BEST / "report.json").exists()
    facts = json.loads((tmp_path / BEST / "dspark.json").read_text())
    assert facts["training"]["processes"] == 2
    assert not [path for path in Path(tmp_path).rglob("*.partial")]


def test_a_process_without_text_says_so(model, written):
    grafter = make(model, written, TRAIN)
    grafter.group = replace(ALONE, rank=1, size=10_000)
    with pytest.raises(ValueError, match="no text for process 1 of 10000"):
        grafter.step()
