"""`dspark-serve bench` on servers whose numbers are known by construction: a scripted engine, a foreign server."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fakes import FakeEngine
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from test_run import Server

from dspark_serve.bench.client import BenchError, Endpoint
from dspark_serve.bench.command import BenchOptions, bench

HELLO = "hello there"
CHAT_TOKENS = len(f"<|user|>{HELLO}\n<|assistant|>")  # the byte tokenizer's


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": HELLO}]}) + "\n")
    return path


async def measure(client, tmp_path, **options):
    """What `bench` printed, what it wrote, and whether anything succeeded."""
    lines, path = [], tmp_path / "out.json"
    succeeded = await bench(BenchOptions(url="http://test", json=path, **options), lines.append, client)
    return lines, json.loads(path.read_text()), succeeded


async def test_every_count_is_the_servers(serve, prompts, tmp_path):
    """Ten tokens: one from the prompt's step, then three steps of two accepted drafts and a bonus token."""
    async with serve(FakeEngine(burst=3)) as client:
        options = {"prompts": prompts, "output_len": 10, "num_prompts": 4, "repeats": 3, "concurrency": 2}
        lines, written, succeeded = await measure(client, tmp_path, **options)
    assert succeeded
    assert lines[0].startswith("14 requests of 1 prompts")
    [run] = written["runs"]
    assert (run["max_concurrency"], run["request_rate"], run["errors"]) == (2, None, {})
    for repeat in run["repeats"]:
        assert (repeat["completed"], repeat["failed"], repeat["retries"]) == (4, 0, 0)
        assert (repeat["total_input_tokens"], repeat["total_output_tokens"]) == (4 * CHAT_TOKENS, 40)
        assert repeat["output_throughput"] == pytest.approx(40 / repeat["duration"])
        assert repeat["total_token_throughput"] == pytest.approx((40 + 4 * CHAT_TOKENS) / repeat["duration"])
        assert (repeat["spec_decode_num_drafts"], repeat["spec_decode_draft_tokens"]) == (12, 24)
        assert (repeat["spec_decode_acceptance_rate"], repeat["spec_decode_acceptance_length"]) == (100.0, 3.0)
        assert repeat["spec_decode_per_position_acceptance_rates"] == [1.0, 1.0]
        assert repeat["mean_ttft_ms"] > 0
    assert run["spread"]["total_output_tokens"] == {"median": 40, "low": 40, "high": 40}
    titles = [line.split(":")[0] for line in lines[1:]]
    assert lines[1] == "============ Serving Benchmark Result ============"
    assert "---------------Speculative Decoding---------------" in lines
    for title in ("Successful requests", "Output token throughput (tok/s)", "P99 TTFT (ms)", "  Position 1"):
        assert title in titles
    assert "Accepted tokens:                         24         [24, 24]" in lines


async def test_synthetic_lengths_are_exact(serve, tmp_path):
    async with serve(FakeEngine(length=5)) as client:  # would stop after five tokens, if it were let
        lines, written, _ = await measure(
            client, tmp_path, input_len=23, output_len=7, num_prompts=3, repeats=2, sweep=(1, 2)
        )
    assert [run["max_concurrency"] for run in written["runs"]] == [1, 2]
    for repeat in (repeat for run in written["runs"] for repeat in run["repeats"]):
        assert (repeat["total_input_tokens"], repeat["total_output_tokens"]) == (69, 21)
    assert "No speculation block: nothing was drafted in this time." in lines
    assert [line.split()[0] for line in lines[-4:-1]] == ["concurrency", "1", "2"]  # and last, where the JSON is
    assert not any("prefix cache" in line for line in lines)  # no prompt comes twice


async def test_poisson_arrivals_reach_the_server(serve, prompts, tmp_path):
    async with serve() as client:
        _, written, _ = await measure(client, tmp_path, prompts=prompts, num_prompts=5, repeats=1, request_rate=1000.0)
    [run] = written["runs"]
    assert (run["request_rate"], run["max_concurrency"], run["repeats"][0]["completed"]) == (1000.0, None, 5)


# ---- with and without speculation


