"""The pictures of a benchmark, on a matplotlib that only notes what it is asked to draw."""

import sys
import types

import pytest

from dspark_serve.bench.client import BenchError
from dspark_serve.bench.compare import Comparison
from dspark_serve.bench.figures import Ratio, Run, Sample
from dspark_serve.bench.plots import plot, plot_comparisons, require_matplotlib
from dspark_serve.bench.report import Measured, Pass


class Axes:
    def __init__(self):
        self.lines, self.bars, self.labels = {}, [], {}

    def plot(self, x, y, label=None, **style):
        self.lines[label] = (list(x), list(y))

    def errorbar(self, x, y, yerr, label=None, **style):
        self.bars.append((label, list(x), list(y), yerr))

    def set(self, **labels):
        self.labels = labels

    def axhline(self, *_, **__):
        pass

    legend = axhline


@pytest.fixture
def drawn(monkeypatch):
    """The two panels of the last figure, and where it was saved."""
    found = types.SimpleNamespace(panels=[Axes(), Axes()], path=None)

    class Figure:
        def __init__(self, **_):
            pass

        def subplots(self, rows, columns):
            return found.panels

        def savefig(self, path, dpi):
            found.path = path

    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    module = types.ModuleType("matplotlib.figure")
    module.Figure = Figure
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    return found


def sample(first_s, last_s):
    return Sample(0.0, last_s, (first_s, last_s), num_output=10)


def measured(concurrency, *durations_s):
    samples = (sample(0.2, 1.0), sample(0.1, 3.0), Sample(0.0, 9.0, error="no"))
    return Measured(concurrency, None, tuple(Pass(Run(samples, each), None) for each in durations_s))


def test_latencies_and_throughput(drawn, tmp_path):
    plot([measured(1, 2.0, 4.0, 5.0), measured(4, 1.0)], tmp_path / "p.png")
    left, right = drawn.panels
    assert drawn.path == tmp_path / "p.png"
    assert left.lines["4 at once: first token"] == ([100.0, 200.0], [0.5, 1.0])
    assert left.lines["4 at once: answer"] == ([1000.0, 3000.0], [0.5, 1.0])
    [(_, loads, rates, (below, above))] = right.bars
    assert (loads, rates) == ([1, 4], [5.0, 20.0])
    assert (below, above) == ([0.5, 0.0], [2.5, 0.0])  # quartiles of 10, 5 and 4 tokens per second


def test_speed_ups(drawn, tmp_path):
    turns = (((30, 1.0), (30, 2.0)), ((30, 2.0), (30, 4.0)))
    known = Comparison("chat", 2, *turns, Ratio(2.0, 1.5, 2.25, 2.0), 2, 2, {True: None, False: None})
    silent = Comparison("chat", 8, (), (), None, 0, 0, {True: None, False: None})
    plot_comparisons([known, silent], tmp_path / "c.png")
    left, right = drawn.panels
    assert left.bars == [("chat", [2], [2.0], [[0.5], [0.25]])]
    assert right.lines == {"chat, on": ([2], [20.0]), "chat, off": ([2], [10.0])}


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(BenchError, match=r"install the \[train\] extra"):
        require_matplotlib()
