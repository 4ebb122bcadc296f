"""The server process: start-up lines, signals, drain, failures; and openai's own client talking to it."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from fakes import FakeEngine, byte_tokenizer, make_service

from dspark_serve.server.run import StartupError, bind, startup_lines

HERE = Path(__file__).parent
HI = [{"role": "user", "content": "hi"}]


class Server:
    """A scripted server in a process of its own; `lines` are its output until it was ready, `url` where it listens."""

    def __init__(self, delay_s=0.0, text=False, failure=None, **options):
        script = HERE / "scripted_server.py"
        command = [sys.executable, script, json.dumps({"port": 0, **options}), str(delay_s), str(int(text))]
        self.process = subprocess.Popen(
            [*command, failure] if failure else command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines, self.url = [], None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("curl "):
                break
            if line.startswith("ready"):
                self.url = re.search(r"http://\S+(?=/v1)", line)[0]

    def finish(self, timeout_s=10):
        _, errors = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, errors

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server():
    with Server(delay_s=0.002, text=True) as server:
        yield server
        server.process.send_signal(signal.SIGINT)
        assert server.finish(5)[0] == 0  # idle: it ends at once


def test_startup_lines_tell_what_runs_and_the_curl_line_works(server):
    text = "\n".join(server.lines)
    for expected in ["4,096 tokens", "8.0 requests at the full length of 512", "script, up to 1 draft", "bitwise"]:
        assert expected in text
    answer = subprocess.run(["bash", "-c", server.lines[-1] + " -s"], capture_output=True, text=True, timeout=20)
    assert "Hello" in json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_openai_client(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.chat.completions.create(model="fake", messages=HI, max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == "Hello"
    assert answer._request_id
    with client.chat.completions.create(
        model="fake", messages=HI, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, wörl"
    assert chunks[-1].usage.completion_tokens == 12
    text = client.completions.create(model="fake", prompt="x", max_tokens=3, temperature=0, extra_body={"top_k": 5})
    assert text.choices[0].text == "Hel"
    assert client.models.list().data[0].id == "fake"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=HI)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="fake", messages=HI, temperature=1000)
    assert caught.value.param == "temperature"


async def test_openai_async_client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def stream(n):
            text = ""
            async for chunk in await client.chat.completions.create(
                model="fake", messages=HI, max_tokens=n, temperature=0, stream=True
            ):
                text += chunk.choices[0].delta.content or ""
            return text

        texts = await asyncio.gather(*(stream(n) for n in range(1, 7)))
        assert texts == ["H", "He", "Hel", "Hell", "Hello", "Hello,"]


async def test_hanging_up_gives_the_pages_back(server):
    async with httpx.AsyncClient(base_url=server.url) as client:
        body = {"prompt": "x", "max_tokens": 500, "n": 4}
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            async for _ in response.aiter_bytes():
                break
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/completions", json=body, timeout=0.1)
        await idle(client)


async def idle(client):
    """Wait until the metrics show nothing running and no page in use."""
    wanted = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
    for _ in range(100):
        metrics = (await client.get("/metrics")).text
        if all(re.search(rf"^dspark:{name}{{.*}} 0\.0$", metrics, re.MULTILINE) for name in wanted):
            return
        await asyncio.sleep(0.02)
    raise AssertionError("requests or pages are left")


def test_large_body_is_answered_before_it_is_read(server):
    response = httpx.post(f"{server.url}/v1/completions", content=b" " * 10_000_000, timeout=10)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "content_too_large"


def test_sigterm_drains():
    # Four seconds of work, and a client that is already connected: a busy machine gets all of this in before it ends.
    with Server(delay_s=0.02) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        result = {}

        def generate():
            body = {"prompt": [1], "max_tokens": 200, "temperature": 0}
            result["answer"] = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)

        generating = threading.Thread(target=generate)
        generating.start()
        wait_for(lambda: running(client) == 1)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").status_code == 200
        refused = client.post("/v1/completions", json={"prompt": [1]})
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        generating.join()
        assert result["answer"].json()["usage"]["completion_tokens"] == 200
        assert server.finish()[0] == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_drain_ends_at_its_timeout_or_at_a_second_signal(signals):
    with Server(delay_s=0.05, shutdown_timeout=0.3 if signals == 1 else 60) as server:
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={"prompt": [1], "max_tokens": 500, "stream": True}, timeout=20
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            for _ in range(signals):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            if signals == 1:
                rest = "\n".join(lines)
                assert "shutting down" in rest
                assert rest.rstrip().endswith("[DONE]")
            code, _ = server.finish()
        assert code == (0 if signals == 1 else 1)


def running(client):
    metrics = client.get("/metrics").text
    return float(re.search(r"^dspark:num_requests_running{.*} (.*)$", metrics, re.MULTILINE)[1])


def wait_for(condition, timeout_s=10):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_loading_failure_is_one_sentence():
    with Server(failure="the model is made of cheese") as server:
        code, errors = server.finish()
    assert (code, errors) == (1, "dspark-serve: the model is made of cheese\n")


def test_a_signal_while_loading_ends_it_quietly():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, HERE / "scripted_server.py", json.dumps({"port": port}), "0", "0", "slow"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "Traceback" not in errors
        assert "stopped while" not in errors


def answers(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} on 127.0.0.1 is in use; choose another with --port"):
            bind("127.0.0.1", port)
    with pytest.raises(StartupError, match="cannot listen on"):
        bind("no.such.host", 0)


@pytest.mark.parametrize("tokenizer", [None, "byte"])
def test_lines_of_a_server_with_a_key(tokenizer):
    service = make_service(tokenizer=tokenizer, api_key="sesame")
    service.tokenizer = byte_tokenizer() if tokenizer else None
    lines = startup_lines(FakeEngine().info, service, "0.0.0.0", 80)
    assert "sesame" not in "\n".join(lines)
    assert "-H 'Authorization: Bearer '$KEY" in lines[-1]
    assert ("/v1/chat/completions" if tokenizer else "/v1/completions") in lines[-1]
    assert lines[-2].endswith("http://127.0.0.1:80/v1")
    assert lines[-3] == "live page    http://127.0.0.1:80/"
    without = make_service(tokenizer=tokenizer, ui=False)
    assert "live page" not in "\n".join(startup_lines(FakeEngine().info, without, "0.0.0.0", 80))
