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

CONTEXT = 128  # tokens of each row


def _costs(engine: Engine) -> CostModel:
    if not isinstance(engine.budget, AutoBudget):
        raise ValueError("this model is served without a drafter, so there is nothing to decide and nothing measured")
    return engine.budget.cost


def loads(engine: Engine) -> list[int]:
    """Rows at once that are worth a line: powers of two that the engine takes."""
    most = engine.info.max_num_seqs
    return [rows for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256) if rows <= most]


def table(engine: Engine) -> Iterator[str]:
    """Milliseconds of a draft and of a step, by rows and drafts per row, and what a block of drafts must bring."""
    costs, width = _costs(engine), engine.info.num_speculative_tokens
    info = engine.info
    yield f"{info.model} on {info.device}, {info.backend}; {CONTEXT} tokens of context per row, ms"
    header = "".join(f"{f'+{drafts}':>9}" for drafts in range(width + 1))
    yield f"{'rows':>6}{'draft':>9}{header}   tokens per row and step at which a whole block pays"
    for greedy in (False, True):
        yield "greedy" if greedy else "drawing tokens"
        for rows in loads(engine):
            context = rows * CONTEXT
            steps = costs.step_curve(rows, rows * (width + 1), rows, context, greedy, CONTEXT)[::rows]
            draft = costs.draft_ms(rows, context, greedy)
            even = (steps[-1] + draft) / steps[0]
            yield f"{rows:>6}{draft:>9.1f}" + "".join(f"{ms:>9.1f}" for ms in steps) + f"{even:>9.2f}"


def best_drafts(engine: Engine, rows: int, accepted_length: float) -> tuple[int, float]:
    """How many drafts per row earn the most by these curves, and how many times the tokens per second without them.

    accepted_length: accepted tokens per step that whole blocks reach, bonus token included; each draft is taken to be
    as likely as the one before. Greedy. Raises ValueError where nothing was measured.
    """
    costs, width, context = _costs(engine), engine.info.num_speculative_tokens, rows * CONTEXT
    step_ms = costs.step_curve(rows, rows * (width + 1), rows, context, greedy=True, keys_per_draft=CONTEXT)
    step_ms = step_ms[::rows]  # [drafts + 1]
    each = 1 - 1 / max(accepted_length, 1.0)
    tokens = np.cumsum(each ** np.arange(width + 1))
    gains = tokens / (step_ms + costs.draft_ms(rows, context, greedy=True)) * step_ms[0]
    gains[0] = 1.0  # no draft is made for nothing
    best = int(gains.argmax())
    return best, float(gains[best])


def plot_curves(engine: Engine, path: Path) -> None:
    """Step time by tokens for several loads, and draft time by rows. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: install the [train] extra") from None
    costs, width = _costs(engine), engine.info.num_speculative_tokens
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for rows in loads(engine):
        tokens = np.arange(rows, rows * (width + 1) + 1)
        times = costs.step_curve(rows, int(tokens[-1]), rows, rows * CONTEXT, keys_per_draft=CONTEXT)
        left.plot(tokens, times, label=f"{rows} rows")
    left.set(xlabel="tokens in the step", ylabel="ms", title="step", xscale="log")
    left.legend()
    most = loads(engine)[-1]
    right.plot(np.arange(1, most + 1), costs.draft_curve(most, most * CONTEXT)[1:])
    right.set(xlabel="rows", ylabel="ms", title="draft")
    figure.savefig(path, dpi=120)
