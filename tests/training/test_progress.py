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


def test_rates_are_of_the_whole_run(monkeypatch):
    """Also where it lasts longer than what averages are taken over."""
    now = itertools.count(100, 2.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    lines: list[str] = []
    watch = progress.Watch(lines.append, 0.0)  # at 100 s
    watch.wrote(3, 50)  # 102 s
    for update in range(1, 97):  # 104 s to 294 s
        watch.add(update / 200, update, 1.0, 1.5, tokens=301, anchors=10 if update < 90 else 100)
    watch.wrote(4, 970)  # 296 s
    rates = watch.rates(1.5)  # 298 s
    anchors = (89 * 10 + 7 * 100) / 198
    assert rates == progress.Rates(round(96 * 301 / 198, 1), round(anchors, 1), round(1020 / 198, 1), 1.5)
    assert str(rates) == "146 tokens/s, 8 anchors/s, 5 answer tokens/s written, peak 1.50 GiB of its memory"
    assert [line for line in lines if "wrote" in line] == [
        "the target wrote 3 conversations, 25 answer tokens/s",
        "the target wrote 4 conversations, 5 answer tokens/s",
    ]