async def test_compare_pairs_the_arms(serve, prompts, tmp_path):
    async with serve(FakeEngine(burst=3)) as client:
        options = {"prompts": prompts, "output_len": 10, "num_prompts": 4, "temperature": 1.0, "sweep": (1, 2)}
        lines, written, succeeded = await measure(client, tmp_path, compare=True, **options)
    assert succeeded
    one, two = written["comparisons"]
    assert (one["workload"], one["max_concurrency"], two["max_concurrency"]) == ("mine", 1, 2)
    assert [tokens for tokens, _ in one["turns"]["on"]] == [tokens for tokens, _ in one["turns"]["off"]] == [10] * 4
    assert [tokens for tokens, _ in two["turns"]["on"]] == [40, 40]  # turns of twice as many requests as users; two
    for each, count in ((one, 4), (two, 8)):
        assert (each["texts_compared"], each["texts_identical"], each["errors"]) == (count, count, {})
    rates = [sum(t for t, _ in one["turns"][arm]) / sum(s for _, s in one["turns"][arm]) for arm in ("on", "off")]
    assert one["speed_up"]["value"] == pytest.approx(rates[0] / rates[1])
    assert one["speed_up"]["low"] <= one["speed_up"]["high"]
    assert (one["speculation"]["spec_decode_num_drafts"], one["speculation"]["spec_decode_draft_tokens"]) == (12, 24)
    assert "  texts with equal seeds: 4 of 4 identical" in lines
    assert not any("asked for none" in line for line in lines)  # the off arm drafted nothing


class Unfaithful(FakeEngine):
    """Says something else when it speculates."""

    def token(self, request, index):
        return super().token(request, index + (request.speculation.enabled is not False))


async def test_compare_says_when_texts_differ(serve, prompts, tmp_path):
    async with serve(Unfaithful(burst=2)) as client:
        options = {"prompts": prompts, "output_len": 8, "num_prompts": 3, "compare": True}
        lines, written, _ = await measure(client, tmp_path, **options)
    assert written["comparisons"][0]["texts_identical"] == 0
    assert "  texts with equal seeds: 0 of 3 identical" in lines


async def test_compare_on_a_server_without_a_drafter(serve, prompts, tmp_path):
    async with serve(FakeEngine(burst=1)) as client:
        options = {"prompts": prompts, "output_len": 4, "num_prompts": 2, "compare": True}
        lines, written, _ = await measure(client, tmp_path, **options)
    assert any(line.startswith("  nothing was drafted") for line in lines)
    assert written["comparisons"][0]["speculation"] is None
    assert lines[0] == "mine, concurrency 1: no verdict on 2 pairs; 6 are needed (--num-prompts, --repeats)"


# ---- failures


async def test_a_wrong_key_and_a_wrong_model(serve, prompts, tmp_path):
    async with serve(api_key="secret") as client:
        with pytest.raises(BenchError, match="HTTP 401: missing or wrong API key"):
            await measure(client, tmp_path, prompts=prompts)
        with pytest.raises(BenchError, match=r"no warm-up request succeeded: .* HTTP 404: the model 'other'"):
            await measure(client, tmp_path, prompts=prompts, api_key="secret", model="other")
        options = {"prompts": prompts, "api_key": "secret", "model": "other", "num_prompts": 3, "repeats": 1}
        lines, written, succeeded = await measure(client, tmp_path, warmup=0, **options)
        assert not succeeded
        assert lines[-2].startswith("3 failed: HTTP 404")
        assert written["options"]["api_key"] == "***"
        _, written, succeeded = await measure(client, tmp_path, **options | {"model": None})
        assert succeeded
        assert written["runs"][0]["repeats"][0]["completed"] == 3


async def test_a_server_that_is_not_there(prompts):
    with pytest.raises(BenchError, match=r"http://127.0.0.1:9 could not be asked .* is the server running there"):
        await bench(BenchOptions(url="http://127.0.0.1:9/v1", prompts=prompts, retries=0), print)


def foreign(behave, usage=True):
    """A client on somebody else's server: it streams "a", "b", "c", tells no metrics and ignores unknown fields.

    behave(number of the request, from 0): None, or "503", "busy", "broken", "error": what goes wrong.
    """
    count = iter(range(10_000))

    def chunk(text, finish=None):
        return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}

    async def events(what):
        yield ": ping\n\n"
        for text in "abc":
            yield f"data: {json.dumps(chunk(text))}\n\n"
            if what == "broken":
                return
            if what == "error":
                yield 'data: {"error": {"message": "out of luck"}}\n\n'
        yield f"data: {json.dumps(chunk('', 'length'))}\n\n"
        if usage:
            yield f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 5, 'completion_tokens': 6}})}\n\n"
        yield "data: [DONE]\n\n"

    async def chat(request):
        what = behave(next(count))
        if what == "503":
            return JSONResponse({"error": {"message": "queue full"}}, 503, {"Retry-After-Ms": "1"})
        return StreamingResponse(events(what), media_type="text/event-stream")

    async def models(request):
        return JSONResponse({"object": "list", "data": [{"id": "theirs", "object": "model"}]})

    app = Starlette(
        routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)],
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_a_foreign_server_without_metrics(prompts, tmp_path):
    async with foreign(lambda n: None) as client:
        lines, written, succeeded = await measure(client, tmp_path, prompts=prompts, num_prompts=3, repeats=1)
        assert succeeded
        assert "No speculation block: the server's /metrics tells nothing of drafts." in lines
        assert not any("Speculative Decoding" in line for line in lines)
        [repeat] = written["runs"][0]["repeats"]
        assert (repeat["total_input_tokens"], repeat["total_output_tokens"]) == (15, 18)
        assert written["server"] == {"url": "http://test", "model": "theirs", "version": None}
        with pytest.raises(BenchError, match="cannot switch speculation per request"):
            await measure(client, tmp_path, prompts=prompts, compare=True)
        with pytest.raises(BenchError, match="HTTP 404"):
            await measure(client, tmp_path, input_len=8)  # no /tokenize, no /v1/completions
    async with foreign(lambda n: None, usage=False) as client:
        lines, written, _ = await measure(client, tmp_path, prompts=prompts, num_prompts=3, repeats=1)
        assert lines[-2].startswith("This server tells no usage")
        assert written["runs"][0]["repeats"][0]["total_output_tokens"] == 9  # chunks


