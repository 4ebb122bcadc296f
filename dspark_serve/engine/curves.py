"""The cost model's curves for people: a table, and a picture where matplotlib is installed.

Must not know: how they are measured, what is decided by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dspark_serve.engine.engine import Engine
from dspark_serve.speculation.cost import CostModel
from dspark_serve.speculation.policies import AutoBudget

_CONTEXT = 128  # tokens of each row


def _costs(engine: Engine) -> CostModel:
    if not isinstance(engine.budget, AutoBudget):
        raise ValueError("this model is served without a drafter, so there is nothing to decide and nothing measured")
    return engine.budget.cost


def _loads(engine: Engine) -> list[int]:
    most = engine.info.max_num_seqs
    return [rows for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256) if rows <= most]


def table(engine: Engine) -> Iterator[str]:
    """Milliseconds of a draft and of a step, by rows and drafts per row, and what a block of drafts must bring."""
    costs, width = _costs(engine), engine.info.num_speculative_tokens
    info = engine.info
    yield f"{info.model} on {info.device}, {info.backend}; {_CONTEXT} tokens of context per row, ms"
    header = "".join(f"{f'+{drafts}':>9}" for drafts in range(width + 1))
    yield f"{'rows':>6}{'draft':>9}{header}   tokens per row and step at which a whole block pays"
    for greedy in (False, True):
        yield "greedy" if greedy else "drawing tokens"
        for rows in _loads(engine):
            context = rows * _CONTEXT
            steps = costs.step_curve(rows, rows * (width + 1), rows, context, greedy, _CONTEXT)[::rows]
            draft = costs.draft_ms(rows, context, greedy)
            even = (steps[-1] + draft) / steps[0]
            yield f"{rows:>6}{draft:>9.1f}" + "".join(f"{ms:>9.1f}" for ms in steps) + f"{even:>9.2f}"


def plot_curves(engine: Engine, path: Path) -> None:
    """Step time by tokens for several loads, and draft time by rows. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: install the [train] extra") from None
    costs, width = _costs(engine), engine.info.num_speculative_tokens
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for rows in _loads(engine):
        tokens = np.arange(rows, rows * (width + 1) + 1)
        times = costs.step_curve(rows, int(tokens[-1]), rows, rows * _CONTEXT, keys_per_draft=_CONTEXT)
        left.plot(tokens, times, label=f"{rows} rows")
    left.set(xlabel="tokens in the step", ylabel="ms", title="step", xscale="log")
    left.legend()
    most = _loads(engine)[-1]
    right.plot(np.arange(1, most + 1), costs.draft_curve(most, most * _CONTEXT)[1:])
    right.set(xlabel="rows", ylabel="ms", title="draft")
    figure.savefig(path, dpi=120)
