"""Prometheus metrics, under vLLM's names with our prefix. Fed on the event loop, once per step.

Must not know: HTTP, text, tensors; how tokens are made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dspark_serve.types import EngineStats, FinishReason, Request, StepReport, TokenDelta

M = TypeVar("M", Counter, Gauge, Histogram)
PREFIX = "dspark:"
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_STEP = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
# vLLM has nothing under these names.
_OURS = (
    "spec_kept_tokens", "spec_budget_tokens", "step_seconds_predicted", "spec_draft_skipped", "spec_calibration_error",
)  # fmt: skip


@dataclass
class _Timeline:
    """What one request has been through, in seconds of the monotonic clock."""

    request: Request
    submitted_s: float
    scheduled: bool = False
    last_token_s: float | None = None


@dataclass
class Totals:
    """Running totals for the stats line."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


class Metrics:
    """An Observer of the AsyncEngine with a registry of its own. `vllm_names` repeats the shared metrics as `vllm:`."""

    def __init__(self, model_name: str, vllm_names: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.totals = Totals()
        self._model = model_name
        self._shared: list[Counter | Gauge | Histogram] = []
        self._timelines: dict[str, _Timeline] = {}
        self._seen = EngineStats(0, 0, 0, 0, 0, 0, 0)
        self._running = self._gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Requests in the queue.")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of the K/V pages in use; 1 is all of them.")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._success = self._family("request_success", "Requests that ended, by reason.", "finished_reason")
        self._ttft = self._histogram("time_to_first_token_seconds", "Submission to first token.", _TTFT)
        self._itl = self._histogram("inter_token_latency_seconds", "Time per token after the first.", _ITL)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Submission to last token.", _E2E)
        self._queue = self._histogram("request_queue_time_seconds", "Submission to the first step.", _E2E)
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter("num_preemptions", "Requests that had to give up their pages.")
        self._drafts = self._counter("spec_decode_num_drafts", "Rows that had drafts verified.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self._per_position = self._family(
            "spec_decode_num_accepted_tokens_per_pos", "Drafted tokens accepted, by position in the draft.", "position"
        )
        self._kept = self._counter("spec_kept_tokens", "Drafted tokens that the budget sent to verification.")
        self._budget = self._gauge("spec_budget_tokens", "Drafted tokens sent to verification in the last step.")
        self._step = Histogram(
            f"{PREFIX}step_seconds", "Time of a step, by phase.", ["model_name", "phase"], buckets=_STEP,
            registry=self.registry,
        )  # fmt: skip
        self._predicted = self._gauge(
            "step_seconds_predicted", "Time the last step was expected to take, drafting too."
        )
        self._skipped = self._family(
            "spec_draft_skipped", "Rows that did not draft because it would not have paid, by reason.", "reason"
        )
        self._calibration = self._gauge(
            "spec_calibration_error", "Mean distance of stated probability and frequency of acceptance, of late."
        )
        ProcessCollector(registry=self.registry)
        if vllm_names:
            self.registry.register(_VllmNames(self._shared))

    def _gauge(self, name: str, help_: str) -> Gauge:
        return self._keep(Gauge(PREFIX + name, help_, ["model_name"], registry=self.registry)).labels(self._model)

    def _counter(self, name: str, help_: str) -> Counter:
        return self._keep(Counter(PREFIX + name, help_, ["model_name"], registry=self.registry)).labels(self._model)

    def _family(self, name: str, help_: str, label: str) -> Counter:
        return self._keep(Counter(PREFIX + name, help_, ["model_name", label], registry=self.registry))

    def _histogram(self, name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(PREFIX + name, help_, ["model_name"], buckets=buckets, registry=self.registry)
        return self._keep(family).labels(self._model)

    def _keep(self, metric: M) -> M:
        self._shared.append(metric)
        return metric

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)

    # ---- what the engine's door reports

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
        for line in self._timelines.values():
            if not line.scheduled and line.request.status != "waiting":
                line.scheduled = True
                self._queue.observe(max(0.0, started_s - line.submitted_s))
        now_s = time.monotonic()
        for delta in report.deltas:
            self._update_request(delta, now_s)
        self._update_speculation(report)
        for phase, duration_ms in report.phase_ms.items():
            self._step.labels(self._model, phase).observe(duration_ms / 1e3)

    def _update_stats(self, stats: EngineStats) -> None:
        seen, self._seen = self._seen, stats
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.pages_used / stats.pages_total if stats.pages_total else 0.0)
        self._queries.inc(stats.prefix_queries - seen.prefix_queries)
        self._hits.inc(stats.prefix_hits - seen.prefix_hits)
        self._preemptions.inc(stats.num_preemptions - seen.num_preemptions)

    def _update_request(self, delta: TokenDelta, now_s: float) -> None:
        line = self._timelines.get(delta.request_id)
        if line is None:
            return  # it was cancelled while the step ran
        n = len(delta.token_ids)
        if n and line.last_token_s is None:
            self._prompt.inc(line.request.num_prompt)
            self.totals.prompt_tokens += line.request.num_prompt
            self._ttft.observe(now_s - line.submitted_s)
        elif n and line.last_token_s is not None:
            # Accepted drafts come together; the time per token is what readers of this metric expect.
            for _ in range(n):
                self._itl.observe((now_s - line.last_token_s) / n)
        if n:
            line.last_token_s = now_s
            self._generated.inc(n)
            self.totals.generation_tokens += n
        if delta.finish_reason is not None:
            del self._timelines[delta.request_id]
            self._ended(line, delta.finish_reason)

    def _ended(self, line: _Timeline, reason: FinishReason) -> None:
        self._success.labels(self._model, reason).inc()
        self._e2e.observe(time.monotonic() - line.submitted_s)

    def _update_speculation(self, report: StepReport) -> None:
        kept = 0
        for row in report.rows:
            if not row.n_draft:
                continue
            self._drafted.inc(row.n_draft)
            self.totals.draft_tokens += row.n_draft
            kept += row.n_kept
            if row.n_kept:
                self._drafts.inc()
            if row.n_accepted:
                self._accepted.inc(row.n_accepted)
                self.totals.accepted_tokens += row.n_accepted
                for position in range(row.n_accepted):
                    self._per_position.labels(self._model, str(position)).inc()
        self._kept.inc(kept)
        self._budget.set(kept)
        if report.budget is not None:
            self._predicted.set((report.budget.predicted_step_ms + report.budget.predicted_draft_ms) / 1e3)
            self._calibration.set(report.budget.calibration_error)
            for reason, count in report.budget.skipped.items():
                self._skipped.labels(self._model, reason).inc(count)


class _VllmNames(Collector):
    """The metrics we share with vLLM, once more under its prefix, copied when scraped."""

    def __init__(self, sources: Sequence[Counter | Gauge | Histogram]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            for metric in source.collect():
                if metric.name.removeprefix(PREFIX) not in _OURS:
                    copy = Metric(_vllm(metric.name), metric.documentation, metric.type)
                    copy.samples = [sample._replace(name=_vllm(sample.name)) for sample in metric.samples]
                    yield copy


def _vllm(name: str) -> str:
    return "vllm:" + name.removeprefix(PREFIX)
