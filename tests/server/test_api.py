"""Routes and bodies, on a scripted engine: what OpenAI's and vLLM's clients rely on."""

import asyncio
import json
import threading
from itertools import chain

import pytest
from fakes import ANSWER, EOS, PATIENCE_S, FakeEngine, byte_tokenizer, make_app, until
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from test_disconnect import Client

from dspark_serve.server.async_engine import AsyncEngine

HI = [{"role": "user", "content": "hi"}]


def events(response):
    """The data of an SSE body; it must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def flat(lists):
    return list(chain.from_iterable(lists))


async def chat(client, **body):
    return await client.post("/v1/chat/completions", json={"messages": HI, "temperature": 0, **body})


async def complete(client, **body):
    return await client.post("/v1/completions", json={"prompt": "hi", "temperature": 0, **body})


async def test_chat(serve):
    async with serve() as client:
        response = await chat(client, max_tokens=5, model="fake")
        answer = ChatCompletion.model_validate(response.json())
        assert response.headers["content-type"] == "application/json"
        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (24, 5, 29)
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        again = ChatCompletion.model_validate((await chat(client, max_completion_tokens=5)).json())
        assert again.usage.prompt_tokens_details.cached_tokens == 16


async def test_chat_stops_at_eos(serve):
    async with serve(FakeEngine(length=5)) as client:
        choice = (await chat(client)).json()["choices"][0]
        assert choice["message"]["content"] == "Hello"
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        ignored = (await chat(client, ignore_eos=True, max_tokens=7, skip_special_tokens=False)).json()["choices"][0]
        assert ignored["message"]["content"] == "Hello<eos><eos>"


@pytest.mark.parametrize("burst", [1, 4])
async def test_stop_string_counts_the_same_whatever_the_burst(serve, burst):
    async with serve(FakeEngine(burst=burst)) as client:
        answer = (await chat(client, stop=[", wö", "zzz"], return_token_ids=True)).json()
        choice = answer["choices"][0]
        assert choice["message"]["content"] == "Hello"
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ", wö")
        assert choice["token_ids"] == list("Hello, wö".encode())
        assert answer["usage"]["completion_tokens"] == 10


async def test_stop_token(serve):
    async with serve() as client:
        choice = (await chat(client, stop_token_ids=[ord(",")])).json()["choices"][0]
        assert choice["message"]["content"] == "Hello"
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ord(","))


@pytest.mark.parametrize("burst", [1, 3])
async def test_streamed_chat_is_the_whole_chat(serve, burst):
    async with serve(FakeEngine(burst=burst)) as client:
        options = {"max_tokens": 40, "stop": ["script"], "n": 2}
        response = await chat(client, stream=True, stream_options={"include_usage": True}, **options)
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk)
        assert len({chunk["id"] for chunk in chunks}) == 1
        whole = (await chat(client, **options)).json()
        for index in range(2):
            mine = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(choice["delta"].get("content", "") for choice in mine)
            assert text == whole["choices"][index]["message"]["content"] == "Hello, wörld! This is a "
            assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
            assert mine[-1]["finish_reason"] == "stop"
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        assert "speculative_decoding" in chunks[-1]["metrics"]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_characters_are_never_split(serve):
    async with serve() as client:
        chunks = events(await chat(client, stream=True, max_tokens=10))
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello, wö"
        assert "metrics" in chunks[-1]
        assert not any("usage" in chunk for chunk in chunks)


async def test_completion_prompts(serve):
    async with serve() as client:
        for prompt, text, count in [
            ("hi", "Hel", 1),
            (["a", "b"], "Hel", 2),
            ([1, 2, 3], "Hel", 1),
            ([[1, 2], [3]], "Hel", 2),
        ]:
            answer = Completion.model_validate((await complete(client, prompt=prompt, max_tokens=3, n=2)).json())
            assert [choice.index for choice in answer.choices] == list(range(2 * count))
            assert {choice.text for choice in answer.choices} == {text}
        assert len((await complete(client)).json()["choices"][0]["text"].encode()) == 16  # OpenAI's default


async def test_n_choices_have_seeds_of_their_own(serve):
    async with serve() as client:
        body = {"seed": 7, "n": 3, "max_tokens": 4, "temperature": 1}
        texts = [choice["text"] for choice in (await complete(client, **body)).json()["choices"]]
        assert texts == [ANSWER[7:11], ANSWER[8:12], ANSWER[9:13]] or len(set(texts)) == 3
        alone = (await complete(client, **{**body, "seed": 8, "n": 1})).json()["choices"][0]["text"]
        assert alone == texts[1]


async def test_text_logprobs_and_echo(serve):
    async with serve() as client:
        body = {"prompt": "abc", "max_tokens": 2, "echo": True, "logprobs": 2}
        choice = (await complete(client, **body)).json()["choices"][0]
        assert choice["text"] == "abcHe"
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == ["a", "b", "c", "H", "e"]
        assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["top_logprobs"][1] == {"b": -0.5, "c": -1.5}
        assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
        parts = [c["choices"][0] for c in events(await complete(client, stream=True, **body))]
        assert "".join(part["text"] for part in parts) == "abcHe"
        for key in logprobs:
            assert flat(part["logprobs"][key] for part in parts) == logprobs[key]


async def test_chat_logprobs(serve):
    async with serve(FakeEngine(burst=3)) as client:
        body = {"logprobs": True, "top_logprobs": 2, "max_tokens": 9}
        content = (await chat(client, **body)).json()["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in content[:2]] == ["H", "e"]
        assert bytes(flat(entry["bytes"] for entry in content)) == "Hello, wö".encode()[:9]
        assert [len(entry["top_logprobs"]) for entry in content] == [2] * 9
        parts = [c["choices"][0].get("logprobs") for c in events(await chat(client, stream=True, **body))]
        assert flat(part["content"] for part in parts if part) == content


async def test_token_ids(serve):
    async with serve() as client:
        answer = (await chat(client, max_tokens=2, return_token_ids=True)).json()
        assert bytes(answer["prompt_token_ids"]) == b"<|user|>hi\n<|assistant|>"
        assert bytes(answer["choices"][0]["token_ids"]) == b"He"
        chunks = events(await complete(client, stream=True, max_tokens=3, return_token_ids=True))
        assert chunks[0]["choices"][0]["prompt_token_ids"] == list(b"hi")
        assert bytes(flat(c["choices"][0]["token_ids"] for c in chunks)) == b"Hel"


async def test_model_without_tokenizer(serve):
    async with serve(tokenizer=None) as client:
        answer = (await complete(client, prompt=[5, 6], max_tokens=3, return_token_ids=True, logprobs=0)).json()
        assert bytes(answer["choices"][0]["token_ids"]) == b"Hel"
        assert answer["choices"][0]["text"] == ""
        assert answer["choices"][0]["logprobs"]["tokens"][0] == f"token_id:{ord('H')}"
        for response in [
            await complete(client, prompt="text"),
            await chat(client),
            await complete(client, prompt=[1], stop="x"),
            await client.post("/tokenize", json={"prompt": "x"}),
        ]:
            assert response.status_code == 400
            assert "no tokenizer" in response.json()["error"]["message"]


async def test_speculation_report_and_control(serve):
    async with serve(FakeEngine(burst=4)) as client:
        report = (await complete(client, max_tokens=9)).json()["metrics"]["speculative_decoding"]
        assert report == {
            "mean_acceptance_length": 4.0,
            "draft_acceptance_rate": 1.0,
            "acceptance_histogram": {"3": 2},
            "num_spec_steps": 2,
            "num_accepted_draft_tokens": 6,
            "num_draft_tokens": 6,
            "num_kept_draft_tokens": 6,
        }
        off = (await complete(client, max_tokens=9, speculation={"enabled": False})).json()
        assert off["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
        one = (await complete(client, max_tokens=9, speculation={"max_draft_tokens": 1})).json()
        assert set(one["metrics"]["speculative_decoding"]["acceptance_histogram"]) == {"1"}


async def test_models(serve):
    async with serve(served_model_name="org/name") as client:
        card = (await client.get("/v1/models")).json()["data"][0]
        assert (card["id"], card["root"], card["max_model_len"], card["object"]) == ("org/name", "fake", 512, "model")
        assert (await client.get("/v1/models/org/name")).json() == card
        missing = await client.get("/v1/models/other")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
        assert (await chat(client, model="org/name", max_tokens=1)).status_code == 200


async def test_tokenize(serve):
    async with serve() as client:
        answer = (await client.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
        assert answer["tokens"] == [104, 195, 169]
        assert (answer["count"], answer["max_model_len"], len(answer["token_strs"])) == (3, 512, 3)
        rendered = (await client.post("/tokenize", json={"messages": HI})).json()
        back = (await client.post("/detokenize", json={"tokens": rendered["tokens"]})).json()
        assert back == {"prompt": "<|user|>hi\n<|assistant|>"}
        assert (await client.post("/detokenize", json={"tokens": [EOS]})).json() == {"prompt": "<eos>"}
        for body in [{}, {"prompt": "x", "messages": HI}]:
            assert (await client.post("/tokenize", json=body)).status_code == 400


async def test_facts(serve):
    async with serve(api_key="secret") as client:
        client.headers["Authorization"] = "Bearer secret"
        info = (await client.get("/server_info")).json()
        assert info["engine"]["max_model_len"] == 512
        assert "secret" not in json.dumps(info)
        assert (await client.get("/version")).json()["version"] == info["version"]


async def test_request_ids(serve):
    async with serve() as client:
        assert (await client.get("/health", headers={"X-Request-Id": "my-id.1"})).headers["x-request-id"] == "my-id.1"
        for bad in ["has space", "x" * 200, "a;b"]:
            response = await client.get("/health", headers={"X-Request-Id": bad})
            assert response.headers["x-request-id"] != bad
            assert len(response.headers["x-request-id"]) == 32
        twins = await asyncio.gather(*(client_request(client) for _ in range(3)))
        assert [response.status_code for response in twins] == [200] * 3  # one id on three requests at once


async def client_request(client):
    body = {"messages": HI, "max_tokens": 5}
    return await client.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "same"})


async def test_keys(serve):
    async with serve(api_key="secret") as client:
        for headers in [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}]:
            response = await client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer secret"})).status_code == 200
        for path in ["/health", "/ready", "/metrics"]:
            assert (await client.get(path)).status_code == 200


async def test_loading_and_dead_states(serve):
    import httpx

    release = threading.Event()
    app = make_app()
    service = app.state.service
    engine = FakeEngine()

    def load():
        release.wait()
        service.tokenizer = byte_tokenizer()
        return engine

    service.engine = AsyncEngine(load, service.metrics)
    async with app.router.lifespan_context(app):
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        assert (await client.get("/health")).status_code == 200
        for response in [await client.get("/ready"), await client.get("/v1/models"), await chat(client)]:
            assert response.status_code == 503
            assert response.headers["retry-after"]
            assert "loading" in response.json()["error"]["message"]
        release.set()
        await service.engine.wait_loaded()
        assert (await client.get("/ready")).status_code == 200
        engine.fail_at = engine.steps + 3
        failed = await chat(client, max_tokens=100)
        assert failed.status_code == 500
        assert failed.headers["x-request-id"] in failed.json()["error"]["message"]
        assert "scripted" not in failed.text
        for response in [await client.get("/health"), await client.get("/ready"), await chat(client)]:
            assert response.status_code == 503


async def test_failure_mid_stream_is_an_event(serve):
    engine = FakeEngine()
    async with serve(engine, check=False) as client:
        engine.fail_at = 4
        chunks = events(await chat(client, stream=True, max_tokens=100))
        assert chunks[-1]["error"]["code"] == "engine_failed"
        assert "choices" in chunks[0]


async def test_draining_refuses_with_retry_after(serve):
    engine = FakeEngine()
    async with serve(engine) as client:
        engine.gate.clear()
        running = asyncio.create_task(chat(client, max_tokens=20))
        await until(lambda: client.service.engine.num_requests)
        drain = asyncio.create_task(client.service.engine.drain(PATIENCE_S))
        await asyncio.sleep(0)
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert (await chat(client)).headers["retry-after"]
        engine.gate.set()
        assert len((await running).json()["choices"][0]["message"]["content"]) > 10
        assert await drain


async def test_pings_keep_a_quiet_stream_open(serve, monkeypatch):
    monkeypatch.setattr("dspark_serve.server.stream.PING_EVERY_S", 0.02)
    engine = FakeEngine()
    async with serve(engine) as client:
        engine.gate.clear()
        raw = Client(client.app, {"prompt": "x", "max_tokens": 3, "stream": True})
        await until(lambda: any(b": ping" in message.get("body", b"") for message in raw.sent))
        engine.gate.set()
        await raw.task
        assert any(b"[DONE]" in message.get("body", b"") for message in raw.sent)


async def test_slow_tokenising_stalls_nobody(serve, monkeypatch):
    begun, release = threading.Event(), threading.Event()
    async with serve() as client:
        tokenizer = client.service.tokenizer
        encode = tokenizer.encode

        def slow(text, *args, **kwargs):
            if "long" in text:
                begun.set()
                release.wait(PATIENCE_S)
            return encode(text, *args, **kwargs)

        monkeypatch.setattr(tokenizer, "encode", slow)
        long = asyncio.create_task(complete(client, prompt="long", max_tokens=1))
        await until(begun.is_set)
        assert (await complete(client, prompt="short", max_tokens=20)).status_code == 200
        assert not long.done()
        release.set()
        assert (await long).status_code == 200
