"""What a run shows: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import itertools
import re
import sys
from types import SimpleNamespace

import pytest

from dspark_serve.training import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def watched(monkeypatch, stderr, begin=0.0, update_s=2.0):
    """Twenty updates, the run's half; what was reported."""
    clock = itertools.count(0, update_s)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys, "stderr", stderr)
    lines: list[str] = []
    watch = progress.Watch(lines.append, begin)
    watch._bar.mininterval = 0  # drawn at every update
    for update in range(1, 21):
        watch.add(begin + update / 40, update, 1.0 / update, 1.5, tokens=300, anchors=128)
    watch.close()
    return lines


def test_lines_where_nobody_watches(monkeypatch):
    stderr = io.StringIO()
    lines = watched(monkeypatch, stderr)
    assert stderr.getvalue() == ""
    assert len(lines) == 1  # forty seconds
    mean = sum(1 / n for n in range(1, 16)) / 15
    expected = f" 37.5%, update 15, 150 tokens/s, 64 anchors/s, loss {mean:.4f}, accepted 1.500, 1 min left"
    assert lines == [expected]


def test_time_left_counts_from_where_the_run_was_resumed(monkeypatch):
    line = watched(monkeypatch, io.StringIO(), begin=0.4, update_s=120)[-1]
    assert line.startswith(" 90.0%")
    assert line.endswith(" 8 min left")  # 40 min for half of the run: 8 for a tenth


def test_a_bar_on_a_terminal(monkeypatch):
    stderr = Terminal()
    assert watched(monkeypatch, stderr) == []
    drawn = stderr.getvalue().split("\r")
    last = [line for line in drawn if "tokens/s" in line][-1]
    pattern = r"graft +\d+\.\d%\|.*\| \d\d:\d\d<\d\d:\d\d, 150 tokens/s, 64 anchors/s, loss 0\.\d{4}, accepted 1\.500"
    assert re.search(pattern, last)


@pytest.mark.parametrize("stderr", [io.StringIO(), Terminal()])
def test_the_bar_is_only_for_terminals(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.bar("first text") as bar:
        assert bool(bar.disable) != stderr.isatty()