async def test_failures_are_counted_and_retries_too(prompts, tmp_path):
    went_wrong = {2: "broken", 3: "error", 4: "503", 5: "503"}  # 0 and 1 warm up; 4 is tried again as 5, then 6
    async with foreign(went_wrong.get) as client:
        lines, written, succeeded = await measure(client, tmp_path, prompts=prompts, num_prompts=4, repeats=1)
    [repeat] = written["runs"][0]["repeats"]
    assert succeeded
    assert (repeat["completed"], repeat["failed"], repeat["retries"]) == (2, 2, 2)
    errors = {"the stream ended before the answer did": 1, "out of luck": 1}
    assert written["runs"][0]["errors"] == errors
    assert "Retries:                                 2         " in lines
    async with foreign(lambda n: "503") as client:
        with pytest.raises(BenchError, match="no warm-up request succeeded: 2 failed: HTTP 503: queue full"):
            await measure(client, tmp_path, prompts=prompts, retries=1)


async def test_a_retried_failure_keeps_its_retries(prompts):
    async with foreign(lambda n: "503") as client:
        endpoint = Endpoint("http://test", model="theirs", retries=2, client=client)
        sample = await endpoint.ask({"messages": []})
    assert (sample.status, sample.retries, sample.error) == (503, 2, "HTTP 503: queue full")


async def test_prompt_lengths_without_tokenize_are_guessed_from_usage(tmp_path):
    """A server with three tokens per word and no /tokenize."""
    seen = []

    async def completions(request):
        body = await request.json()
        words = len(body["prompt"].split())
        seen.append(words)
        end = {"choices": [{"text": "x", "finish_reason": "length"}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 3 * words, "completion_tokens": 1}}
        return PlainTextResponse(
            f"data: {json.dumps(end)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n", media_type="text/event-stream"
        )

    app = Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        options = {"input_len": 60, "num_prompts": 2, "repeats": 1, "model": "m"}
        lines, written, _ = await measure(client, tmp_path, **options)
    assert seen == [100, 20, 20, 20, 20]  # the trial, the warm-up, the run
    assert lines[0] == "this server has no /tokenize: prompt lengths are approximate"
    assert written["runs"][0]["repeats"][0]["total_input_tokens"] == 120


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"request_rate": 1.0, "compare": True}, "--request-rate does not go with"),
        ({"sweep": (1, 2), "concurrency": 2}, "leave out --concurrency"),
        ({"sweep": (0, 2)}, "1 and more"),
        ({"input_len": 5, "prompts": "f"}, "leave out --prompts"),
        ({"json": Path("/nowhere/b.json")}, "no directory /nowhere"),
    ],
)
def test_options_that_contradict(options, said):
    with pytest.raises(BenchError, match=said):
        BenchOptions(**options)


# ---- the command


@pytest.mark.parametrize("succeeds", [True, False])
def test_the_command(prompts, tmp_path, succeeds):
    with Server(text=True) as server:
        command = [sys.executable, "-m", "dspark_serve.cli", "bench", "--url", server.url, "--prompts", str(prompts)]
        command += ["--num-prompts", "3", "--repeats", "1", "--output-len", "5", "--json", str(tmp_path / "b.json")]
        command += ["--sweep", "1,2"] if succeeds else ["--model", "other", "--warmup", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    written = json.loads((tmp_path / "b.json").read_text())
    assert done.returncode == (0 if succeeds else 1), done.stderr
    assert done.stdout.count(" Serving Benchmark Result ") == len(written["runs"]) == (2 if succeeds else 1)
    if succeeds:
        assert written["runs"][1]["repeats"][0]["total_output_tokens"] == 15
        assert done.stderr == ""
    else:
        assert done.stderr == "dspark-serve: no request succeeded\n"
