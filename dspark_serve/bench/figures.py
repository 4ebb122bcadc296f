"""The numbers of a benchmark: throughput and latencies of a run, spread over repeats, the interval of a speed-up.

Must not know: HTTP, how requests were sent, how numbers are shown.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS = 10_000  # of the bootstrap


@dataclass(frozen=True)
class Sample:
    """What became of one request. Times are seconds of one monotonic clock; `started_s` is before any retry."""

    started_s: float
    ended_s: float
    arrivals_s: tuple[float, ...] = ()  # when text arrived, chunk by chunk
    num_input: int = 0
    num_output: int = 0
    counted: bool = False  # the server told no usage: num_output is the number of chunks
    text: str = ""
    retries: int = 0
    error: str | None = None
    status: int | None = None  # of HTTP, where that is the error

    @property
    def ttft_s(self) -> float:
        return (self.arrivals_s[0] if self.arrivals_s else self.ended_s) - self.started_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None where there was only one."""
        return (self.ended_s - self.started_s - self.ttft_s) / (self.num_output - 1) if self.num_output > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between chunks, each of which may hold several accepted tokens."""
        return [after - before for before, after in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


@dataclass(frozen=True)
class Latency:
    """Of all requests of a run, in milliseconds. Percentiles interpolate linearly, as numpy's and vLLM's do."""

    mean_ms: float
    median_ms: float
    p99_ms: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Latency:
        if not seconds:
            return Latency(0.0, 0.0, 0.0)
        ms = np.array(seconds) * 1e3
        return Latency(float(ms.mean()), float(np.median(ms)), float(np.percentile(ms, 99)))


@dataclass(frozen=True)
class Run:
    """One pass over a load: its samples and how long it took."""

    samples: tuple[Sample, ...]
    duration_s: float

    @property
    def succeeded(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.error is None]

    @property
    def failures(self) -> Counter[str]:
        """How often each error came."""
        return Counter(sample.error for sample in self.samples if sample.error is not None)

    @property
    def output_tokens(self) -> int:
        return sum(sample.num_output for sample in self.succeeded)


@dataclass(frozen=True)
class Figures:
    """A run in numbers; only requests that succeeded count, beside `failed` and `retries`."""

    completed: int
    failed: int
    retries: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    ttft: Latency
    tpot: Latency
    itl: Latency
    e2el: Latency

    @property
    def requests_per_s(self) -> float:
        return self.completed / self.duration_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s

    @property
    def tokens_per_s(self) -> float:
        return (self.input_tokens + self.output_tokens) / self.duration_s

    @staticmethod
    def of(run: Run) -> Figures:
        good = run.succeeded
        return Figures(
            completed=len(good),
            failed=len(run.samples) - len(good),
            retries=sum(sample.retries for sample in run.samples),
            duration_s=run.duration_s,
            input_tokens=sum(sample.num_input for sample in good),
            output_tokens=run.output_tokens,
            ttft=Latency.of([sample.ttft_s for sample in good]),
            tpot=Latency.of([seconds for sample in good if (seconds := sample.tpot_s) is not None]),
            itl=Latency.of([gap for sample in good for gap in sample.gaps_s]),
            e2el=Latency.of([sample.ended_s - sample.started_s for sample in good]),
        )


@dataclass(frozen=True)
class Spread:
    """Median and the quartiles of repeated measurements."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0], 1)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(statistics.median(values), low, high, len(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g}, {self.high:.4g}] n={self.count}"


@dataclass(frozen=True)
class Ratio:
    """How many times the tokens per second of the other arm, with its 95 % interval.

    median_pair: the median of the pairs' own ratios, which a stall in one turn does not move.
    """

    value: float
    low: float
    high: float
    median_pair: float


def speed_up(on: Sequence[tuple[int, float]], off: Sequence[tuple[int, float]], seed: int = 0) -> Ratio:
    """Tokens per second of all turns `on` over that of all turns `off`; each turn is (tokens, seconds).

    Turns of equal index ran beside each other and are drawn together: a bootstrap over pairs, so that a machine that
    slows down slows both. Raises ValueError below two pairs, which have no interval, and for a turn without tokens.
    """
    if len(on) != len(off) or len(on) < 2 or not all(tokens for tokens, _ in (*on, *off)):
        raise ValueError("an interval needs at least two pairs of turns, and tokens in each")
    turns = np.array([on, off], dtype=np.float64)  # [arm, pair, tokens or seconds]
    drawn = np.random.default_rng(seed).integers(len(on), size=(_DRAWS, len(on)))

    totals = turns[:, drawn].sum(axis=2)  # [arm, draw, tokens or seconds]
    rates = totals[..., 0] / totals[..., 1]
    low, high = np.percentile(rates[0] / rates[1], [2.5, 97.5])
    (tokens_on, seconds_on), (tokens_off, seconds_off) = turns.sum(axis=1).tolist()
    whole = tokens_on / seconds_on / (tokens_off / seconds_off)
    by_turn = turns[..., 0] / turns[..., 1]  # [arm, pair]
    return Ratio(whole, float(low), float(high), float(np.median(by_turn[0] / by_turn[1])))
