"""A benchmark for people and for programs: the table that vLLM's `bench serve` prints, the same under its JSON keys.

Over repeats a line is the median, and the quartiles follow in brackets. Must not know: how anything was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dspark_serve.bench.drafts import Drafts
from dspark_serve.bench.figures import Figures, Latency, Run, Spread

_WIDTH = 50
_SECTIONS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)
_LATENCIES: tuple[tuple[str, str, Callable[[Latency], float]], ...] = (
    ("Mean", "mean", lambda latency: latency.mean_ms),
    ("Median", "median", lambda latency: latency.median_ms),
    ("P99", "p99", lambda latency: latency.p99_ms),
)
# title, vLLM's JSON key, value, whether it is a count
_LINES: tuple[tuple[str, str, Callable[[Figures], float], bool], ...] = (
    ("Benchmark duration (s)", "duration", lambda f: f.duration_s, False),
    ("Total input tokens", "total_input_tokens", lambda f: f.input_tokens, True),
    ("Total generated tokens", "total_output_tokens", lambda f: f.output_tokens, True),
    ("Request throughput (req/s)", "request_throughput", lambda f: f.requests_per_s, False),
    ("Output token throughput (tok/s)", "output_throughput", lambda f: f.output_tokens_per_s, False),
    ("Total Token throughput (tok/s)", "total_token_throughput", lambda f: f.tokens_per_s, False),
)
_DRAFT_LINES: tuple[tuple[str, str, Callable[[Drafts], float], bool], ...] = (
    ("Acceptance rate (%)", "spec_decode_acceptance_rate", lambda d: 100 * d.acceptance_rate, False),
    ("Acceptance length", "spec_decode_acceptance_length", lambda d: d.acceptance_length, False),
    ("Drafts", "spec_decode_num_drafts", lambda d: d.drafts, True),
    ("Draft tokens", "spec_decode_draft_tokens", lambda d: d.draft_tokens, True),
    ("Accepted tokens", "spec_decode_accepted_tokens", lambda d: d.accepted_tokens, True),
)


@dataclass(frozen=True)
class Pass:
    """One repeat: what was measured, and what the server says it drafted meanwhile (None: it does not say)."""

    run: Run
    drafts: Drafts | None

    @property
    def figures(self) -> Figures:
        return Figures.of(self.run)


@dataclass(frozen=True)
class Measured:
    """All repeats of one load. concurrency: the most requests at once; rate: arrivals per second; None: unlimited."""

    concurrency: int | None
    rate: float | None
    passes: tuple[Pass, ...]

    @property
    def failures(self) -> Counter[str]:
        return sum((each.run.failures for each in self.passes), Counter[str]())

    @property
    def completed(self) -> int:
        return sum(len(each.run.succeeded) for each in self.passes)


def table(measured: Measured) -> Iterator[str]:
    """The lines of vLLM's table; its speculation block only where the server told of drafts, else why not."""
    figures = [each.figures for each in measured.passes]
    yield f"{' Serving Benchmark Result ':=^{_WIDTH}}"
    yield _line("Successful requests", [f.completed for f in figures], True)
    yield _line("Failed requests", [f.failed for f in figures], True)
    if any(f.retries for f in figures):
        yield _line("Retries", [f.retries for f in figures], True)
    if measured.concurrency is not None:
        yield _line("Maximum request concurrency", [measured.concurrency], True)
    if measured.rate is not None:
        yield _line("Request rate configured (RPS)", [measured.rate], False)
    for title, _, value, count in _LINES:
        yield _line(title, [value(f) for f in figures], count)
    for name, short, title in _SECTIONS:
        yield f"{title:-^{_WIDTH}}"
        for label, _, of in _LATENCIES:
            yield _line(f"{label} {short} (ms)", [of(getattr(f, name)) for f in figures], False)
    drafts = [each.drafts for each in measured.passes if each.drafts is not None and each.drafts.draft_tokens]
    if drafts:
        yield from draft_lines(drafts)
    yield "=" * _WIDTH
    if not drafts:
        silent = all(each.drafts is None for each in measured.passes)
        yield "No speculation block: " + (
            "the server's /metrics tells nothing of drafts." if silent else "nothing was drafted in this time."
        )
    yield from failure_lines(measured.failures)


def sweep_table(measured: Sequence[Measured]) -> Iterator[str]:
    """One line per load: medians over the repeats."""
    yield f"{'concurrency':>11}{'tok/s':>12}{'mean TTFT ms':>14}{'mean TPOT ms':>14}{'failed':>8}"
    for each in measured:
        figures = [one.figures for one in each.passes]
        rate = Spread.of([f.output_tokens_per_s for f in figures]).median
        ttft = Spread.of([f.ttft.mean_ms for f in figures]).median
        tpot = Spread.of([f.tpot.mean_ms for f in figures]).median
        failed = sum(f.failed for f in figures)
        yield f"{each.concurrency or '-':>11}{rate:>12.2f}{ttft:>14.2f}{tpot:>14.2f}{failed:>8}"


def draft_lines(drafts: Sequence[Drafts]) -> Iterator[str]:
    """vLLM's block on speculation."""
    yield f"{'Speculative Decoding':-^{_WIDTH}}"
    for title, _, value, count in _DRAFT_LINES:
        yield _line(title, [value(d) for d in drafts], count)
    rates = [d.per_position_rates for d in drafts]
    width = max(map(len, rates))
    if width:
        yield "Per-position acceptance (%):"
    for place in range(width):
        shares = [100 * (each[place] if place < len(each) else 0.0) for each in rates]
        yield _line(f"  Position {place}", shares, False)


def failure_lines(failures: Counter[str]) -> Iterator[str]:
    """How often each error came, the most frequent first."""
    for error, count in failures.most_common():
        yield f"{count} failed: {error}"


def _line(title: str, values: Sequence[float], count: bool) -> str:
    spread = Spread.of(values)
    median, low, high = (f"{v:.{0 if count else 2}f}" for v in (spread.median, spread.low, spread.high))
    line = f"{title + ':':<40} {median:<10}"
    return line if len(values) == 1 else f"{line} [{low}, {high}]"


def as_json(measured: Measured) -> dict[str, Any]:
    """The load, its spread by key (median, low, high), and every repeat under vLLM's keys."""
    repeats = [_repeat(each) for each in measured.passes]
    keys = dict.fromkeys(key for each in repeats for key, value in each.items() if isinstance(value, int | float))
    spreads = {key: Spread.of([each[key] for each in repeats if key in each]) for key in keys}
    return {
        "max_concurrency": measured.concurrency,
        "request_rate": measured.rate,
        "spread": {key: {"median": s.median, "low": s.low, "high": s.high} for key, s in spreads.items()},
        "repeats": repeats,
        "errors": dict(measured.failures),
    }


def _repeat(each: Pass) -> dict[str, Any]:
    figures = each.figures
    found: dict[str, Any] = {"completed": figures.completed, "failed": figures.failed, "retries": figures.retries}
    found |= {key: value(figures) for _, key, value, _ in _LINES}
    for name, _, _ in _SECTIONS:
        latency: Latency = getattr(figures, name)
        found |= {f"{key}_{name}_ms": of(latency) for _, key, of in _LATENCIES}
    if each.drafts is not None and each.drafts.draft_tokens:
        found |= drafts_json(each.drafts)
    return found


def drafts_json(drafts: Drafts) -> dict[str, Any]:
    """The block on speculation under vLLM's keys."""
    found: dict[str, Any] = {key: value(drafts) for _, key, value, _ in _DRAFT_LINES}
    return {**found, "spec_decode_per_position_acceptance_rates": drafts.per_position_rates}
