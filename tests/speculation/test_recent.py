"""What is remembered of blocks, against a slow account of it request by request."""

from __future__ import annotations

import numpy as np
import pytest

from dspark_serve.speculation.budget import LEVELS, Drafted
from dspark_serve.speculation.calibrate import DraftSignals
from dspark_serve.speculation.members import Members
from dspark_serve.speculation.recent import Recent
from dspark_serve.types import Request, SamplingParams, temperature_range

WIDTH = 4


class Account:
    """Of one drafter: the last 64 whole blocks per temperature range, a running mean per request."""

    def __init__(self) -> None:
        self.blocks: dict[int, list[np.ndarray]] = {}
        self.own: dict[str, tuple[float, int, int]] = {}  # survival, blocks, last step

    def remember(self, signals: DraftSignals, survival: np.ndarray, step: int, weight: int) -> None:
        for level in set(signals.ranges.tolist()):
            mine = [
                row
                for row, kind in enumerate(signals.kinds)
                if kind == "head" and signals.ranges[row] == level and signals.n_draft[row]
            ]
            if not mine:
                continue
            usual = survival[mine].mean(0).cumsum()
            for row in mine:
                n = int(signals.n_draft[row])
                if n == WIDTH:
                    self.blocks.setdefault(level, []).extend([survival[row]] * weight)
                whole = survival[row].sum() / max(usual[n - 1] / max(usual[-1], 1e-6), 1e-3)
                before, blocks, _ = self.own.get(signals.requests[row], (0.0, 0, 0))
                gain = max(0.2, 1 / (blocks + 1))
                self.own[signals.requests[row]] = before + gain * (whole - before), blocks + 1, step

    def expected(self, request: str, level: int, limit: int) -> tuple[np.ndarray, np.ndarray] | None:
        samples = np.array(self.blocks.get(level, [])[-64:])
        if len(samples) < 24:
            return None
        survival, blocks, _ = self.own.get(request, (0.0, 0, 0))
        scale = min((blocks * survival / (samples.sum() / len(samples)) + 4) / (blocks + 4), 10.0)
        kept, gain = Drafted.of(samples).at(LEVELS, np.array([scale]), np.array([limit]))
        return kept[0], gain[0]


@pytest.mark.parametrize("temperatures", [(1.0,), (0.0, 0.7, 1.0)])
def test_like_an_account_request_by_request(temperatures: tuple[float, ...]) -> None:
    draw, recent, account = np.random.default_rng(0), Recent(), Account()
    requests = [
        Request(f"r{n}", (1,), SamplingParams(temperature=temperatures[n % len(temperatures)]), seed=n)
        for n in range(30)
    ]
    for step in range(1, 60):
        batch = tuple(requests[n] for n in draw.choice(30, int(draw.integers(1, 12)), replace=False))
        members, limits = Members.of(batch), draw.integers(1, WIDTH + 1, len(batch))
        kept, gain, unknown = recent.expected(members, limits)
        for row, name in enumerate(members.requests):
            wanted = account.expected(name, int(members.ranges[row]), int(limits[row]))
            assert (wanted is None) == (unknown is not None and bool(unknown[row]))
            if wanted is not None:
                np.testing.assert_allclose(kept[row], wanted[0])
                np.testing.assert_allclose(gain[row], wanted[1])
        lasts = [account.own.get(name, (0.0, 0, 0))[2] for name in members.requests]
        assert recent.last_steps(members.requests).tolist() == lasts
        survival = draw.random((len(batch), WIDTH)).cumprod(1)
        n_draft = np.minimum(draw.integers(0, 2 * WIDTH, len(batch)), WIDTH)
        survival[np.arange(WIDTH) >= n_draft[:, None]] = 0.0
        kinds = tuple(str(kind) for kind in draw.choice(["head", "head", "ngram"], len(batch)))
        signals = DraftSignals(members.requests, kinds, members.ranges, None, None, n_draft)
        weight = 4 if step % 10 == 0 else 1
        recent.remember(signals, "head", survival, step, weight)
        account.remember(signals, survival, step, weight)
        if step % 7 == 0:
            recent.release(members.requests[0])
            account.own.pop(members.requests[0], None)


def test_members() -> None:
    requests = tuple(Request(f"r{t}", (1,), SamplingParams(temperature=t), seed=0) for t in (0.0, 1.0, 0.9, 0.0))
    members = Members.of(requests)
    assert members.requests == ("r0.0", "r1.0", "r0.9", "r0.0")
    assert members.ranges.tolist() == [temperature_range(t) for t in (0.0, 1.0, 0.9, 0.0)]
    assert {level: np.arange(4)[rows].tolist() for level, rows in members.by_range.items()} == {
        0: [0, 3],
        2: [2],
        3: [1],
    }
    assert Members.of(requests[:1]).by_range == {0: slice(None)}
