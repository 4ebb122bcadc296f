"""Prometheus metrics, under vLLM's names with our prefix. Fed on the event loop, once per step.

Must not know: HTTP, text, tensors; how tokens are made.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from dspark_serve.reports import PHASES, EngineInfo, EngineStats, StepReport, TokenDelta
from dspark_serve.types import SKIP_REASONS, FinishReason, Request

M = TypeVar("M", bound=Collector)
PREFIX = "dspark:"
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_STEP = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)


@dataclass
class _Timeline:
    """What one request has been through, in seconds of the monotonic clock."""

    request: Request
    submitted_s: float
    last_token_s: float | None = None


@dataclass
class Totals:
    """Running totals for the stats line."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


class Tally(Collector):
    """A histogram that takes many equal values at once: in a step most rows have the same time per token.

    prometheus_client's own takes them one by one, at 64 rows a millisecond of the event loop's time in every step. Not
    locked: fed and scraped on the event loop.
    """

    def __init__(self, name: str, help_: str, model: str, bounds: Sequence[float]) -> None:
        self._name, self._help, self._model, self._bounds = name, help_, model, bounds
        self._counts = [0] * (len(bounds) + 1)  # by bucket, not yet cumulative; the last has no bound
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `value` so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._help, labels=["model_name"])
        family.add_metric([self._model], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        yield family


class Metrics:
    """An Observer of the AsyncEngine with a registry of its own. `vllm_names` repeats the shared metrics as `vllm:`.

    Every series that can be known is there from the start, at zero: a rate misses what happened before it saw one.
    """

    def __init__(self, model_name: str, vllm_names: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.totals = Totals()
        self._model = model_name
        self._shared: list[Collector] = []  # what vLLM has too
        self._timelines: dict[str, _Timeline] = {}
        self._seen = EngineStats(0, 0, 0, 0, 0, 0, 0)
        self._define_shared()
        self._define_ours()
        ProcessCollector(registry=self.registry)
        if vllm_names:
            self.registry.register(_VllmNames(self._shared))

    def _define_shared(self) -> None:
        self._running = self._gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests in the queue.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of the K/V pages in use; 1 is all of them.")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        reasons = get_args(FinishReason)
        self._success = self._family(
            "request_success", "Requests that ended, by reason.", "finished_reason", reasons, shared=True
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Submission to first token.", _TTFT)
        self._itl = Tally(f"{PREFIX}inter_token_latency_seconds", "Time per token after the first.", self._model, _ITL)
        self.registry.register(self._itl)
        self._shared.append(self._itl)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Submission to last token.", _E2E)
        self._queue = self._histogram("request_queue_time_seconds", "Submission to the first step.", _E2E)
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter("num_preemptions", "Requests that had to give up their pages.")
        self._drafts = self._counter("spec_decode_num_drafts", "Rows that had drafts verified.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._per_position = self._family(
            "spec_decode_num_accepted_tokens_per_pos", "Drafted tokens accepted, by position in the draft.", "position",
            (), shared=True,
        )  # fmt: skip

    def _define_ours(self) -> None:
        self._kept = self._counter(
            "spec_kept_tokens", "Drafted tokens that the budget sent to verification.", shared=False
        )
        self._budget = self._gauge(
            "spec_budget_tokens", "Drafted tokens sent to verification in the last step.", shared=False
        )
        self._skipped = self._family(
            "spec_draft_skipped", "Rows that did not draft because it would not have paid, by reason.", "reason",
            SKIP_REASONS, shared=False,
        )  # fmt: skip
        self._calibration = self._gauge(
            "spec_calibration_error", "Mean distance of stated probability and frequency of acceptance, of late.",
            shared=False,
        )  # fmt: skip
        step = Histogram(
            f"{PREFIX}step_seconds", "Time of a step, by phase.", ["model_name", "phase"], buckets=_STEP,
            registry=self.registry,
        )  # fmt: skip
        self._step = {phase: step.labels(self._model, phase) for phase in PHASES}
        self._predicted = self._histogram(
            "step_seconds_predicted", "Time a step was expected to take, drafting too.", _STEP, shared=False
        )
        self._plain = self._counter(
            "step_seconds_without_speculation", "Estimated time without speculation for the same tokens.", shared=False
        )

    def _gauge(self, name: str, help_: str, shared: bool = True) -> Gauge:
        family = Gauge(PREFIX + name, help_, ["model_name"], registry=self.registry)
        return self._keep(family, shared).labels(self._model)

    def _counter(self, name: str, help_: str, shared: bool = True) -> Counter:
        family = Counter(PREFIX + name, help_, ["model_name"], registry=self.registry)
        return self._keep(family, shared).labels(self._model)

    def _family(self, name: str, help_: str, label: str, values: Sequence[str], *, shared: bool) -> Counter:
        """A counter with a second label, at zero for those of its values that are known."""
        family = Counter(PREFIX + name, help_, ["model_name", label], registry=self.registry)
        for value in values:
            family.labels(self._model, value)
        return self._keep(family, shared)

    def _histogram(self, name: str, help_: str, buckets: tuple[float, ...], shared: bool = True) -> Histogram:
        family = Histogram(PREFIX + name, help_, ["model_name"], buckets=buckets, registry=self.registry)
        return self._keep(family, shared).labels(self._model)

    def _keep(self, metric: M, shared: bool) -> M:
        if shared:
            self._shared.append(metric)
        return metric

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)

    # ---- what the engine's door reports

    def on_loaded(self, info: EngineInfo, stats: EngineStats) -> None:
        for position in range(info.num_speculative_tokens):
            self._per_position.labels(self._model, str(position))
        self._update_stats(stats)

    def on_submit(self, request: Request) -> None:
        self._timelines[request.request_id] = _Timeline(request, time.monotonic())

    def on_reject(self, request_id: str) -> None:
        self._timelines.pop(request_id, None)

    def on_end(self, request_id: str, reason: FinishReason) -> None:
        line = self._timelines.pop(request_id, None)
        if line is not None:
            self._ended(line, reason)

    def on_step(self, report: StepReport | None, stats: EngineStats, started_s: float) -> None:
        self._update_stats(stats)
        if report is None:
            return
        for request_id in report.admitted:
            line = self._timelines.get(request_id)
            if line is not None:
                self._queue.observe(max(0.0, started_s - line.submitted_s))
        self._update_requests(report.deltas, time.monotonic())
        self._update_speculation(report)
        for phase, duration_ms in report.phase_ms.items():
            self._step[phase].observe(duration_ms / 1e3)

    def _update_stats(self, stats: EngineStats) -> None:
        seen, self._seen = self._seen, stats
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.pages_used / stats.pages_total if stats.pages_total else 0.0)
        self._queries.inc(stats.prefix_queries - seen.prefix_queries)
        self._hits.inc(stats.prefix_hits - seen.prefix_hits)
        self._preemptions.inc(stats.num_preemptions - seen.num_preemptions)

    def _update_requests(self, deltas: Sequence[TokenDelta], now_s: float) -> None:
        generated = 0
        times: dict[tuple[float, int], int] = {}  # rows by when their last token came and how many came now
        for delta in deltas:
            line = self._timelines.get(delta.request_id)
            if line is None:
                continue  # it was cancelled while the step ran
            n = len(delta.token_ids)
            if n:
                if line.last_token_s is None:
                    self._begun(line, now_s)
                else:
                    key = line.last_token_s, n
                    times[key] = times.get(key, 0) + 1
                line.last_token_s = now_s
                generated += n
            if delta.finish_reason is not None:
                del self._timelines[delta.request_id]
                self._ended(line, delta.finish_reason)
        # Accepted drafts come together; the time per token is what readers of this metric expect.
        for (last_s, n), rows in times.items():
            self._itl.observe((now_s - last_s) / n, n * rows)
        self._generated.inc(generated)
        self.totals.generation_tokens += generated

    def _begun(self, line: _Timeline, now_s: float) -> None:
        self._prompt.inc(line.request.num_prompt)
        self.totals.prompt_tokens += line.request.num_prompt
        self._ttft.observe(now_s - line.submitted_s)

    def _ended(self, line: _Timeline, reason: FinishReason) -> None:
        self._success.labels(self._model, reason).inc()
        self._e2e.observe(time.monotonic() - line.submitted_s)

    def _update_speculation(self, report: StepReport) -> None:
        drafts = drafted = kept = accepted = 0
        reaching: list[int] = []  # rows that accepted as far as each position
        for row in report.rows:
            drafts += row.n_kept > 0
            drafted += row.n_draft
            kept += row.n_kept
            accepted += row.n_accepted
            if row.n_accepted > len(reaching):
                reaching += [0] * (row.n_accepted - len(reaching))
            for position in range(row.n_accepted):
                reaching[position] += 1
        self._drafts.inc(drafts)
        self._drafted.inc(drafted)
        self._kept.inc(kept)
        self._accepted.inc(accepted)
        self.totals.draft_tokens += drafted
        self.totals.accepted_tokens += accepted
        for position, rows in enumerate(reaching):
            self._per_position.labels(self._model, str(position)).inc(rows)
        self._budget.set(kept)
        budget, plain_ms = report.budget, report.plain_ms
        if budget is None or plain_ms is None:
            return
        self._predicted.observe((budget.predicted_step_ms + budget.predicted_draft_ms) / 1e3)
        self._plain.inc(plain_ms / 1e3)
        self._calibration.set(budget.calibration_error)
        for reason, count in budget.skipped.items():
            self._skipped.labels(self._model, reason).inc(count)


class _VllmNames(Collector):
    """The metrics we share with vLLM, once more under its prefix, copied when scraped."""

    def __init__(self, sources: Sequence[Collector]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            for metric in source.collect():
                copy = Metric(_vllm(metric.name), metric.documentation, metric.type)
                copy.samples = [sample._replace(name=_vllm(sample.name)) for sample in metric.samples]
                yield copy


def _vllm(name: str) -> str:
    return "vllm:" + name.removeprefix(PREFIX)
