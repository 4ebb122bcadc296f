"""Metrics as Prometheus scrapes them, after traffic on a scripted engine."""

import asyncio
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeEngine, gate_closed, settled, until
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dspark_serve.reports import RowReport, StepReport, TokenDelta
from dspark_serve.server.metrics import Metrics, Tally
from dspark_serve.types import BudgetReport

LABELS = {"model_name": "fake"}


async def scrape(client):
    """Samples by (name, labels without the model's)."""
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            rest = {key: value for key, value in sample.labels.items() if key != "model_name"}
            samples[sample.name, *sorted(rest.items())] = sample.value
    return samples


async def generate(client, **body):
    return await client.post("/v1/completions", json={"prompt": "x" * 40, "temperature": 0, **body})


async def test_counts(serve):
    engine = FakeEngine(burst=3)
    async with serve(engine) as client:
        await generate(client, max_tokens=10)
        await generate(client, max_tokens=50, stop="world")
        engine.hold_after = engine.steps + 5  # one token, then three a step; it must not get to the length before
        await generate(client, max_tokens=50, stop="wör")  # the loop has found these, in tokens 8 to 11
        engine.gate.set()
        await settled(client.service, client.engine)
        samples = await scrape(client)
        assert samples["dspark:prompt_tokens_total",] == 120
        assert samples["dspark:generation_tokens_total",] >= 10 + 50 + 10
        assert samples["dspark:request_success_total", ("finished_reason", "length")] == 2
        assert samples["dspark:request_success_total", ("finished_reason", "stop")] == 1
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert samples[f"dspark:{name}_seconds_count",] == 3
        assert samples["dspark:inter_token_latency_seconds_count",] >= 60
        assert samples["dspark:prefix_cache_queries_total",] == 120
        assert samples["dspark:prefix_cache_hits_total",] == 64
        drafted = samples["dspark:spec_decode_num_draft_tokens_total",]
        assert drafted == samples["dspark:spec_decode_num_accepted_tokens_total",] > 0
        assert drafted == samples["dspark:spec_kept_tokens_total",]
        positions = [samples["dspark:spec_decode_num_accepted_tokens_per_pos_total", ("position", p)] for p in "01"]
        assert sum(positions) == drafted
        assert samples["dspark:num_requests_running",] == 0
        assert samples["dspark:num_requests_waiting",] == 0
        assert samples["dspark:kv_cache_usage_perc",] == 0
        assert not any(name.startswith("vllm:") for name, *_ in samples)


class Deciding(FakeEngine):
    """Says what a budget expected of each step."""

    def step(self):
        budget = BudgetReport(8.0, 2.0, 8.0, 1.0, {"cost": 1}, 0.25)
        return replace(super().step(), phase_ms={"forward": 9.0, "propose": 0.5}, budget=budget)


async def test_what_the_budget_expected(serve):
    async with serve(Deciding()) as client:
        await generate(client, max_tokens=5)
        samples = await scrape(client)
        steps = samples["dspark:step_seconds_predicted_count",]
        assert steps >= 5
        assert samples["dspark:step_seconds_predicted_sum",] == pytest.approx(0.01 * steps)
        assert samples["dspark:step_seconds_sum", ("phase", "forward")] == pytest.approx(0.009 * steps)
        # Nothing was drafted: what the steps took, but for looking for drafts, is the time without speculation.
        assert samples["dspark:step_seconds_without_speculation_total",] == pytest.approx(0.009 * steps)
        assert samples["dspark:spec_calibration_error",] == 0.25
        assert samples["dspark:spec_draft_skipped_total", ("reason", "cost")] == steps
        assert samples["dspark:spec_draft_skipped_total", ("reason", "acceptance")] == 0


