"""The real engine behind the real server: a tiny checkpoint in this process, the default model through the command."""

import asyncio
import json
import re
import subprocess
import sys

import httpx
import openai
import pytest
from fakes import PATIENCE_S, settled
from test_disconnect import Client
from tiny_model import write_tiny_model

from dspark_serve.config import load_config
from dspark_serve.server.app import create_app
from dspark_serve.server.service import Service


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


class Running:
    """`async with Running(directory) as client`; at the end the engine is whole and every page free."""

    def __init__(self, directory, **options):
        small = {"kv_cache_gib": 0.02, "threads": 1, "max_num_seqs": 4, "served_model_name": "tiny"}
        self.service = Service(load_config({"model": directory, **small, **options}))
        self.app = create_app(self.service)

    async def __aenter__(self):
        self.life = self.app.router.lifespan_context(self.app)
        await self.life.__aenter__()
        await self.service.engine.wait_loaded()
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test", timeout=60)
        self.client.app, self.client.service = self.app, self.service
        return self.client

    async def __aexit__(self, *error):
        await self.whole()
        await self.client.aclose()
        await self.life.__aexit__(*error)

    async def whole(self):
        engine = await self.service.engine.call(lambda engine: engine)
        await settled(self.service, engine)


async def complete(client, **body):
    response = await client.post("/v1/completions", json={"prompt": "abcabcabc", "max_tokens": 24, **body})
    assert response.status_code == 200, response.text
    return response


async def test_same_text_streamed_or_not_with_drafts_or_without_alone_or_in_a_batch(tiny):
    async with Running(tiny) as client:
        for params in ({"temperature": 0}, {"temperature": 0.9, "seed": 11, "top_p": 0.95}):
            alone = (await complete(client, **params)).json()
            plain = (await complete(client, speculation={"enabled": False}, **params)).json()
            batch = await asyncio.gather(
                *(complete(client, prompt=["abcabcabc", "z" * n], **params) for n in range(1, 9))
            )
            texts = {answer["choices"][0]["text"] for answer in (alone, plain, *(each.json() for each in batch))}
            assert len(texts) == 1
            events = [line[6:] for line in (await complete(client, stream=True, **params)).text.split("\n") if line]
            chunks = [json.loads(event) for event in events[:-1]]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) in texts
            assert plain["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0


async def test_echo_scores_the_prompt(tiny):
    async with Running(tiny) as client:
        answer = (await complete(client, echo=True, logprobs=2, max_tokens=3, temperature=0)).json()
        logprobs = answer["choices"][0]["logprobs"]
        assert "".join(logprobs["tokens"][:9]) == "abcabcabc"
        assert logprobs["token_logprobs"][0] is None
        assert all(value < 0 for value in logprobs["token_logprobs"][1:])
        assert all(1 <= len(top) <= 3 for top in logprobs["top_logprobs"][1:])  # bytes that are no text look alike


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt": "x" * 600}, "context_length_exceeded"),
        ({"prompt": "x", "max_tokens": 5000}, "context_length_exceeded"),
        ({"prompt": [300]}, "invalid_value"),
        ({"prompt": "x", "logit_bias": {"300": 1}}, "invalid_value"),
        ({"prompt": "x", "n": 1000}, "invalid_value"),
    ],
)
async def test_refusals(tiny, body, code):
    async with Running(tiny) as client:
        response = await client.post("/v1/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up(tiny, stream):
    running = Running(tiny, max_num_seqs=2)
    async with running as client:
        body = {"prompt": "x", "max_tokens": 480, "ignore_eos": True, "n": 60, "stream": stream}
        raw = Client(client.app, body)  # two run, the rest waits
        while client.service.metrics.totals.generation_tokens < 10:
            await asyncio.sleep(0.005)
        raw.hang_up()
        await asyncio.wait_for(raw.task, PATIENCE_S)
        await running.whole()
        assert client.service.metrics.totals.generation_tokens < 60 * 480
        await complete(client)


async def test_model_without_tokenizer(tmp_path):
    async with Running(str(write_tiny_model(tmp_path / "bare", tokenizer=False))) as client:
        body = {"prompt": [1, 2, 3], "return_token_ids": True, "temperature": 0}
        choice = (await complete(client, **body)).json()["choices"][0]
        assert (len(choice["token_ids"]), choice["text"]) == (24, "")
        assert (
            await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        ).is_error


@pytest.fixture(scope="module")
def default_url(smollm2_dir):
    """`dspark-serve serve` with nothing but a free port and a small pool."""
    command = [
        sys.executable,
        "-m",
        "dspark_serve.cli",
        "serve",
        "--port",
        "0",
        "--kv-cache-gib",
        "0.1",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    url = None
    for line in process.stdout:
        url = url or re.search(r"^ready +(http://\S+)", line)
        if line.startswith("curl "):
            break
    assert url is not None, "the server did not start"
    yield url[1]
    process.terminate()
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.timeout(900)  # loading and measuring for the first time, on a busy machine
def test_default_model_talks_through_openais_client(default_url):
    client = openai.OpenAI(base_url=default_url, api_key="none", timeout=120)
    model = client.models.list().data[0].id
    assert client.models.retrieve(model).model_extra["max_model_len"] == 8192
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=model, messages=question, max_tokens=16, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    stream = client.chat.completions.create(
        model=model,
        messages=question,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= 16


@pytest.mark.timeout(900)
async def test_default_model_talks_through_openais_async_client(default_url):
    async with openai.AsyncOpenAI(base_url=default_url, api_key="none", timeout=120) as client:

        async def complete(prompt):
            text = ""
            async for chunk in await client.completions.create(
                model="smollm2-135m-instruct", prompt=prompt, max_tokens=3, temperature=0, stream=True
            ):
                text += chunk.choices[0].text
            return text

        texts = await asyncio.gather(*(complete(f"The capital of {land} is") for land in ("France", "Italy", "Japan")))
        assert [word in text for word, text in zip(("Paris", "Rome", "Tokyo"), texts, strict=True)] == [True] * 3
