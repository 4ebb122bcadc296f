"""Metrics as Prometheus scrapes them, after traffic on a scripted engine."""

from dataclasses import replace

import pytest
from fakes import FakeEngine, settled
from prometheus_client.parser import text_string_to_metric_families

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
    async with serve(FakeEngine(burst=3, delay_s=0.005)) as client:
        await generate(client, max_tokens=10)
        await generate(client, max_tokens=50, stop="world")
        await generate(client, max_tokens=50, stop="wör")
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
        return replace(super().step(), budget=BudgetReport(8.0, 2.0, {"cost": 1}, 0.25))


async def test_what_the_budget_expected(serve):
    async with serve(Deciding()) as client:
        await generate(client, max_tokens=5)
        samples = await scrape(client)
        assert samples["dspark:step_seconds_predicted",] == pytest.approx(0.01)
        assert samples["dspark:spec_calibration_error",] == 0.25
        assert samples["dspark:spec_draft_skipped_total", ("reason", "cost")] >= 5


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