def test_time_without_speculation_is_that_of_the_same_tokens():
    """Two rows of one step: verifying added 10 ms, and three tokens more would have taken 14 ms each."""
    deltas = (TokenDelta("a", (1, 2, 3)), TokenDelta("b", (4, 5)))
    rows = (RowReport(4, 3, 2), RowReport(4, 1, 1))
    report = StepReport(deltas, rows, phase_ms={"forward": 50.0}, budget=BudgetReport(40.0, 5.0, 30.0, 14.0))
    assert report.plain_ms == 40.0 + 3 * 14.0
    assert replace(report, phase_ms={"forward": 50.0, "propose": 7.0}).plain_ms == report.plain_ms
    assert replace(report, phase_ms={"forward": 9.0}).plain_ms == 3 * 14.0  # quicker than drafts alone were to be
    cut = replace(report, deltas=(TokenDelta("a", (1,), "stop"), deltas[1]))  # what follows a stop token is no gain
    assert cut.plain_ms == 40.0 + 14.0
    assert replace(report, budget=None).plain_ms is None


def test_a_tally_is_the_histogram_of_the_library():
    bounds, registry, ours = (0.001, 0.01, 0.1), CollectorRegistry(), CollectorRegistry()
    theirs = Histogram("x", "help", ["model_name"], buckets=bounds, registry=registry).labels("m")
    tally = Tally("x", "help", "m", bounds)
    ours.register(tally)
    for value, count in ((0.0005, 3), (0.01, 2), (0.02, 1), (7.0, 2)):
        tally.observe(value, count)
        for _ in range(count):
            theirs.observe(value)
    kept = [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == kept


async def test_queue_time_ends_with_the_step_that_admits(serve):
    """A request that waits for another has its wait counted once, and for what it was."""
    engine = FakeEngine(max_num_seqs=1, hold_after=1)
    async with serve(engine) as client:
        began = time.monotonic()
        first = asyncio.create_task(generate(client, max_tokens=100))
        await gate_closed(engine)
        second = asyncio.create_task(generate(client, max_tokens=2))
        await until(lambda: client.service.engine.num_requests == 2)
        await asyncio.sleep(0.05)
        engine.gate.set()
        assert [(await answer).status_code for answer in (first, second)] == [200, 200]
        samples = await scrape(client)
        assert samples["dspark:request_queue_time_seconds_count",] == 2
        assert 0.05 <= samples["dspark:request_queue_time_seconds_sum",] < time.monotonic() - began


async def test_series_are_there_before_anything_happens(serve):
    """A rate or an increase sees only what happened after the first scrape of a series."""
    async with serve(FakeEngine(burst=4)) as client:
        samples = await scrape(client)
        for position in "012":
            assert samples["dspark:spec_decode_num_accepted_tokens_per_pos_total", ("position", position)] == 0
        for reason in ("stop", "length", "abort", "error"):
            assert samples["dspark:request_success_total", ("finished_reason", reason)] == 0
        assert samples["dspark:step_seconds_count", ("phase", "commit")] == 0


def test_the_documentation_lists_what_is_exported():
    """Each metric once, with its type; and vLLM's names for those that it has too, and no others."""
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    listed = re.findall(r"^\| `(dspark:\w+?)(?:\{[\w, ]+\})?` \| (\w+) \| (vllm|) *\|", text, re.MULTILINE)
    exported = {True: set(), False: set()}
    for family in Metrics("m", vllm_names=True).registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if name.startswith(("dspark:", "vllm:")):
            exported[name.startswith("vllm:")].add((name.partition(":")[2], family.type))
    assert sorted((name.partition(":")[2], kind) for name, kind, _ in listed) == sorted(exported[False])
    assert {(name.partition(":")[2], kind) for name, kind, also in listed if also} == exported[True]


async def test_vllm_names(serve):
    async with serve(metrics_compat="vllm") as client:
        await generate(client, max_tokens=3)
        samples = await scrape(client)
        shared = {name for name, *_ in samples if name.startswith("vllm:")}
        assert {"vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_bucket"} <= shared
        assert "vllm:spec_kept_tokens_total" not in shared
        assert samples["vllm:generation_tokens_total",] == samples["dspark:generation_tokens_total",] == 3


@pytest.mark.parametrize("body", [{"max_tokens": 10_000}, {"temperature": -1}])
async def test_refused_requests_leave_no_trace(serve, body):
    async with serve() as client:
        assert (await generate(client, **body)).status_code == 400
        samples = await scrape(client)
        assert samples["dspark:e2e_request_latency_seconds_count",] == 0
        assert not client.service.metrics._timelines
