"""Spans as a collector receives them, from a server that was started with the option as a user would."""

import gzip
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fakes import PATIENCE_S, FakeEngine, make_service
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from dspark_serve.config import ConfigError, load_config

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ERROR = 2  # opentelemetry.proto.trace.v1.Status.STATUS_CODE_ERROR


def value(any_value):
    kind = any_value.WhichOneof("value")
    found = getattr(any_value, kind)
    return [value(one) for one in found.values] if kind == "array_value" else found


def attributes(message):
    return {pair.key: value(pair.value) for pair in message.attributes}


@pytest.fixture
def collector(monkeypatch):
    """An OTLP collector over HTTP: `url`, and `received` (resource attributes, span) pairs."""
    monkeypatch.setattr("dspark_serve.server.tracing._EXPORT_TIMEOUT_S", PATIENCE_S)  # of it no haste is asked
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans = [span for scope in group.scope_spans for span in scope.spans]
                received.extend((attributes(group.resource), span) for span in spans)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        server.url, server.received = f"http://127.0.0.1:{server.server_address[1]}/v1/traces", received
        yield server
        server.shutdown()
        thread.join()


async def generate(client, headers=None, **body):
    body = {"prompt": "x" * 40, "temperature": 0.75, "top_p": 0.5, "seed": 1, **body}
    return await client.post("/v1/completions", json=body, headers=headers or {})


async def test_a_span_tells_of_queue_prefill_decode_and_speculation(serve, collector):
    async with serve(FakeEngine(burst=3), otlp_traces_endpoint=collector.url) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=x", "X-Request-Id": "mine"}
        first = (await generate(client, headers, max_tokens=10)).json()
        await generate(client, max_tokens=4)
    (resource, span), (_, other) = collector.received
    assert (resource["service.name"], span.name) == ("dspark-serve", "llm_request")
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "vendor=x")
    assert other.trace_id.hex() != TRACE
    assert other.parent_span_id == b""
    told, report = attributes(span), first["metrics"]["speculative_decoding"]
    expected = {
        "gen_ai.request.id": "mine",
        "gen_ai.request.model": "fake",
        "gen_ai.request.temperature": 0.75,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.max_tokens": 10,
        "gen_ai.usage.prompt_tokens": first["usage"]["prompt_tokens"],
        "gen_ai.usage.completion_tokens": first["usage"]["completion_tokens"],
        "gen_ai.response.finish_reasons": ["length"],
        "dspark.cached_tokens": 0,
        "dspark.preemptions": 0,
        "dspark.speculation.steps": report["num_spec_steps"],
        "dspark.speculation.draft_tokens": report["num_draft_tokens"],
        "dspark.speculation.kept_tokens": report["num_kept_draft_tokens"],
        "dspark.speculation.accepted_tokens": report["num_accepted_draft_tokens"],
        "dspark.speculation.mean_acceptance_length": report["mean_acceptance_length"],
    }
    assert {name: told[name] for name in expected} == expected
    assert report["num_accepted_draft_tokens"] > 0
    latency = {name.rpartition(".")[2]: seconds for name, seconds in told.items() if ".latency." in name}
    queue, prefill = latency["time_in_queue"], latency["time_in_model_prefill"]
    assert queue + prefill == pytest.approx(latency["time_to_first_token"])
    assert latency["time_to_first_token"] + latency["time_in_model_decode"] <= latency["e2e"]
    assert min(latency.values()) >= 0
    assert [event.name for event in span.events] == ["admitted", "first token"]
    assert span.start_time_unix_nano <= span.events[0].time_unix_nano <= span.end_time_unix_nano
    assert attributes(other)["dspark.cached_tokens"] == 32  # the prompt of the first, but for its last page


async def test_each_choice_and_each_end_has_a_span(serve, collector):
    engine = FakeEngine(max_queue=4)
    async with serve(engine, otlp_traces_endpoint=collector.url) as client:
        await generate(client, max_tokens=3, n=2)
        engine.hold_after = engine.steps + 11  # bytes to where it stops; it must not get to the length before
        await generate(client, max_tokens=100, stop="wör", temperature=0)
        engine.gate.set()
        async with client.stream(
            "POST", "/v1/completions", json={"prompt": "x", "max_tokens": 9, "stream": True}
        ) as it:
            async for _ in it.aiter_bytes():
                pass
        assert (await generate(client, max_tokens=10_000)).status_code == 400
    spans = [span for _, span in collector.received]
    ended = [attributes(span).get("gen_ai.response.finish_reasons") for span in spans]
    assert ended == [["length"], ["length"], ["stop"], ["length"], None]
    assert len({attributes(span)["dspark.sequence_id"] for span in spans}) == 5
    assert len({attributes(span)["gen_ai.request.id"] for span in spans[:2]}) == 1
    assert [span.status.code == ERROR for span in spans] == [False] * 4 + [True]


async def test_no_span_holds_text(serve, collector):
    async with serve(otlp_traces_endpoint=collector.url, log_prompts=True) as client:
        await generate(client, prompt="the rain in Spain", max_tokens=5)
    ((_, span),) = collector.received
    assert b"rain" not in span.SerializeToString()
    assert b"Hello" not in span.SerializeToString()


async def test_a_client_that_does_not_sample_is_followed(serve, collector):
    async with serve(otlp_traces_endpoint=collector.url) as client:
        await generate(client, {"traceparent": f"00-{TRACE}-{PARENT}-00"}, max_tokens=2)
        await generate(client, {"traceparent": "nonsense"}, max_tokens=2)
    ((_, span),) = collector.received
    assert span.trace_id.hex() != TRACE


async def test_a_failed_engine_ends_its_spans_as_errors(serve, collector):
    engine = FakeEngine()
    async with serve(engine, check=False, otlp_traces_endpoint=collector.url) as client:
        engine.fail_at = engine.steps + 3
        assert (await generate(client, max_tokens=50)).status_code == 500
    ((_, span),) = collector.received
    assert span.status.code == ERROR
    assert attributes(span)["gen_ai.response.finish_reasons"] == ["error"]


async def test_answers_do_not_depend_on_a_collector(serve):
    async with serve(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces") as client:
        assert (await generate(client, max_tokens=5)).status_code == 200


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dspark_serve.server.tracing", None)
    monkeypatch.delitem(sys.modules, "dspark_serve.server.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"needs the extra \[otel\] .*pip install 'dspark-serve\[otel\]'"):
        make_service(otlp_traces_endpoint="http://localhost:4318/v1/traces")
    with pytest.raises(ConfigError, match="otlp-traces-endpoint"):
        load_config({"otlp_traces_endpoint": "localhost:4318"})


def test_a_server_without_traces_does_not_load_the_sdk():
    code = (
        "import sys; from dspark_serve.config import load_config; from dspark_serve.server import run\n"
        "run.Service(load_config({}))\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
