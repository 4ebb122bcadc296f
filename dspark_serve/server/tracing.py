"""OpenTelemetry: a span per sequence, from submission to its end, below the client's span where it sent one.

Needs the extra [otel]; imported only when traces are asked for. Must not know: HTTP, text (a span holds none), tensors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from dspark_serve.reports import EngineInfo, EngineStats, StepReport, TokenDelta
from dspark_serve.server.context import current
from dspark_serve.types import FinishReason, Request

SPAN = "llm_request"  # vLLM's name, and its names of attributes where it has them
_EXPORT_TIMEOUT_S = 5.0


@dataclass
class _Open:
    """A sequence whose span has not ended; times in seconds of the monotonic clock."""

    request: Request
    span: Span
    submitted_s: float
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    tokens: int = 0
    steps: int = 0  # that brought tokens


class Traces:
    """An Observer of the AsyncEngine that sends spans to an OTLP collector, over HTTP, from a thread of its own.

    endpoint: full URL, as http://localhost:4318/v1/traces. OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES,
    OTEL_TRACES_SAMPLER and OTEL_EXPORTER_OTLP_HEADERS mean what they do everywhere; a client's decision to sample is
    followed.
    """

    def __init__(self, endpoint: str, model_name: str) -> None:
        ours = Resource({SERVICE_NAME: "dspark-serve", SERVICE_VERSION: version("dspark-serve")})
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("dspark_serve")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model_name
        self._open: dict[str, _Open] = {}

    def close(self) -> None:
        """Send what is left; blocks for a few seconds if the collector does not answer."""
        self._provider.shutdown()

    # ---- what the engine's door reports

    def on_loaded(self, info: EngineInfo, stats: EngineStats) -> None:
        pass

    def on_submit(self, request: Request) -> None:
        asked, params = current(), request.params
        attributes: dict[str, AttributeValue] = {
            "gen_ai.request.model": self._model,
            "gen_ai.request.id": asked.request_id,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": request.num_prompt,
            "dspark.sequence_id": request.request_id,
        }
        if params.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = params.max_tokens
        parent = self._propagator.extract(asked.trace_headers)
        span = self._tracer.start_span(SPAN, parent, SpanKind.SERVER, attributes)
        self._open[request.request_id] = _Open(request, span, time.monotonic())

    def on_reject(self, request_id: str) -> None:
        found = self._open.pop(request_id, None)
        if found is not None:
            found.span.set_status(StatusCode.ERROR, "the engine did not take the request")
            found.span.end()

    def on_step(self, report: StepReport | None, stats: EngineStats, started_s: float) -> None:
        if report is None:
            return
        for request_id in report.admitted:
            found = self._open.get(request_id)
            if found is not None:
                found.admitted_s = max(started_s, found.submitted_s)
                found.span.add_event("admitted", {"dspark.cached_tokens": found.request.num_cached})
        now_s = time.monotonic()
        for delta in report.deltas:
            found = self._open.get(delta.request_id)
            if found is not None:
                self._update(found, delta, now_s)

    def _update(self, found: _Open, delta: TokenDelta, now_s: float) -> None:
        if delta.token_ids:
            if found.first_token_s is None:
                found.first_token_s = now_s
                found.span.add_event("first token")
            found.last_token_s = now_s
            found.tokens += len(delta.token_ids)
            found.steps += 1
        if delta.finish_reason is not None:
            self.on_end(delta.request_id, delta.finish_reason)

    def on_end(self, request_id: str, reason: FinishReason) -> None:
        found = self._open.pop(request_id, None)
        if found is None:
            return
        span, stats = found.span, found.request.stats
        span.set_attributes(_latency(found, time.monotonic()))
        span.set_attributes(
            {
                "gen_ai.response.finish_reasons": [reason],
                "gen_ai.usage.completion_tokens": found.tokens,
                "dspark.cached_tokens": found.request.num_cached,
                "dspark.preemptions": found.request.num_preemptions,
                "dspark.decode.steps": found.steps,
                "dspark.speculation.steps": stats.num_spec_steps,
                "dspark.speculation.draft_tokens": stats.num_draft_tokens,
                "dspark.speculation.kept_tokens": stats.num_kept_tokens,
                "dspark.speculation.accepted_tokens": stats.num_accepted_tokens,
                "dspark.speculation.mean_acceptance_length": stats.mean_acceptance_length,
            }
        )
        if reason == "error":
            span.set_status(StatusCode.ERROR, "the engine failed")
        span.end()


def _latency(found: _Open, now_s: float) -> dict[str, float]:
    """Seconds in the queue, in prefill and in decode, as far as the sequence got."""
    seconds = {"gen_ai.latency.e2e": now_s - found.submitted_s}
    if found.admitted_s is not None:
        seconds["gen_ai.latency.time_in_queue"] = found.admitted_s - found.submitted_s
    if found.admitted_s is not None and found.first_token_s is not None and found.last_token_s is not None:
        seconds["gen_ai.latency.time_to_first_token"] = found.first_token_s - found.submitted_s
        seconds["gen_ai.latency.time_in_model_prefill"] = found.first_token_s - found.admitted_s
        seconds["gen_ai.latency.time_in_model_decode"] = found.last_token_s - found.first_token_s
    return seconds
